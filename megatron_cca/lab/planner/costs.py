"""Seconds that a rank computes, and seconds that it waits for communication.

The position of a group's ranks decides which links it uses. Megatron's order is TP, CP, DP, PP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config, TrainingConfig
from megatron_cca.lab.planner.activations import layer_scores
from megatron_cca.lab.planner.hardware import Calibration, Cluster, Gpu
from megatron_cca.lab.planner.next_scale import moved_by_layer
from megatron_cca.lab.planner.sizes import Sizes
from megatron_cca.lab.planner.workload import ATTENTION_BACKWARD, attention_forward, products, row_products
from megatron_cca.parallel.tiles import GPU, block_width, chunk_size_of


@dataclass(frozen=True)
class Group:
    """A process group whose global ranks lie ``stride`` apart.

    Attributes:
        size: number of ranks.
        stride: distance between two neighbours in global ranks.
        cluster: the cluster of the ranks.
        calibration: efficiency of the links.
    """

    size: int
    stride: int
    cluster: Cluster
    calibration: Calibration

    @property
    def ranks_per_node(self) -> int:
        """Number of the group's ranks that share a node."""
        return max(1, min(self.size, self.cluster.gpus_per_node // self.stride))

    @property
    def is_within_a_node(self) -> bool:
        """Whether NVLink connects all ranks of the group."""
        return self.size == 1 or self.size * self.stride <= self.cluster.gpus_per_node

    def collective(self, whole_bytes: float) -> float:
        """Return the seconds of an all-gather or reduce-scatter of ``whole_bytes`` bytes.

        An all-reduce costs twice as much. Between nodes, each rank of a node has its own network card, and the rings
        use all of them.
        """
        if self.size == 1:
            return 0.0
        bandwidth = self._nvlink()
        if not self.is_within_a_node:
            bandwidth = min(bandwidth, self.ranks_per_node * self._network())
        latency = math.log2(self.size) * self.calibration.collective_latency_seconds
        return whole_bytes * (self.size - 1) / self.size / bandwidth + latency

    def send(self, message_bytes: float) -> float:
        """Return the seconds of a message to the next rank of the group.

        The slowest link between two neighbours decides.
        """
        if self.size == 1:
            return 0.0
        bandwidth = self._nvlink() if self.is_within_a_node else self._network()
        return message_bytes / bandwidth + self.calibration.collective_latency_seconds

    def _nvlink(self) -> float:
        return self.cluster.gpu.nvlink_bandwidth * self.calibration.nvlink_efficiency

    def _network(self) -> float:
        return self.cluster.gpu.network_bandwidth * self.calibration.network_efficiency


@dataclass(frozen=True)
class Compute:
    """The compute time of one pass of a model on one GPU.

    Attributes:
        sizes: sizes of the rank.
        gpu: the GPU that computes.
        calibration: calibration of the GPU.
        config: configuration of the run.
        settings: precision and recomputation of the pass, of the policy or of the reference.
        trains_weights: whether the weights have gradients.
        head_in_tiles: whether backward computes the head's logits again, tile by tile, and forward does not keep them.
    """

    sizes: Sizes
    gpu: Gpu
    calibration: Calibration
    config: Config
    settings: TrainingConfig
    trains_weights: bool
    head_in_tiles: bool

    @property
    def number_bytes(self) -> int:
        """Bytes of one element of an activation."""
        return 4 if self.settings.precision == "fp32" else 2

    def layer_forward(self) -> float:
        """Return the seconds of a layer's forward for a microbatch."""
        return self._products() + self._row_products() + self._attention() + self._elementwise()

    def layer_backward(self) -> float:
        """Return the seconds of a layer's backward for a microbatch, without recomputation."""
        gradients = 2 if self.trains_weights else 1
        return (
            gradients * (self._products() + self._row_products())
            + ATTENTION_BACKWARD * self._attention()
            + 2 * self._elementwise()
            + (self._accumulation() if self.trains_weights else 0.0)
        )

    def recomputation(self) -> float:
        """Return the seconds that recomputation adds to the backward of all layers, for a microbatch."""
        settings, sizes = self.settings, self.sizes
        if settings.recompute_granularity == "full":
            recomputed = sizes.layers
            if settings.recompute_method == "block":
                recomputed = min(sizes.layers, settings.recompute_num_layers * sizes.chunks)
            return recomputed * self.layer_forward()
        seconds = 0.0
        if settings.recompute_granularity == "selective":
            if "core_attn" in settings.recompute_modules:
                seconds += self._attention()
            if "mlp" in settings.recompute_modules:
                seconds += self._products("linear_fc1", "linear_fc2") + self._moved(sizes.tokens * self._moved_by_mlp())
        return sizes.layers * seconds

    def head_forward(self) -> float:
        """Return the seconds to compute the log-probabilities of a microbatch's image tokens."""
        # A tile of logits is written by its product and read once.
        return self._head_product() + self._bytes(8 * self.sizes.image_tokens * self.sizes.words)

    def head_backward(self) -> float:
        """Return the seconds of the backward of these log-probabilities."""
        sizes, gradients = self.sizes, 1 + self.trains_weights
        # The logits are read. Their gradient is written, and each product reads it.
        seconds = gradients * self._head_product()
        seconds += self._bytes((6 + 2 * gradients) * sizes.image_tokens * sizes.words)
        return seconds + (self._tiling() if self.head_in_tiles else 0.0)

    def _tiling(self) -> float:
        """Return the seconds that backward needs because the logits were not kept.

        It computes one more product, and adds tiles to sums in fp32.
        """
        sizes, hidden = self.sizes, self.sizes.architecture.hidden_size
        seconds = self._head_product() + self._bytes(4 * sizes.image_tokens * sizes.words)
        # Each product is added to a sum. The sum is read and written.
        blocks = math.ceil(sizes.words / block_width(math.ceil(sizes.words), GPU))
        seconds += self._bytes(8 * sizes.image_tokens * hidden * blocks)
        if self.trains_weights:
            chunks = math.ceil(sizes.image_tokens / self._chunk_size())
            seconds += self._bytes(8 * sizes.words * hidden * chunks)
        return seconds

    def _chunk_size(self) -> int:
        return chunk_size_of(self.settings.logps_chunk_size, on_gpu=True)

    def attention_seconds(self, *, backward: bool) -> float:
        """Return the seconds of a layer's attention for a microbatch, forward or backward."""
        return self._attention() * (ATTENTION_BACKWARD if backward else 1.0)

    def unpacking(self) -> float:
        """Return the seconds to convert a layer's FP8 weights to bf16 (``reference.fp8_param``).

        This happens once for each microbatch.
        """
        return self._bytes(3 * self.sizes.layer_weights)

    def _products(self, *names: str) -> float:
        sizes, precision = self.sizes, self.settings.precision
        peak, seconds = self.gpu.peak_flops(precision), 0.0
        for product in products(sizes.architecture):
            if names and product.name not in names:
                continue
            inputs = product.inputs / (1 if product.splits_outputs else sizes.tensor)
            outputs = product.outputs / (sizes.tensor if product.splits_outputs else 1)
            rate = peak * self.calibration.matmul(precision, min(sizes.tokens, inputs, outputs))
            seconds += 2 * sizes.tokens * inputs * outputs / rate
        return seconds

    def _row_products(self) -> float:
        """Return the seconds of the products with a few rows, which the reading of their weights takes."""
        weights = sum(product.weights for product in row_products(self.sizes.architecture))
        return self._moved(weights / self.sizes.tensor)

    def _attention(self) -> float:
        sizes = self.sizes
        # Each context-parallel rank of the ring contributes a part of the output. The parts are combined in fp32.
        joined = 12 * sizes.context if sizes.context > 1 else 0
        joining = self._bytes(joined * sizes.tokens * sizes.architecture.query_projection_size / sizes.tensor)
        scores = layer_scores(self.config.model, sizes, self.settings.precision)
        row = attention_forward(sizes.architecture, sizes.seq_length, causal=not scores)
        flops = sizes.rows * row / sizes.context / sizes.tensor
        # Without a fused kernel, the scores and their probabilities are written and read.
        joining += self._bytes(4 * scores)
        return flops / (self._half_peak() * self.calibration.attention_efficiency) + joining

    def _head_product(self) -> float:
        sizes, hidden = self.sizes, self.sizes.architecture.hidden_size
        rows = self._chunk_size() if self.head_in_tiles else math.inf
        side = min(sizes.image_tokens, rows, hidden)
        rate = self._half_peak() * self.calibration.matmul("bf16", max(side, 1))
        return 2 * sizes.image_tokens * hidden * sizes.words / rate

    def _half_peak(self) -> float:
        """Return the peak FLOP/s of the products that FP8 leaves in bf16."""
        return self.gpu.peak_flops("fp32" if self.settings.precision == "fp32" else "bf16")

    def _elementwise(self) -> float:
        sizes, architecture = self.sizes, self.sizes.architecture
        sharing = sizes.tensor if self.config.parallel.sequence_parallel else 1
        hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
        if architecture.scales:
            moved = moved_by_layer(hidden, sizes.tensor, sharing)
        else:
            moved = self._moved_by_decoder(sharing)
        moved += self._moved_by_mlp()
        if self.settings.precision == "fp8":
            # The input of each product is read. It is written in FP8 twice, once transposed.
            moved += 2 * (2 * hidden + architecture.query_projection_size + ffn) / sizes.tensor
        return self._moved(sizes.tokens * moved)

    def _moved_by_decoder(self, sharing: int) -> float:
        """Return how many numbers a token's norms, residual sums and rotary positions read and write."""
        architecture = self.sizes.architecture
        hidden = architecture.hidden_size
        queries_and_keys = architecture.query_projection_size + architecture.kv_projection_size
        # Two norms (read, write) and two residual sums (two reads, a write).
        moved = 10 * hidden / sharing
        # Rotary positions: a fused kernel reads and writes once. Other kernels do so about four times. Norms of queries
        # and keys read and write once more.
        passes = (2 if self._fuses_rotary() else 8) + (2 if architecture.qk_layernorm else 0)
        return moved + passes * queries_and_keys / self.sizes.tensor

    def _moved_by_mlp(self) -> float:
        """Return how many numbers a token's activation reads and writes."""
        # SwiGLU: the gate and the value are read. Their product is written. Else: a bias is added, and GELU.
        tensors = 4 if self.sizes.architecture.scales else 3
        return tensors * self.sizes.architecture.ffn_hidden_size / self.sizes.tensor

    def _accumulation(self) -> float:
        """Return the seconds to add a microbatch's weight gradients to Megatron's buffer.

        The sum is read and written.
        """
        fused = self.config.kernels.gradient_accumulation_fusion is True
        moved = 8 if fused else 8 + 2 * self.number_bytes
        return self._bytes(moved * self.sizes.layer_weights)

    def _fuses_rotary(self) -> bool:
        return self.config.kernels.apply_rope_fusion is True

    def _moved(self, numbers: float) -> float:
        return self._bytes(self.number_bytes * numbers)

    def _bytes(self, moved: float) -> float:
        return moved / (self.gpu.memory_bandwidth * self.calibration.memory_efficiency)
