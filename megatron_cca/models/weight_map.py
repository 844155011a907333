"""A declarative map between Megatron's global tensors and Hugging Face's. One table serves both directions.

Every rule lists the rows of Hugging Face tensors that make up one tensor of Megatron's, from top to bottom. Rows are
moved and never changed, so that an import followed by an export is bit-exact in any dtype. Keys are those of Megatron's
distributed checkpoints, where the tensors of the layers are stacked. Norms have Transformer Engine's names.

Other programs know no low-rank adapters: these are merged into their weights before. Nothing here needs Megatron.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_cca.config import LoraConfig
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture

# Names of a projection's A and B, in place of its own "weight". Megatron-Bridge has the same names.
LINEAR_IN, LINEAR_OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"
_MERGED_AT_A_TIME = 1024

# A dimension of one. In front of the rows, only Hugging Face's shape has it.
_ONE = "one"

_DIMENSIONS = {
    "vocab": lambda sizes: sizes.vocabulary.size,
    "output": lambda sizes: sizes.vocabulary.output_size,
    "input_only": lambda sizes: sizes.vocabulary.size - sizes.vocabulary.output_size,
    "hidden": lambda sizes: sizes.hidden_size,
    "ffn": lambda sizes: sizes.ffn_hidden_size,
    "query": lambda sizes: sizes.query_projection_size,
    "key": lambda sizes: sizes.kv_projection_size,
    "heads": lambda sizes: sizes.num_attention_heads,
    "channels": lambda sizes: sizes.kv_channels,
    # Of next-scale prediction: codes of an image, scales, positions of the first scale, channels of the features.
    "positions": lambda sizes: sizes.max_position_embeddings - sizes.prefix_tokens,
    "levels": lambda sizes: len(sizes.scales),
    "first": lambda sizes: sizes.scales[0] ** 2,
    "features": lambda sizes: sizes.feature_channels,
    # Of models whose images have an embedding of their own.
    "words": lambda sizes: sizes.num_words,
    "codes": lambda sizes: sizes.vocabulary.output_size,
    "image_channels": lambda sizes: sizes.image_embedding_channels,
    # Vectors of AdaLN for the head, and for a layer.
    "two_hidden": lambda sizes: 2 * sizes.hidden_size,
    "six_hidden": lambda sizes: 6 * sizes.hidden_size,
    _ONE: lambda sizes: 1,
}


@dataclass(frozen=True)
class Rows:
    """``count`` rows of the Hugging Face tensor ``name``, beginning at row ``start``."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class MappedTensor:
    """One tensor of Megatron's, or one layer of a stacked tensor, and where its rows come from.

    Attributes:
        key: in Megatron's distributed checkpoint.
        layer: its index on the stacking axis. None for a tensor that is not stacked.
        parts: Hugging Face's rows, in Megatron's order, without padding rows at the end.
        columns: of every row. None for a vector.
        padded: whether rows of zeros follow for a padded vocabulary.
    """

    key: str
    layer: int | None
    parts: tuple[Rows, ...]
    columns: int | None
    padded: bool

    @property
    def num_rows(self) -> int:
        """The number of rows without padding."""
        return sum(part.count for part in self.parts)

    def cut(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield the parts of rows ``start .. stop``."""
        position = 0
        for part in self.parts:
            low, high = max(start, position), min(stop, position + part.count)
            if low < high:
                yield Rows(part.name, part.start + low - position, high - low)
            position += part.count


@dataclass(frozen=True)
class RowsInMegatron:
    """Where rows of a Hugging Face tensor are in Megatron's: ``count`` rows from ``start`` on.

    They are the rows of ``tensor`` from ``megatron_start`` on.
    """

    tensor: MappedTensor
    megatron_start: int
    start: int
    count: int


class Rule(Protocol):
    """One line of a weight map. A rule with ``{layer}`` in Hugging Face's names applies to every layer."""

    megatron: str

    @property
    def padded(self) -> bool:
        """Whether Megatron pads the rows to a size that tensor parallelism can split."""

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of each Hugging Face tensor, by name."""

    def parts(self, architecture: Architecture) -> list[Rows]:
        """Return the rows of the Hugging Face tensors, in Megatron's order."""


@dataclass(frozen=True)
class OneToOne:
    """The same tensor under two names. ``shape`` names its dimensions, which are keys of ``_DIMENSIONS``.

    Rows are along the first dimension that is not called ``one``.
    """

    megatron: str
    huggingface: str
    shape: tuple[str, ...]

    @property
    def padded(self) -> bool:
        """See :class:`Rule`."""
        return self._rows in ("vocab", "words", "output")

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """See :class:`Rule`."""
        return {self.huggingface: tuple(_DIMENSIONS[name](architecture) for name in self.shape)}

    def parts(self, architecture: Architecture) -> list[Rows]:
        """See :class:`Rule`."""
        return [Rows(self.huggingface, 0, _DIMENSIONS[self._rows](architecture))]

    @property
    def _rows(self) -> str:
        return next(name for name in self.shape if name != _ONE)


@dataclass(frozen=True)
class StackedVocabulary:
    """Two tables of token ids in one: the rows of ``output``, which are also predicted, and those of ``input_only``."""

    megatron: str
    output: str
    input_only: str
    padded = True

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """See :class:`Rule`."""
        names = {self.output: "output", self.input_only: "input_only"}
        return {name: (_DIMENSIONS[rows](architecture), architecture.hidden_size) for name, rows in names.items()}

    def parts(self, architecture: Architecture) -> list[Rows]:
        """See :class:`Rule`."""
        return [Rows(name, 0, shape[0]) for name, shape in self.shapes(architecture).items()]


@dataclass(frozen=True)
class StackedQKV:
    """A QKV tensor with all query heads, all key heads, then all value heads. Megatron orders them by query group."""

    megatron: str
    qkv: str
    padded = False

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """See :class:`Rule`."""
        query, key = architecture.query_projection_size, architecture.kv_projection_size
        return {self.qkv: (query + 2 * key, architecture.hidden_size)}

    def parts(self, architecture: Architecture) -> list[Rows]:
        """See :class:`Rule`."""
        query, key = architecture.query_projection_size, architecture.kv_projection_size
        apart = GroupedQueryQKV(self.megatron, query="query", key="key", value="value").parts(architecture)
        first = {"query": 0, "key": query, "value": query + key}
        return [Rows(self.qkv, first[rows.name] + rows.start, rows.count) for rows in apart]


@dataclass(frozen=True)
class GroupedQueryQKV:
    """Separate query, key and value projections, or their biases.

    Megatron stores, per query group, its query heads, key head and value head.
    """

    megatron: str
    query: str
    key: str
    value: str
    are_biases: bool = False
    padded = False

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """See :class:`Rule`."""
        query, key = architecture.query_projection_size, architecture.kv_projection_size
        columns = () if self.are_biases else (architecture.hidden_size,)
        return {self.query: (query, *columns), self.key: (key, *columns), self.value: (key, *columns)}

    def parts(self, architecture: Architecture) -> list[Rows]:
        """See :class:`Rule`."""
        head = architecture.kv_channels
        queries = architecture.num_attention_heads // architecture.num_query_groups * head
        return [
            rows
            for group in range(architecture.num_query_groups)
            for rows in (
                Rows(self.query, group * queries, queries),
                Rows(self.key, group * head, head),
                Rows(self.value, group * head, head),
            )
        ]


@dataclass(frozen=True)
class GatedMLP:
    """The two input projections of a gated MLP. Megatron stores the rows of ``gate``, then those of ``up``."""

    megatron: str
    gate: str
    up: str
    padded = False

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """See :class:`Rule`."""
        shape = (architecture.ffn_hidden_size, architecture.hidden_size)
        return {self.gate: shape, self.up: shape}

    def parts(self, architecture: Architecture) -> list[Rows]:
        """See :class:`Rule`."""
        rows = architecture.ffn_hidden_size
        return [Rows(self.gate, 0, rows), Rows(self.up, 0, rows)]


@dataclass(frozen=True)
class WeightMap:
    """The rules of a family, in the order of the forward pass.

    Attributes:
        rules: the rules.
        attention_options: the keys of :attr:`Architecture.attention_options` that the family's files have a place for.
    """

    rules: Sequence[Rule]
    attention_options: Collection[str] = ()

    def check_attention(self, architecture: Architecture) -> None:
        """Refuse a model whose attention has what the family's files have no place for.

        Raises:
            UserError: such an option. Names the key.
        """
        for key, value in architecture.attention_options.items():
            if key not in self.attention_options:
                raise UserError(
                    f"model.{key}: {json.dumps(value)}, which this family's files have no place for; convert a model "
                    "without it"
                )

    def tensors(self, architecture: Architecture) -> list[MappedTensor]:
        """Return Megatron's tensors for these sizes."""
        return [
            tensor
            for rules, layer in self._stages(architecture)
            for rule in rules
            for tensor in [_mapped(rule, architecture, layer)]
        ]

    def huggingface_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of every Hugging Face tensor for these sizes, by name."""
        return {
            name.format(layer=layer): shape
            for rules, layer in self._stages(architecture)
            for rule in rules
            for name, shape in rule.shapes(architecture).items()
        }

    def row_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of every Hugging Face tensor as rows: ``[rows, columns]``, or ``[rows]`` of a vector."""
        rows: dict[str, int] = {}
        for tensor in self.tensors(architecture):
            for part in tensor.parts:
                rows[part.name] = rows.get(part.name, 0) + part.count
        return {name: _as_rows(shape, rows[name]) for name, shape in self.huggingface_shapes(architecture).items()}

    def _stages(self, architecture: Architecture) -> Iterator[tuple[list[Rule], int | None]]:
        stacked = [index for index, rule in enumerate(self.rules) if _is_stacked(rule)]
        first, last = stacked[0], stacked[-1] + 1
        yield list(self.rules[:first]), None
        for layer in range(architecture.num_layers):
            yield list(self.rules[first:last]), layer
        yield list(self.rules[last:]), None


def rows_in_megatron(tensors: Sequence[MappedTensor]) -> Mapping[str, list[RowsInMegatron]]:
    """Return the reverse map: for each Hugging Face tensor, where its rows go, from top to bottom."""
    found: dict[str, list[RowsInMegatron]] = {}
    for tensor in tensors:
        position = 0
        for part in tensor.parts:
            found.setdefault(part.name, []).append(RowsInMegatron(tensor, position, part.start, part.count))
            position += part.count
    for name, rows in found.items():
        rows.sort(key=lambda part: part.start)
        ends = [0, *(part.start + part.count for part in rows)]
        assert [part.start for part in rows] == ends[:-1], f"the weight map leaves rows of {name} out"
    return found


def scale_of(settings: LoraConfig) -> float:
    """Return the factor ``alpha / dim`` of an adapter's output."""
    return settings.alpha / settings.dim


@torch.no_grad()
def merged_weight(weight: Tensor, linear_in: Tensor, linear_out: Tensor, scale: float) -> Tensor:
    """Return ``W + scale * B A``, rounded to fp32 and then once to the weight's dtype.

    The sum is in fp64, so that the result does not depend on the machine or on how the weight is split. A merge of
    shards on a GPU gives the same bits as an export by rows.

    Args:
        weight: ``[rows, columns]``, the whole weight or any block of it.
        linear_in: A, ``[dim, columns]``.
        linear_out: B, ``[rows, dim]``.
        scale: ``alpha / dim``.
    """
    result, factor = torch.empty_like(weight), linear_in.double()
    for start in range(0, weight.size(0), _MERGED_AT_A_TIME):
        rows = slice(start, start + _MERGED_AT_A_TIME)
        result[rows] = torch.addmm(weight[rows].double(), linear_out[rows].double(), factor, alpha=scale).float()
    return result


def _is_stacked(rule: Rule) -> bool:
    return any("{layer}" in name for name in vars(rule).values() if isinstance(name, str))


def _mapped(rule: Rule, architecture: Architecture, layer: int | None) -> MappedTensor:
    parts = rule.parts(architecture)
    name, shape = next(iter(rule.shapes(architecture).items()))
    _, *columns = _as_rows(shape, sum(part.count for part in parts if part.name == name))
    return MappedTensor(
        key=rule.megatron,
        layer=layer,
        parts=tuple(Rows(part.name.format(layer=layer), part.start, part.count) for part in parts),
        columns=columns[0] if columns else None,
        padded=rule.padded,
    )


def _as_rows(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return (rows,) if len(shape) == 1 else (rows, math.prod(shape) // rows)
