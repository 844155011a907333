"""Floating-point operations of a run, counted from its sizes: a multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from megatron_cca.config import Config, Precision
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models.architecture import Architecture
from megatron_cca.training.reference_settings import reference_settings, uses_reference_pass
from megatron_cca.training.shapes import head_support, rows_per_sample

# What is printed beside every MFU.
MFU_MEANS = (
    "MFU: FLOPs of the policy's forward and backward and, where a step computes it, of the reference's forward, causal "
    "half of attention, nothing recomputed, over what the peaks allow, each product's that of its own precision (with "
    "FP8 the layers' products; attention and LM head are bf16)."
)

# A flash kernel keeps no scores: backward computes them again and then four products, where forward has two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Product:
    """A projection of a layer: ``[tokens, inputs] @ [inputs, outputs]``.

    Attributes:
        name: Megatron's.
        inputs: summed over.
        outputs: columns.
        splits_outputs: whether tensor parallelism divides the outputs, or else the inputs.
    """

    name: str
    inputs: int
    outputs: int
    splits_outputs: bool

    @property
    def weights(self) -> int:
        """Numbers in its weight."""
        return self.inputs * self.outputs


@cache
def products(architecture: Architecture) -> tuple[Product, ...]:
    """The four projections of a layer."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    head = architecture.kv_channels
    qkv = (architecture.num_attention_heads + 2 * architecture.num_query_groups) * head
    return (
        Product("linear_qkv", hidden, qkv, splits_outputs=True),
        Product("linear_proj", hidden, hidden, splits_outputs=False),
        Product("linear_fc1", hidden, 2 * ffn, splits_outputs=True),
        Product("linear_fc2", ffn, hidden, splits_outputs=False),
    )


def products_forward(architecture: Architecture) -> float:
    """Of a layer's four projections, for one token."""
    return sum(2.0 * product.weights for product in products(architecture))


def attention_forward(architecture: Architecture, seq_length: int, *, causal: bool = True) -> float:
    """Of a layer's scores and their product with the values, for one row.

    Args:
        architecture: the sizes.
        seq_length: S.
        causal: count what a causal kernel computes, half of S x S; or all of it, as many counters do.
    """
    return 4.0 * seq_length**2 * architecture.hidden_size * (0.5 if causal else 1.0)


def head_forward(architecture: Architecture, image_tokens: int, words: int | None = None) -> float:
    """Of the LM head, for one row: only image tokens pass through it, and only true words are computed.

    Args:
        architecture: the sizes.
        image_tokens: of the row.
        words: that log-probabilities are normalised over; None is all that are predicted.
    """
    return 2.0 * image_tokens * architecture.hidden_size * (words or architecture.vocabulary.output_size)


def model_flops(config: Config, architecture: Architecture, workload: Workload, *, causal: bool = True) -> float:
    """What a sample needs: the policy's forward and backward and the reference's forward, nothing computed twice.

    With LoRA the frozen weights have no gradient; the adapters' own products, a hundredth, are left out.
    """
    return sum(flops_by_precision(config, architecture, workload, causal=causal).values())


def flops_by_precision(
    config: Config, architecture: Architecture, workload: Workload, *, causal: bool = True
) -> dict[Precision, float]:
    """:func:`model_flops` by what each product is computed in: with FP8 the layers' products alone are."""
    layers = architecture.num_layers * workload.seq_length * products_forward(architecture)
    head = head_forward(architecture, workload.image_tokens, len(head_support(config, architecture.vocabulary)))
    attention = architecture.num_layers * attention_forward(architecture, workload.seq_length, causal=causal)
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
            (others, products_passes * head + attention_passes * attention),
        ):
            found[one] = found.get(one, 0.0) + rows_per_sample(config) * flops
    return found


def average_peak(flops: dict[Precision, float], peak_of: Callable[[Precision], float]) -> float:
    """FLOP/s at which a device would do all of ``flops`` with each precision's at its own peak, one after the other.

    Args:
        flops: from :func:`flops_by_precision`.
        peak_of: a precision's peak in FLOP/s.
    """
    return sum(flops.values()) / sum(one / peak_of(precision) for precision, one in flops.items())


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation, the one definition of the project; :data:`MFU_MEANS` says it in words.

    Args:
        flops: of a GPU in ``seconds``, from :func:`model_flops`.
        seconds: measured or predicted.
        peak: the GPU's, from :func:`average_peak`.
    """
    return flops / seconds / peak
