"""The work of a run's step: its rows and microbatches, and its floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from megatron_cca.config import Config, Precision
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, grid_misfit, longest_row, sequence_multiple
from megatron_cca.training import head_support, reference_settings, rows_per_sample, uses_reference_pass

# Printed beside every MFU.
MFU_MEANS = (
    "MFU: FLOPs of the policy's forward and backward and, where a step computes it, of the reference's forward, of "
    "attention what a position sees (the causal half; in next-scale prediction its own scale and smaller ones), "
    "nothing recomputed, over what the peaks allow, each product's that of its own precision (with FP8 the layers' "
    "products; attention and LM head are bf16)."
)
# A flash kernel does not keep the scores. Backward computes them again and then four products. Forward has two
# products.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Workload:
    """The rows of a microbatch, which are all alike.

    Attributes:
        seq_length: S, the positions of a row, padding included.
        image_tokens: the positions whose targets are image tokens; only they pass through the LM head.
    """

    seq_length: int
    image_tokens: int


@dataclass(frozen=True)
class ImageShape:
    """The shape of the training images and of their captions.

    Attributes:
        height, width: the grid of visual tokens.
        caption_tokens: tokens of the longest caption.
    """

    height: int
    width: int
    caption_tokens: int


def image_workload(config: Config, shape: ImageShape) -> Workload:
    """Return the rows that a run has on such images.

    The layout and ``data.pad_to_multiple_of`` decide the padding.

    Raises:
        UserError: more positions than the model has, or a grid that does not suit the model's positions.
    """
    architecture = resolve_architecture(config.model)
    misfit = grid_misfit(architecture, 1, shape.height, shape.width)
    if misfit is not None:
        raise UserError(f"--image-grid: {misfit}")
    vocabulary = architecture.vocabulary
    # Count one token for each character. The tokenizer never merges digits.
    words = len(vocabulary.meta_text(1, shape.height, shape.width))
    ids = vocabulary.sequence_length(shape.caption_tokens, words, shape.height, shape.width)
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    # The last token is no input. Hence one less.
    seq_length = -(-(ids - 1) // multiple) * multiple
    limit = longest_row(architecture, multiple)
    if seq_length > limit:
        raise UserError(
            f"--image-grid: {shape.height}x{shape.width} with captions of {shape.caption_tokens} tokens needs "
            f"{seq_length} positions, model.max_position_embeddings is {limit}; raise that, or give smaller images"
        )
    return Workload(seq_length, shape.height * shape.width)


@dataclass(frozen=True)
class Product:
    """A projection of a layer: ``[tokens, inputs] @ [inputs, outputs]``.

    Attributes:
        name: Megatron's name of the projection.
        inputs: input features, over which the product sums.
        outputs: output features.
        splits_outputs: whether tensor parallelism divides the outputs; otherwise it divides the inputs.
    """

    name: str
    inputs: int
    outputs: int
    splits_outputs: bool

    @property
    def weights(self) -> int:
        """Number of elements in the weight."""
        return self.inputs * self.outputs


@cache
def products(architecture: Architecture) -> tuple[Product, ...]:
    """Return the four projections of a layer."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    heads = architecture.query_projection_size
    qkv = heads + 2 * architecture.kv_projection_size
    # SwiGLU takes two halves, the GELU of next-scale prediction one.
    halves = 1 if architecture.scales else 2
    return (
        Product("linear_qkv", hidden, qkv, splits_outputs=True),
        Product("linear_proj", heads, hidden, splits_outputs=False),
        Product("linear_fc1", hidden, halves * ffn, splits_outputs=True),
        Product("linear_fc2", ffn, hidden, splits_outputs=False),
    )


@cache
def row_products(architecture: Architecture) -> tuple[Product, ...]:
    """Return the products of a layer that are computed once for each row: the modulation by the class (AdaLN)."""
    hidden = architecture.hidden_size
    return (Product("modulation", hidden, 6 * hidden, splits_outputs=True),) if architecture.scales else ()


@cache
def head_row_products(architecture: Architecture) -> tuple[Product, ...]:
    """Return :func:`row_products` of the head."""
    hidden = architecture.hidden_size
    return (Product("final_modulation", hidden, 2 * hidden, splits_outputs=True),) if architecture.scales else ()


def attention_pieces(architecture: Architecture, seq_length: int) -> list[tuple[int, int]]:
    """Return the numbers of queries and of keys in each call of a layer's attention.

    The positions of a scale see their own scale and all smaller ones. Other models have one causal call.
    """
    if not architecture.scales:
        return [(seq_length, seq_length)]
    ends = accumulate(side**2 for side in architecture.scales)
    return [(side**2, end) for side, end in zip(architecture.scales, ends, strict=True)]


def products_forward(architecture: Architecture) -> float:
    """Return the forward FLOPs of a layer's four projections for one token."""
    return sum(2.0 * product.weights for product in products(architecture))


def attention_forward(architecture: Architecture, seq_length: int, *, causal: bool = True) -> float:
    """Return the FLOPs of a layer's attention scores and of their product with the values, for one row.

    Args:
        architecture: the sizes.
        seq_length: S, the positions of a row.
        causal: whether to count half of S x S, as a causal kernel computes; otherwise all of it, as many counters do.
            Next-scale prediction has no such half: the positions of a scale see each other.
    """
    scores = sum(queries * keys for queries, keys in attention_pieces(architecture, seq_length))
    return 4.0 * scores * architecture.query_projection_size * (0.5 if causal and not architecture.scales else 1.0)


def row_products_forward(architecture: Architecture) -> float:
    """Return the forward FLOPs of all products of the model that are computed once for each row."""
    of_layers, of_head = row_products(architecture), head_row_products(architecture)
    return 2.0 * (
        architecture.num_layers * sum(product.weights for product in of_layers)
        + sum(product.weights for product in of_head)
    )


def image_layers_forward(architecture: Architecture) -> float:
    """Return the forward FLOPs of the images' own layers for one token: two of the embedding, one of the head."""
    channels, hidden = architecture.image_embedding_channels, architecture.hidden_size
    return 2.0 * hidden * (channels + 2 * hidden) if channels else 0.0


def head_forward(architecture: Architecture, image_tokens: int, words: int | None = None) -> float:
    """Return the forward FLOPs of the LM head for one row.

    Only image tokens pass through the head. Rows that pad the vocabulary are not computed.

    Args:
        architecture: the sizes.
        image_tokens: number of image tokens in the row.
        words: number of ids that log-probabilities are normalised over; None means all that the head predicts.
    """
    return 2.0 * image_tokens * architecture.hidden_size * (words or architecture.vocabulary.output_size)


def model_flops(config: Config, architecture: Architecture, workload: Workload, *, causal: bool = True) -> float:
    """Return the FLOPs of one sample: forward and backward of the policy, and forward of the reference.

    Recomputation does not count. With LoRA the frozen weights have no gradient. The adapters' own products are about
    one percent and do not count.
    """
    return sum(flops_by_precision(config, architecture, workload, causal=causal).values())


def flops_by_precision(
    config: Config, architecture: Architecture, workload: Workload, *, causal: bool = True
) -> dict[Precision, float]:
    """Return :func:`model_flops` by the precision in which a product is computed.

    With FP8 only the layers' products are in FP8. What makes a pyramid's features is less than a thousandth and does
    not count.
    """
    layers = rows_per_sample(config) * architecture.num_layers * workload.seq_length * products_forward(architecture)
    head = head_forward(architecture, workload.image_tokens, len(head_support(config, architecture.vocabulary)))
    rows = rows_per_sample(config)
    # Megatron's own products, whatever the layers' precision. Rows that are mixed pass through the head as one.
    plain = config.objective.logps_per_sample * head + rows * row_products_forward(architecture)
    plain += rows * workload.seq_length * image_layers_forward(architecture)
    attention = rows * architecture.num_layers * attention_forward(architecture, workload.seq_length, causal=causal)
    # Forward, gradient of the inputs, gradient of the weights.
    passes = 3 if config.lora.dim is None else 2
    models = [(config.training.precision, passes, 3)]
    if uses_reference_pass(config):
        models.append((reference_settings(config).precision, 1, 1))
    found: dict[Precision, float] = {}
    for precision, products_passes, attention_passes in models:
        others: Precision = "fp32" if precision == "fp32" else "bf16"
        for one, flops in (
            (precision, products_passes * layers),
            (others, products_passes * plain + attention_passes * attention),
        ):
            found[one] = found.get(one, 0.0) + flops
    return found


def average_peak(flops: dict[Precision, float], peak_of: Callable[[Precision], float]) -> float:
    """Return the average peak in FLOP/s over the precisions of ``flops``.

    The device computes the precisions one after the other, each at its own peak.

    Args:
        flops: FLOPs by precision from :func:`flops_by_precision`.
        peak_of: returns the peak FLOP/s of a precision.
    """
    return sum(flops.values()) / sum(one / peak_of(precision) for precision, one in flops.items())


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Return the model FLOPs utilisation as a share of ``peak``.

    This is the project's only definition. :data:`MFU_MEANS` describes it.

    Args:
        flops: FLOPs of one GPU in ``seconds``, from :func:`model_flops`.
        seconds: measured or predicted time.
        peak: peak FLOP/s of the GPU, from :func:`average_peak`.
    """
    return flops / seconds / peak
