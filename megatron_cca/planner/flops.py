"""Floating-point operations of a run, counted from its sizes: a multiplication and an addition are two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megatron_cca.config import Config
from megatron_cca.models.architecture import Architecture
from megatron_cca.planner.workload import Workload
from megatron_cca.training.reference_settings import uses_reference_pass
from megatron_cca.training.shapes import head_support, rows_per_sample

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
    head = hidden // architecture.num_attention_heads
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
    layers, head = (
        architecture.num_layers * workload.seq_length * products_forward(architecture),
        head_forward(architecture, workload.image_tokens, len(head_support(config, architecture.vocabulary))),
    )
    attention = architecture.num_layers * attention_forward(architecture, workload.seq_length, causal=causal)
    # Forward, gradient of the inputs, gradient of the weights.
    passes = 3 if config.lora.dim is None else 2
    policy = passes * (layers + head) + 3 * attention
    reference = layers + attention + head if uses_reference_pass(config) else 0.0
    return rows_per_sample(config) * (policy + reference)
