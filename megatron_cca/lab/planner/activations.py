"""Bytes of a forward and backward pass on one rank: kept tensors and working memory of the layers and the head.

``tests/distributed/test_dry_run.py`` compares them with the count of the dry run. What one layer keeps depends on its
kind: ``layers.py``, ``next_scale.py``. The head is ``parallel/sequence_logps.py``: hidden states, three numbers for
each token, and a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cca.config import Config, ModelConfig, Precision
from megatron_cca.lab.planner.layers import FP32, DecoderLayer, LayerShape
from megatron_cca.lab.planner.next_scale import ModulatedLayer
from megatron_cca.lab.planner.parameters import architecture_of
from megatron_cca.lab.planner.sizes import Sizes
from megatron_cca.models.architecture import Architecture, keeps_scores
from megatron_cca.parallel.tiles import block_width, chunk_size_of, tile_sizes


def layer_shape(config: Config, sizes: Sizes, size: int, *, fuses_norms: bool, fuses_swiglu: bool) -> LayerShape:
    """Return the sizes of a layer of the run.

    Args:
        config, sizes: of the run.
        size: bytes of one element.
        fuses_norms, fuses_swiglu: whether a fused kernel computes a decoder's norms, and its SwiGLU.
    """
    architecture, tensor = architecture_of(config.model), sizes.tensor
    common = {
        "size": size,
        "tokens": sizes.tokens,
        "shared": sizes.tokens / (tensor if config.parallel.sequence_parallel else 1),
        "hidden": architecture.hidden_size,
        "channels": architecture.query_projection_size / tensor,
        "ffn": architecture.ffn_hidden_size / tensor,
        "heads": architecture.num_attention_heads / tensor,
    }
    if architecture.scales:
        return ModulatedLayer(
            **common,
            rows=sizes.rows,
            features=architecture.feature_channels,
            trains_weights=config.lora.dim is None,
        )
    return DecoderLayer(
        **common,
        keys=2 * architecture.kv_projection_size / tensor,
        groups=architecture.num_query_groups / tensor,
        norms_heads=architecture.qk_layernorm,
        rotary=sizes.seq_length / sizes.context * architecture.kv_channels,
        context=sizes.context,
        scores=layer_scores(config.model, sizes, "fp32" if size == FP32 else "bf16"),
        fuses_norms=fuses_norms,
        fuses_swiglu=fuses_swiglu,
    )


def layer_scores(model: ModelConfig, sizes: Sizes, precision: Precision) -> float:
    """Return the bytes of the scores ``[rows, heads, S, S]`` that a layer keeps for backward.

    They are 0 where the attention is fused, and for next-scale prediction, which has an attention of its own.
    """
    if sizes.architecture.scales or not keeps_scores(model, sizes.architecture, precision):
        return 0.0
    number = FP32 if precision == "fp32" else FP32 // 2
    return number * sizes.rows * sizes.architecture.num_attention_heads / sizes.tensor * sizes.seq_length**2


def chunk_kept(shape: LayerShape, config: Config, layers: int) -> float:
    """Return the bytes that ``layers`` layers and their input keep of a microbatch, with the run's recomputation."""
    training = config.training
    whole, inputs = shape.kept(), shape.stream + shape.inputs_kept()
    if training.recompute_granularity == "full":
        group = training.recompute_num_layers
        if training.recompute_method == "block":
            recomputed = min(group, layers)
            return inputs + recomputed * shape.stream + (layers - recomputed) * whole
        return inputs + shape.stream * -(-layers // group)
    if training.recompute_granularity == "selective":
        whole -= _selectively_recomputed(shape, config)
    return inputs + layers * whole


def _selectively_recomputed(shape: LayerShape, config: Config) -> float:
    modules = config.training.recompute_modules
    attention = shape.softmax_kept() if "core_attn" in modules else 0
    return attention + (shape.mlp_kept() if "mlp" in modules else 0)


def recomputed_at_once(shape: LayerShape, config: Config, layers: int) -> float:
    """Return the bytes that recomputation restores during the backward of one of its groups."""
    training = config.training
    if training.recompute_granularity == "full":
        group = min(training.recompute_num_layers, layers)
        if training.recompute_method == "block":
            # The layers without recomputation come last. Their backward runs first.
            return shape.kept() if group == layers else 0
        return group * shape.kept() - shape.stream
    return _selectively_recomputed(shape, config) if training.recompute_granularity == "selective" else 0


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
        is_mixed: whether the two rows of a sample are mixed into one (``parallel/mixed_logps.py``).
        is_of_images: whether it begins with a layer of its own (``models/image_head.py``).
    """

    layer: LayerShape
    selected: float
    rows: float
    width: float
    on_gpu: bool
    is_padded: bool
    is_gathered: bool
    is_mixed: bool
    is_of_images: bool

    @property
    def half(self) -> float:
        """Bytes of the hidden states of half the rows, with all their positions. 0 where no rows are mixed."""
        return self.layer.whole / 2 if self.is_mixed else 0

    @property
    def constant(self) -> float:
        """Bytes of what is added to the image tokens' hidden states. 0 where no rows are mixed."""
        return self.layer.size * self.selected * self.layer.hidden if self.is_mixed else 0


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
        is_mixed=config.objective.conditional_share is not None,
        is_of_images=sizes.architecture.image_embedding_channels > 0,
    )


def _runs_over(config: Config, sizes: Sizes, multiple: int) -> bool:
    """Check whether the last tile of some rank has rows that do not count."""
    is_whole = config.objective.normalization == "vocabulary"
    return (sizes.architecture.vocabulary.output_size if is_whole else math.ceil(sizes.words)) % multiple > 0


def head_kept(head: HeadShape) -> float:
    """Return the bytes that the head keeps for backward.

    These are the final norm, the whole hidden states and, for each image token, its position, id, largest logit and
    sum. A mixture keeps both of its parts, not the whole hidden states that it is made of. A head of images keeps what
    its GELU takes and gives.
    """
    layer = head.layer
    own = 2 * layer.stream if head.is_of_images else 0
    hidden = layer.whole if head.is_gathered else 0
    hidden = head.half + head.constant if head.is_mixed else hidden
    return layer.norm_kept() + own + hidden + (2 * INT64 + 2 * FP32) * head.selected


def embedding_kept(architecture: Architecture, layer: LayerShape) -> float:
    """Return the bytes that the embedding of a microbatch keeps for backward.

    That of images keeps, for every token, what its GELU takes and gives, the small embedding, and where codes are.
    """
    channels = architecture.image_embedding_channels
    if not channels:
        return 0.0
    tokens = layer.stream / (layer.size * layer.hidden)
    return 2 * layer.stream + tokens * (layer.size * channels + INT64 + 1)


def head_forward(head: HeadShape) -> float:
    """Return the bytes alive while the forward computes its tiles."""
    selected = head.layer.size * head.selected * head.layer.hidden
    # The hidden states that are mixed, and the constant with all positions.
    mixed = head.layer.whole + head.half if head.is_mixed else 0
    return mixed + selected + FP32 * head.rows * head.width + _operands(head) + 5 * FP32 * head.selected


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
    at_end = (head.half or layer.whole) + is_half * layer.size * head.selected * layer.hidden
    # Where products do not add to an fp32 sum in place, the tile is one allocation, which lives to the end.
    is_held = not (is_half and head.on_gpu)
    working = tile + max(at_tile, at_end) if is_held else max(tile + at_tile, at_end)
    at_tokens = selected + head.constant + gradient + working + 3 * FP32 * head.selected
    # Thereafter the gradient of one part, the same times its share, and both rows' again.
    return max(at_tokens, 2 * layer.whole) if head.is_mixed else at_tokens


def _operands(head: HeadShape) -> float:
    """Return the bytes of the fp32 copies that a CPU makes of the factors of a half-precision product.

    They are 0 on a GPU and in fp32.
    """
    if head.on_gpu or head.layer.size == FP32:
        return 0
    return FP32 * head.layer.hidden * (head.rows + head.width)
