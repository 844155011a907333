"""Bytes that a rank of a run holds, computed from its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_cca.config import Config
from megatron_cca.lab.planner import activations
from megatron_cca.lab.planner.layers import FP32, LayerShape
from megatron_cca.lab.planner.parameters import (
    Parameter,
    embedding_parameters,
    frozen_numbers,
    head_parameters,
    layer_parameters,
    rank_parameters,
    reference_parameters,
)
from megatron_cca.lab.planner.sizes import Sizes, gradient_numbers, optimizer_numbers, sizes_of
from megatron_cca.lab.planner.workload import Workload, products
from megatron_cca.training import has_own_weights, reference_settings, uses_reference_pass

GIB = 2**30
_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

# On a GPU, no tensor shows this memory: the CUDA context with its libraries; NCCL's buffers of each group with more
# than one rank; and what the allocator cannot reuse, as a share of the activations and the head. Assumed, not measured.
CUDA_CONTEXT = 3 * 2**28
NCCL_GROUP = 2**28
FRAGMENTATION = 0.05

# Transformer Engine keeps each FP8 weight twice: as it is, and for the transposed product.
_FP8_COPIES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at its peak; the parts add up to ``total``.

    Attributes:
        weights: the policy's parameters, in the precision of the computation, and its frozen tensors.
        reference: the part of the frozen model that its strategy keeps on the device.
        gradients: Megatron's gradient buffer.
        optimizer: this rank's share of the master weights and of Adam's moments.
        activations: what all microbatches in flight keep for backward, and the working memory of one layer.
        head: hidden states, statistics and tiles of the log-probabilities.
        communication: buffers of collectives and of messages between stages.
        overhead: the CUDA context, libraries, and memory that the allocator cannot use; 0 on a CPU.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    communication: int
    overhead: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_memory(
    config: Config,
    world_size: int,
    workload: Workload,
    *,
    on_gpu: bool = True,
    pipeline_rank: int | None = None,
    sharing_rank: int = 0,
) -> MemoryEstimate:
    """Return the bytes that a rank of the run holds at its peak.

    Args:
        config: configuration of the run; must have passed ``training.checks.check_new_run``.
        world_size: number of processes of the run.
        workload: the rows of a microbatch.
        on_gpu: whether to count the memory of a GPU (fused kernels, wide tiles, the CUDA context); otherwise that of a
            CPU.
        pipeline_rank: the pipeline rank; None means the one that holds most.
        sharing_rank: the rank among the data- and context-parallel ranks; the first holds most of the optimizer's
            state.
    """
    sizes = sizes_of(config, world_size, workload)
    stages = range(sizes.pipeline) if pipeline_rank is None else [pipeline_rank]
    estimates = [_Rank(config, sizes, workload, on_gpu, stage, sharing_rank).estimate() for stage in stages]
    return max(estimates, key=lambda one: one.total)


@dataclass(frozen=True)
class _Rank:
    """One rank, and the memory that it holds in the two passes of a step."""

    config: Config
    sizes: Sizes
    workload: Workload
    on_gpu: bool
    pipeline_rank: int
    sharing_rank: int

    def estimate(self) -> MemoryEstimate:
        held = {"weights": self._weights(), "gradients": self._gradients(), "optimizer": self._optimizer()}
        reference = self._reference()
        phases = [self._part(held | {"reference": reference} | self._policy_pass())]
        if uses_reference_pass(self.config):
            phases.append(self._part(held | self._reference_pass(reference)))
        return max(phases, key=lambda one: one.total)

    def _part(self, parts: dict[str, float]) -> MemoryEstimate:
        moving = parts["activations"] + parts["head"]
        overhead = CUDA_CONTEXT + FRAGMENTATION * moving if self.on_gpu else 0
        groups = (self.sizes.tensor, self.sizes.pipeline, self.sizes.context, self.sizes.data)
        buffers = NCCL_GROUP * sum(size > 1 for size in groups) if self.on_gpu else 0
        received = self._layer(self._size).stream if self.sizes.pipeline > 1 else 0
        parts = parts | {"overhead": overhead, "communication": buffers + received}
        return MemoryEstimate(**{name: round(value) for name, value in parts.items()})

    @property
    def _size(self) -> int:
        return 4 if self.config.training.precision == "fp32" else 2

    @property
    def _sharing_ranks(self) -> int:
        return self.sizes.data * self.sizes.context

    @property
    def _is_last(self) -> bool:
        return self.pipeline_rank == self.sizes.pipeline - 1

    def _weights(self) -> float:
        chunks = rank_parameters(self.config, self.pipeline_rank)
        numbers = sum(parameter.numel for chunk in chunks for parameter in chunk)
        frozen = FP32 * frozen_numbers(self.sizes.architecture)
        return numbers * self._size + frozen + (self._fp8_copies() if self.config.training.precision == "fp8" else 0)

    def _fp8_copies(self) -> float:
        of_a_layer = sum(product.weights for product in products(self.sizes.architecture)) / self.sizes.tensor
        return _FP8_COPIES * self.sizes.layers * of_a_layer

    def _gradients(self) -> float:
        size = FP32 if self.config.optimizer.grad_reduce_in_fp32 else self._size
        return size * gradient_numbers(self.config, self.pipeline_rank, self._sharing_ranks)

    def _optimizer(self) -> float:
        options = self.config.optimizer
        moments = _SIZES[options.exp_avg_dtype] + _SIZES[options.exp_avg_sq_dtype]
        if self.config.training.precision == "fp32":
            master = 0
        elif options.use_precision_aware_optimizer:
            master = _SIZES[options.main_params_dtype]
        else:
            master = FP32
        numbers = optimizer_numbers(self.config, self.pipeline_rank, self._sharing_ranks, self.sharing_rank)
        on_device = 1 - options.optimizer_offload_fraction if options.optimizer_cpu_offload else 1
        return numbers * (moments + master) * on_device

    def _reference(self) -> float:
        """Return the bytes that the reference holds during the whole step."""
        if not self.config.objective.needs_reference or not has_own_weights(self.config):
            return 0
        if self.config.reference.strategy == "offload":
            return 0
        parameters = reference_parameters(self.config, self.pipeline_rank)
        frozen = FP32 * frozen_numbers(self.sizes.architecture)
        return frozen + sum(self._reference_bytes(parameter) for parameter in parameters)

    def _reference_bytes(self, parameter: Parameter) -> float:
        size = _SIZES["fp32" if reference_settings(self.config).precision == "fp32" else "bf16"]
        if not (self.config.reference.fp8_param and _is_kept_in_fp8(parameter)):
            return parameter.numel * size
        return parameter.numel + FP32 * parameter.numel / parameter.columns

    def _layer(self, size: int) -> LayerShape:
        swiglu = self.config.kernels.bias_activation_fusion
        return activations.layer_shape(
            self.config,
            self.sizes,
            size,
            fuses_norms=self.on_gpu,
            fuses_swiglu=self.on_gpu if swiglu is None else swiglu,
        )

    def _policy_pass(self) -> dict[str, float]:
        config, sizes, layer = self.config, self.sizes, self._layer(self._size)
        layers = sizes.layers // sizes.chunks
        group = config.parallel.microbatch_group_size_per_vp_stage
        in_flight = activations.microbatches_in_flight(sizes, self.pipeline_rank, group)
        kept = in_flight * activations.chunk_kept(layer, config, layers)
        if self.pipeline_rank == 0 and config.lora.dim is None:
            kept += in_flight // sizes.chunks * activations.embedding_kept(sizes.architecture, layer)
        at_layer = activations.recomputed_at_once(layer, config, layers) + layer.backward(config)
        tokens = self._tokens()
        if not self._is_last:
            return {"activations": kept + tokens + at_layer, "head": 0}
        head = activations.head_shape(config, sizes, layer, on_gpu=self.on_gpu)
        waiting = in_flight // sizes.chunks * activations.head_kept(head)
        at_head = max(activations.head_forward(head), activations.head_backward(head))
        if at_head > at_layer:
            return {"activations": kept + tokens, "head": waiting + at_head}
        return {"activations": kept + tokens + at_layer, "head": waiting - activations.head_kept(head)}

    def _reference_pass(self, reference: float) -> dict[str, float]:
        size = 4 if reference_settings(self.config).precision == "fp32" else 2
        layer = self._layer(size)
        forward = layer.forward(self.config) + self._tokens()
        head = 0.0
        if self._is_last:
            shape = activations.head_shape(self.config, self.sizes, layer, on_gpu=self.on_gpu)
            head = activations.head_kept(shape) + activations.head_forward(shape)
        parts, (at_layer, at_head) = {"reference": reference}, self._passing_weights(size)
        if head + at_head > forward + at_layer:
            return parts | {"activations": self._tokens() + at_head, "head": head}
        return parts | {"activations": forward + at_layer, "head": 0}

    def _passing_weights(self, size: int) -> tuple[float, float]:
        """Return the bytes of the reference's weights that are on the device only during their use.

        Returns:
            During the use of a layer, and during that of the head.
        """
        if self.config.reference.strategy == "offload":
            return self._streamed_weights(size)
        if self.config.reference.fp8_param:
            parameters = reference_parameters(self.config, self.pipeline_rank)
            # The conversion from FP8 goes through fp32.
            passing = (size + 2 * FP32) * max((one.numel for one in parameters if _is_kept_in_fp8(one)), default=0)
            return passing, 0
        return 0, 0

    def _streamed_weights(self, size: int) -> tuple[float, float]:
        """Return :func:`_passing_weights` of streamed weights: those in use, and those that are used next."""
        layer, embedding, head = (
            size * sum(one.numel for one in of_a_part(self.config))
            for of_a_part in (layer_parameters, embedding_parameters, head_parameters)
        )
        embedding += FP32 * frozen_numbers(self.sizes.architecture)
        neighbours = [layer]
        neighbours += [embedding] if self.pipeline_rank == 0 else []
        neighbours += [head] if self._is_last else []
        # After the head, the next microbatch begins.
        return layer + max(neighbours), head + (embedding if self.pipeline_rank == 0 else layer)

    def _tokens(self) -> float:
        """Return the bytes of the ids and masks of all microbatches of a step."""
        return (activations.INT64 + 1) * self.sizes.microbatches * self.sizes.rows * self.workload.seq_length


def _is_kept_in_fp8(parameter: Parameter) -> bool:
    """Check whether ``reference.fp8_param`` keeps the parameter in FP8.

    ``models/frozen_weights.py`` leaves the norms and the LM head unchanged.
    """
    return parameter.columns is not None and parameter.name != "output_layer"
