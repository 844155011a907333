"""Bytes of a forward and backward pass on one rank: kept tensors and working memory of the layers and the head.

Each term names tensors of Megatron's layers. ``tests/distributed/test_dry_run.py`` compares them with the count of the
dry run. Attention scores are kept only where Transformer Engine's attention is not fused
(``models/architecture.py``). The head is ``parallel/sequence_logps.py``: hidden states, three numbers for each token,
and a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config, ModelConfig, Precision
from megatron_cca.lab.planner.sizes import Sizes, architecture_of
from megatron_cca.models.architecture import keeps_scores
from megatron_cca.parallel.tiles import block_width, chunk_size_of, tile_sizes

FP32 = 4


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer on one rank.

    Attributes:
        size: bytes of one element in the precision of the computation.
        tokens: tokens of a microbatch on this rank.
        shared: tokens of norms and residuals, which sequence parallelism divides.
        hidden: hidden size of the model.
        queries, keys: this rank's channels of the queries; of the keys and values together.
        ffn: this rank's channels between fc1 and fc2.
        heads: attention heads on this rank.
        rotary: number of elements in a table of rotary positions.
        scores: bytes of a layer's attention scores if they are kept for backward; otherwise 0.
        fuses_norms, fuses_swiglu: whether a fused kernel computes it, which keeps no intermediate results.
    """

    size: int
    tokens: float
    shared: float
    hidden: int
    queries: float
    keys: float
    ffn: float
    heads: float
    rotary: float
    scores: float
    fuses_norms: bool
    fuses_swiglu: bool

    @property
    def stream(self) -> float:
        """Bytes of the hidden states between layers."""
        return self.size * self.shared * self.hidden


def layer_shape(config: Config, sizes: Sizes, size: int, *, fuses_norms: bool, fuses_swiglu: bool) -> LayerShape:
    """Return the sizes of a layer of the run.

    ``size`` is the bytes of one element.
    """
    architecture, tensor = architecture_of(config.model), sizes.tensor
    channels = architecture.kv_channels
    return LayerShape(
        size=size,
        tokens=sizes.tokens,
        shared=sizes.tokens / (tensor if config.parallel.sequence_parallel else 1),
        hidden=architecture.hidden_size,
        queries=architecture.hidden_size / tensor,
        keys=2 * architecture.num_query_groups * channels / tensor,
        ffn=architecture.ffn_hidden_size / tensor,
        heads=architecture.num_attention_heads / tensor,
        rotary=sizes.seq_length / sizes.context * channels,
        scores=layer_scores(config.model, sizes, "fp32" if size == FP32 else "bf16"),
        fuses_norms=fuses_norms,
        fuses_swiglu=fuses_swiglu,
    )


def layer_scores(model: ModelConfig, sizes: Sizes, precision: Precision) -> float:
    """Return the bytes of the scores ``[rows, heads, S, S]`` that a layer keeps for backward.

    They are 0 where the attention is fused.
    """
    if not keeps_scores(model, sizes.architecture, precision):
        return 0.0
    number = FP32 if precision == "fp32" else FP32 // 2
    return number * sizes.rows * sizes.architecture.num_attention_heads / sizes.tensor * sizes.seq_length**2


def norm_kept(shape: LayerShape) -> float:
    """Return the bytes that an RMSNorm keeps besides its input.

    These are its output and either a number for each token or, without a fused kernel, its intermediate results.
    """
    if shape.fuses_norms:
        return shape.stream + FP32 * shape.shared
    # In fp32: the normalised input. In bf16: the normalised input in fp32, and again in bf16.
    inner = 1 if shape.size == FP32 else 3
    return (1 + inner) * shape.stream + FP32 * shape.shared


def attention_kept(shape: LayerShape, context: int) -> float:
    """Return the bytes that the attention keeps.

    These are the output of linear_qkv (the values are a view of it), the rotated queries and keys, the context, and the
    logarithms of the softmax.
    """
    channels = (shape.queries + shape.keys) + (shape.queries + shape.keys / 2) + shape.queries
    gathered = shape.keys * context if context > 1 else 0
    tables = 4 * shape.size * shape.rotary
    return shape.size * shape.tokens * (channels + gathered) + _softmax_kept(shape) + tables


def _softmax_kept(shape: LayerShape) -> float:
    """Return the bytes that the softmax keeps.

    These are the scores or, with a fused kernel, one logarithm for each head and token.
    """
    return shape.scores or FP32 * shape.heads * shape.tokens


def mlp_kept(shape: LayerShape) -> float:
    """Return the bytes that the MLP keeps.

    These are both halves of fc1's output and the output of SwiGLU. Without a fused kernel, the activated half and the
    other half plus 0 are kept as well.
    """
    return shape.size * shape.tokens * shape.ffn * (3 if shape.fuses_swiglu else 5)


def layer_kept(shape: LayerShape, context: int) -> float:
    """Return the bytes that one layer keeps for backward without recomputation: its output, but not its input."""
    residuals = 2 * shape.stream
    return residuals + 2 * norm_kept(shape) + attention_kept(shape, context) + mlp_kept(shape)


def chunk_kept(shape: LayerShape, config: Config, layers: int, context: int) -> float:
    """Return the bytes that ``layers`` layers and their input keep of a microbatch, with the run's recomputation."""
    training = config.training
    whole = layer_kept(shape, context)
    if training.recompute_granularity == "full":
        group = training.recompute_num_layers
        if training.recompute_method == "block":
            recomputed = min(group, layers)
            return shape.stream + recomputed * shape.stream + (layers - recomputed) * whole
        return shape.stream * (1 + -(-layers // group))
    if training.recompute_granularity == "selective":
        whole -= _selectively_recomputed(shape, config)
    return shape.stream + layers * whole


def _selectively_recomputed(shape: LayerShape, config: Config) -> float:
    modules = config.training.recompute_modules
    attention = _softmax_kept(shape) if "core_attn" in modules else 0
    return attention + (mlp_kept(shape) if "mlp" in modules else 0)


def recomputed_at_once(shape: LayerShape, config: Config, layers: int, context: int) -> float:
    """Return the bytes that recomputation restores during the backward of one of its groups."""
    training = config.training
    if training.recompute_granularity == "full":
        group = min(training.recompute_num_layers, layers)
        if training.recompute_method == "block":
            # The layers without recomputation come last. Their backward runs first.
            return layer_kept(shape, context) if group == layers else 0
        return group * layer_kept(shape, context) - shape.stream
    return _selectively_recomputed(shape, config) if training.recompute_granularity == "selective" else 0


def layer_backward(shape: LayerShape, config: Config) -> float:
    """Return the bytes alive in the backward of a layer, besides what it kept.

    The largest of three moments counts: fc2, SwiGLU, and attention without a fused kernel.
    """
    whole = shape.size * shape.tokens * shape.hidden
    gathered = whole if config.parallel.sequence_parallel else 0
    inner = shape.size * shape.tokens * shape.ffn
    weight = shape.size * shape.hidden * shape.ffn if config.lora.dim is None else 0
    at_fc2 = shape.stream + gathered + inner + weight
    # The gradient from fc2 and the two gradients that SwiGLU computes from it. The input of fc2 is free by now.
    at_swiglu = shape.stream + 2 * inner
    # The gradients of the probabilities and of the scores.
    at_scores = shape.stream + 2 * shape.scores
    return max(at_fc2, at_swiglu, at_scores)


def layer_forward(shape: LayerShape, config: Config) -> float:
    """Return the bytes alive in a forward pass that keeps nothing.

    The larger of two moments counts: fc1 with SwiGLU, and attention without a fused kernel.
    """
    gathered = shape.size * shape.tokens * shape.hidden if config.parallel.sequence_parallel else 0
    inner = shape.size * shape.tokens * shape.ffn
    at_mlp = max(gathered + 2 * inner, (3 if shape.fuses_swiglu else 5) * inner)
    # The scores and the probabilities.
    return 2 * shape.stream + max(at_mlp, 2 * shape.scores)


def microbatches_in_flight(sizes: Sizes, pipeline_rank: int, group: int | None) -> int:
    """Return how many microbatches of a model chunk wait for their backward pass at the same time.

    Each chunk of a microbatch counts as one. The schedule is Megatron's 1F1B, or its interleaved one with
    ``microbatch_group_size_per_vp_stage`` equal to ``group``.
    """
    later = sizes.pipeline - pipeline_rank - 1
    if sizes.chunks == 1:
        return min(sizes.microbatches, later + 1)
    warm_up = 2 * later + (sizes.chunks - 1) * (group or sizes.pipeline)
    return min(sizes.microbatches * sizes.chunks, warm_up + 1)


INT64 = 8


@dataclass(frozen=True)
class HeadShape:
    """The LM head of one rank.

    Attributes:
        layer: the sizes of a layer.
        selected: image tokens of a microbatch on this rank.
        rows, width: sizes of a tile.
        on_gpu: whether half-precision products add to an fp32 sum in place. Transformer Engine does so, and torch 2.10
            or newer.
        is_padded: whether the last tile contains rows that pad the vocabulary.
        is_gathered: whether sequence parallelism gathers a whole copy of the hidden states.
    """

    layer: LayerShape
    selected: float
    rows: float
    width: float
    on_gpu: bool
    is_padded: bool
    is_gathered: bool


def head_shape(config: Config, sizes: Sizes, layer: LayerShape, *, on_gpu: bool) -> HeadShape:
    """Return the sizes of the run's LM head on one rank."""
    tiles, words = tile_sizes(on_gpu=on_gpu), math.ceil(sizes.words)
    return HeadShape(
        layer=layer,
        selected=sizes.image_tokens,
        rows=min(chunk_size_of(config.training.logps_chunk_size, on_gpu=on_gpu), sizes.image_tokens),
        width=min(block_width(words, tiles), words),
        on_gpu=on_gpu,
        is_padded=_runs_over(config, sizes, tiles.multiple),
        is_gathered=config.parallel.sequence_parallel,
    )


def _runs_over(config: Config, sizes: Sizes, multiple: int) -> bool:
    """Check whether the last tile of some rank has rows that do not count."""
    is_whole = config.objective.normalization == "vocabulary"
    return (sizes.architecture.vocabulary.output_size if is_whole else math.ceil(sizes.words)) % multiple > 0


def head_kept(head: HeadShape) -> float:
    """Return the bytes that the head keeps for backward.

    These are the final norm, the whole hidden states and, for each image token, its position, id, largest logit and
    sum.
    """
    layer = head.layer
    gathered = layer.size * layer.tokens * layer.hidden if head.is_gathered else 0
    return norm_kept(layer) + gathered + (2 * INT64 + 2 * FP32) * head.selected


def head_forward(head: HeadShape) -> float:
    """Return the bytes alive while the forward computes its tiles."""
    selected = head.layer.size * head.selected * head.layer.hidden
    return selected + FP32 * head.rows * head.width + _operands(head) + 5 * FP32 * head.selected


def head_backward(head: HeadShape) -> float:
    """Return the bytes alive in the backward of the head.

    The larger of two moments counts: a tile, and the end, when the whole gradient is returned. The gradient of the
    weight lies in Megatron's buffer. The tensor that is returned in its place holds no memory.
    """
    layer = head.layer
    selected, gradient = (size * head.selected * layer.hidden for size in (layer.size, FP32))
    is_half = layer.size != FP32
    tile, at_tile = FP32 * head.rows * head.width, _operands(head)
    if is_half:
        # The tile in half precision.
        at_tile += layer.size * head.rows * head.width if head.on_gpu else 0
    # A copy of the last tile's weight rows, in which the padding is 0.
    at_tile += layer.size * layer.hidden * head.width if head.is_padded else 0
    at_end = layer.size * (layer.tokens + is_half * head.selected) * layer.hidden
    # Where products do not add to an fp32 sum in place, the tile is one allocation, which lives to the end.
    is_held = not (is_half and head.on_gpu)
    working = tile + max(at_tile, at_end) if is_held else max(tile + at_tile, at_end)
    return selected + gradient + working + 3 * FP32 * head.selected


def _operands(head: HeadShape) -> float:
    """Return the bytes of the fp32 copies that a CPU makes of the factors of a half-precision product.

    They are 0 on a GPU and in fp32.
    """
    if head.on_gpu or head.layer.size == FP32:
        return 0
    return FP32 * head.layer.hidden * (head.rows + head.width)
