"""The sizes of a decoder-only model, the layouts that it can have, and its core attention. Needs no torch.

Transformer Engine computes attention with FlashAttention or cuDNN. Neither ever holds the ``S x S`` scores in memory.
If neither supports a case, Transformer Engine computes it unfused: with scores in memory, without context parallelism.
In these cases torch's ``scaled_dot_product_attention`` is better. It pads heads to a multiple of 8, and computes fp32
in tiles, too. The other layers are still Transformer Engine's. FP8 products, CUDA graphs and overlaps do not depend on
the core attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_cca.config import ModelConfig, ParallelConfig, Precision
from megatron_cca.errors import UserError
from megatron_cca.models.image_vocabulary import Vocabulary

# FlashAttention 2 to 4 and cuDNN all support these heads in training, on any GPU since Ampere. Support of larger heads
# depends on GPU and versions: get_attention_backend, nvte_get_fused_attn_backend of Transformer Engine 2.11 to 2.20.
_MULTIPLE, _LARGEST = 8, 128

# Keys of the section ``model`` that not every family's layers and files have a place for.
ATTENTION_OPTIONS = ("kv_channels", "qk_layernorm", "add_qkv_bias")


@dataclass(frozen=True)
class Architecture:
    """Sizes with Megatron's names, and the vocabulary, which gives token ids their meaning.

    Attributes:
        vocabulary: the vocabulary of all ids.
        image_embedding_channels: channels of the codes' embeddings, for models whose images have an embedding and a
            head of their own beside the words', see ``image_head.py``. 0 where codes are words like others.
        kv_channels: channels of an attention head. None stands for :attr:`usual_kv_channels`, and becomes that number.
        qk_layernorm: whether each layer has an RMSNorm of queries and one of keys, over the channels of a head.
        add_qkv_bias: whether queries, keys and values have biases where no other projection has. Models of next-scale
            prediction have biases everywhere.
        position_embedding: ``rope``, positions along the row, ``rope_2d``, positions on the square grid of the image,
            or ``learned``, a vector for each position.
        prefix_tokens: number of tokens before the codes of the image under ``rope_2d``. They have no place on the grid.
        scales: the sides of the pyramid's grids for next-scale prediction, see ``next_scale.py``. Empty for models that
            predict the next token.
        feature_channels: channels of the pyramid's features, which are the inputs of next-scale prediction.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    vocabulary: Vocabulary
    position_embedding: Literal["rope", "rope_2d", "learned"] = "rope"
    prefix_tokens: int = 0
    scales: tuple[int, ...] = ()
    feature_channels: int = 0
    image_embedding_channels: int = 0
    kv_channels: int | None = None
    qk_layernorm: bool = False
    add_qkv_bias: bool = False

    def __post_init__(self) -> None:
        """Write out the size of a head."""
        if self.kv_channels is None:
            object.__setattr__(self, "kv_channels", self.usual_kv_channels)

    @property
    def usual_kv_channels(self) -> int:
        """Channels of a head of models whose heads together are as wide as the residual stream."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_options(self) -> dict[str, int]:
        """What the attention has beside that of plain models, by key of the section ``model``; empty for plain ones."""
        usual = {"kv_channels": self.usual_kv_channels}
        return {key: getattr(self, key) for key in ATTENTION_OPTIONS if getattr(self, key) != usual.get(key, False)}

    @property
    def num_words(self) -> int:
        """The number of ids that the table of words has rows for."""
        vocabulary = self.vocabulary
        return vocabulary.size - (vocabulary.output_size if self.image_embedding_channels else 0)

    @property
    def query_projection_size(self) -> int:
        """Channels of all query heads together, which are also those of the attention's output."""
        return self.kv_channels * self.num_attention_heads

    @property
    def kv_projection_size(self) -> int:
        """Channels of all key heads together."""
        return self.kv_channels * self.num_query_groups


def with_overrides(preset: Architecture, config: ModelConfig) -> Architecture:
    """Return the preset with every size that ``config`` sets.

    Raises:
        UserError: the heads do not divide the hidden size, the groups do not divide the heads, the positions are not
            the square grid that the model needs, or the sizes of the vocabulary do not fit each other.
    """
    names = {field.name for field in fields(config)}
    given = {field.name: getattr(config, field.name) for field in fields(preset) if field.name in names}
    given = {name: value for name, value in given.items() if value is not None}
    own_channels = None if preset.kv_channels == preset.usual_kv_channels else preset.kv_channels
    architecture = replace(preset, **{"kv_channels": own_channels, **given})
    architecture = replace(architecture, vocabulary=_vocabulary(preset.vocabulary, config))
    heads = architecture.num_attention_heads
    if config.kv_channels is None and own_channels is None:
        _must_divide("model.num_attention_heads", heads, "hidden_size", architecture.hidden_size)
    _must_divide("model.num_query_groups", architecture.num_query_groups, "num_attention_heads", heads)
    channels = architecture.kv_channels
    if architecture.scales:
        from megatron_cca.models.pyramid import check_sizes

        check_sizes(architecture, preset)
    elif channels % 2:
        raise UserError(f"{_channels_in_words(architecture, config)}; rotary embedding needs an even number")
    if architecture.position_embedding == "rope_2d":
        _check_grid(architecture, config)
    return architecture


def grid_side(architecture: Architecture) -> int:
    """Return the side of the square of codes that ``rope_2d`` has positions for."""
    return math.isqrt(max(0, architecture.max_position_embeddings - architecture.prefix_tokens))


def with_explicit_sizes(config: ModelConfig, architecture: Architecture) -> ModelConfig:
    """Return the same model with every size written out. Then a later change of the preset does not change it."""
    shared = {field.name for field in fields(config)} & {field.name for field in fields(architecture)}
    sizes = {name: getattr(architecture, name) for name in shared}
    # Null is what they are in plain models, and in the files of versions without these keys.
    sizes |= {name: architecture.attention_options.get(name) for name in ATTENTION_OPTIONS}
    vocabulary = architecture.vocabulary
    if getattr(vocabulary, "num_classes", None) is not None:
        sizes |= {"codebook_size": vocabulary.codebook_size, "num_classes": vocabulary.num_classes}
    return replace(config, vocab_size=vocabulary.size, **sizes)


def padded_vocab_size(architecture: Architecture, model: ModelConfig, tensor_model_parallel_size: int) -> int:
    """Return the number of rows of the embedding, and of the LM head where codes are words.

    This is ``model.padded_vocab_size`` if it is set, else the next multiple that tensor parallelism can split.
    """
    if model.padded_vocab_size is not None:
        return model.padded_vocab_size
    return _padded(architecture.num_words, model, tensor_model_parallel_size)


def padded_output_size(architecture: Architecture, model: ModelConfig, tensor_model_parallel_size: int) -> int:
    """Return the number of rows of the LM head."""
    if not architecture.image_embedding_channels:
        return padded_vocab_size(architecture, model, tensor_model_parallel_size)
    return _padded(architecture.vocabulary.output_size, model, tensor_model_parallel_size)


def _padded(rows: int, model: ModelConfig, tensor_model_parallel_size: int) -> int:
    multiple = model.make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-rows // multiple) * multiple


def sequence_multiple(parallel: ParallelConfig, bucket: int) -> int:
    """Return the number that must divide the length of rows, so that all ranks have parts of equal length.

    Args:
        parallel: the layout.
        bucket: ``data.pad_to_multiple_of``.
    """
    # A context-parallel rank has two pieces, an early and a late one, for equal work under a causal mask.
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    return math.lcm(context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1), bucket)


def longest_row(architecture: Architecture, multiple: int) -> int:
    """Return the largest number of positions in a row, with the padding up to a multiple of ``multiple``.

    Padding after a grid needs no positions of the model, because no token attends to it. With ``rope`` it needs them.
    """
    positions = architecture.max_position_embeddings
    return positions if architecture.position_embedding == "rope" else -(-positions // multiple) * multiple


def check_layout(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that the model cannot have.

    Raises:
        UserError: a parallel size does not fit. Names the size, what it must divide, and the possible sizes.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    padded = padded_vocab_size(architecture, model, tp)
    if padded < architecture.num_words:
        raise UserError(f"model.padded_vocab_size: {padded} is less than the vocabulary of {architecture.num_words}")
    for name, size in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_query_groups", architecture.num_query_groups),
        ("ffn_hidden_size", architecture.ffn_hidden_size),
        ("padded_vocab_size", padded),
    ):
        _must_divide("parallel.tensor_model_parallel_size", tp, name, size)
    _must_divide("parallel.pipeline_model_parallel_size", pp, "num_layers", architecture.num_layers)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if chunks > 1 and pp == 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size: needs parallel.pipeline_model_parallel_size of 2 or more, "
            "found 1"
        )
    per_rank = architecture.num_layers // pp
    _must_divide("parallel.virtual_pipeline_model_parallel_size", chunks, "the layers of a pipeline rank,", per_rank)
    if architecture.scales:
        from megatron_cca.models.pyramid import check_next_scale_layout

        check_next_scale_layout(model, parallel)
    if parallel.sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel: needs parallel.tensor_model_parallel_size of 2 or more, found 1")


def only_grid(architecture: Architecture) -> tuple[int, int] | None:
    """Return height and width of the only grid that a model has positions for. None where it takes any grid."""
    if architecture.scales:
        # The codes of a pyramid are one row, scale by scale.
        return 1, sum(side**2 for side in architecture.scales)
    if architecture.position_embedding != "rope_2d":
        return getattr(architecture.vocabulary, "only_grid", None)
    side = grid_side(architecture)
    return side, side


def grid_misfit(architecture: Architecture, frames: int, height: int, width: int) -> str | None:
    """Return why a model cannot take images of such a grid, and what would help. None if it can."""
    own = only_grid(architecture)
    if own is None or (frames, height, width) == (1, *own):
        return None
    found = f"{height} x {width} codes" if frames == 1 else f"{frames} frames of {height} x {width} codes"
    if architecture.scales:
        return (
            f"{found}, the model takes the {own[1]} codes of grids of {', '.join(map(str, architecture.scales))} alone"
        )
    wanted = f"{found}, the model takes {own[0]} x {own[1]} alone"
    if frames == 1 and height == width and architecture.position_embedding == "rope_2d":
        return f"{wanted}; model.max_position_embeddings {architecture.prefix_tokens + height * width} is for such"
    return wanted


def unfused_because(channels: int, precision: Precision) -> str | None:
    """Return why Transformer Engine has no fused attention for heads of ``channels``. None if it has."""
    if precision == "fp32":
        return "fp32"
    if channels % _MULTIPLE:
        return f"heads of {channels} channels, no multiple of {_MULTIPLE}"
    if channels > _LARGEST:
        return f"heads of {channels} channels, more than {_LARGEST}"
    return None


def has_engine_attention(transformer_impl: str, channels: int, precision: Precision) -> bool:
    """Return whether a model uses Transformer Engine's core attention if Transformer Engine is installed.

    Args:
        transformer_impl: ``model.transformer_impl``. With ``auto``, only fused attention is used.
        channels: number of channels of a head.
        precision: precision of the computation.
    """
    if transformer_impl == "auto":
        return unfused_because(channels, precision) is None
    return transformer_impl == "transformer_engine"


def keeps_scores(model: ModelConfig, architecture: Architecture, precision: Precision) -> bool:
    """Return whether each layer of such a model keeps its ``S x S`` scores for backward."""
    channels = architecture.kv_channels
    is_unfused = unfused_because(channels, precision) is not None
    return is_unfused and has_engine_attention(model.transformer_impl, channels, precision)


def _vocabulary(preset: Vocabulary, config: ModelConfig) -> Vocabulary:
    if config.codebook_size is None and config.num_classes is None:
        return preset if config.vocab_size in (None, preset.size) else Vocabulary(config.vocab_size)
    vocabulary = preset.resized(config.codebook_size, config.num_classes)
    if config.vocab_size not in (None, vocabulary.size):
        raise UserError(
            f"model.vocab_size: {config.vocab_size}, but model.codebook_size and model.num_classes make it "
            f"{vocabulary.size}; leave it out"
        )
    return vocabulary


def _check_grid(architecture: Architecture, config: ModelConfig) -> None:
    positions, prefix = architecture.max_position_embeddings, architecture.prefix_tokens
    side = grid_side(architecture)
    if side < 1 or prefix + side**2 != positions:
        nearest = sorted({prefix + max(1, side) ** 2, prefix + (side + 1) ** 2})
        raise UserError(
            f"model.max_position_embeddings: {positions} is not {prefix} and a square, the grid of an image; the "
            f"nearest that are: {', '.join(map(str, nearest))}; 16x16 codes take {prefix + 256}, 24x24 {prefix + 576}"
        )
    if architecture.kv_channels % 4:
        raise UserError(
            f"{_channels_in_words(architecture, config)}; rotary embedding over a grid needs a multiple of 4, half of "
            "them for each axis"
        )


def _channels_in_words(architecture: Architecture, config: ModelConfig) -> str:
    """Return the beginning of a message about the channels of a head, with the key that they come from."""
    if config.kv_channels is not None:
        return f"model.kv_channels: {config.kv_channels} channels of a head"
    heads = architecture.num_attention_heads
    return f"model.num_attention_heads: {heads} heads have {architecture.kv_channels} channels each"


def _must_divide(key: str, divisor: int, name: str, size: int) -> None:
    if size % divisor:
        possible = ", ".join(str(n) for n in range(1, min(size, 128) + 1) if size % n == 0)
        raise UserError(f"{key}: {divisor} does not divide {name} {size}; possible: {possible}")
