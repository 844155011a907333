"""Memory of the 8B model and its frozen reference on one GPU, computed from its shapes, without activations."""

from __future__ import annotations

from megatron_cca.config import ModelConfig
from megatron_cca.lab import markdown_table
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.num_parameters import num_parameters

WEIGHT = {"fp32": 4, "bf16": 2}
# Besides the weight: the fp32 gradient, the fp32 master weight if the weight is not fp32, and Adam's two fp32 moments.
TRAINED = {"fp32": 4 + 8, "bf16": 4 + 4 + 8}
LORA_DIM = 16


def computed_table() -> str:
    """Return a table of GiB by strategy and precision.

    Ratios are to the same policy without a reference.
    """
    header = ["reference", *(f"{name}{part}" for name in WEIGHT for part in (", GiB", ", ratio"))]
    rows = []
    for policy, references in (("", _FULL), ("LoRA, ", _LORA)):
        for name, beside in references.items():
            cells = [policy + name]
            for precision in WEIGHT:
                plain = _policy(precision, is_lora=bool(policy))
                total = plain + beside(precision)
                cells += [f"{total / 2**30:.1f}", f"{total / plain:.3f}"]
            rows.append(cells)
    return markdown_table(header, rows)


def _architecture() -> Architecture:
    return resolve_architecture(ModelConfig(name="emu3-8b"))


def _policy(precision: str, *, is_lora: bool) -> int:
    weights = num_parameters(_architecture())
    trained = _lora_weights() if is_lora else weights
    return weights * WEIGHT[precision] + trained * TRAINED[precision] + is_lora * trained * WEIGHT[precision]


def _lora_weights() -> int:
    sizes = _architecture()
    return sizes.num_layers * LORA_DIM * sum(rows + columns for rows, columns in _projections(sizes))


def _projections(sizes: Architecture) -> list[tuple[int, int]]:
    """Return rows and columns of a layer's four projections."""
    width, ffn = sizes.hidden_size, sizes.ffn_hidden_size
    qkv = width // sizes.num_attention_heads * (sizes.num_attention_heads + 2 * sizes.num_query_groups)
    return [(qkv, width), (width, width), (2 * ffn, width), (width, ffn)]


def _resident(precision: str) -> int:
    return num_parameters(_architecture()) * WEIGHT[precision]


def _resident_in_fp8(precision: str) -> int:
    sizes = _architecture()
    vocabulary = sizes.vocabulary.size
    matrices = [(vocabulary, sizes.hidden_size), *_projections(sizes) * sizes.num_layers]
    in_fp8 = sum(rows * columns for rows, columns in matrices)
    scales = 4 * sum(rows for rows, _ in matrices)
    return in_fp8 + scales + (num_parameters(sizes) - in_fp8) * WEIGHT[precision]


def _offloaded(precision: str) -> int:
    """Return the most bytes that are on the device at the same time.

    These are the last layer and the LM head, or the embedding and the first layer.
    """
    sizes = _architecture()
    layer = sum(rows * columns for rows, columns in _projections(sizes))
    return (layer + sizes.vocabulary.size * sizes.hidden_size) * WEIGHT[precision]


def _nothing(precision: str) -> int:
    return 0


_FULL = {
    "none (next-token)": _nothing,
    "resident": _resident,
    "resident, weights in FP8": _resident_in_fp8,
    "offload, while its pass runs": _offloaded,
    "cached": _nothing,
}
_LORA = {"none (next-token)": _nothing, "resident": _resident, "shared": _nothing}
