"""Read named tensors from files that other programs wrote, and find the sets of weights among their names."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError, first_line, shortened
from megatron_cca.io.file_contents import UTF_16, ZIP, kind_hint
from megatron_cca.io.pickles import NotPlainError, load_tensors
from megatron_cca.models.architecture import Architecture

# Parts that torch's and Lightning's wrappers add to names, at any depth. No family here has them in its own names.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
)
# Buffers that a model computes when it is built or while it decodes.
_RECOMPUTED = frozenset(
    {"freqs_cis", "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "causal_mask", "k_cache", "v_cache"}
)
# The place of a set that has no prefix and is under no key.
TOP = "."
# Relative precision of frequencies in bfloat16.
_TOLERANCE = 1e-2
SAFETENSORS = ".safetensors"
# The files of a Hugging Face folder: its configuration, and its tensors in one file, or in several with an index.
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The most that one piece of a tensor takes in memory.
PIECE_BYTES = 64 * 2**20
# How deep nested keys, such as "state_dict" in "trainer", are searched for weights.
_DEEPEST = 3


@dataclass(frozen=True)
class WeightSet[Value]:
    """One set of weights.

    Attributes:
        place: its keys and its prefix, joined by dots.
        weights: by name, without wrappers and prefix.
        beside: stored names in the same dictionary that belong to no set.
    """

    place: str
    weights: dict[str, Value]
    beside: tuple[str, ...]


def contents_of(path: Path) -> Any:
    """Return what a file holds. Its tensors are memory maps, unless torch before 1.6 wrote it.

    Raises:
        UserError: a damaged file, or one that holds more than plain data. The message does not name the file.
    """
    if path.suffix == SAFETENSORS:
        return _safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A training checkpoint also holds its command line.
            return load_tensors(path, [(argparse.Namespace, "argparse.Namespace")])
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except NotPlainError as error:
        raise UserError(
            f"holds more than tensors: {error}; torch.save its state dict alone into another file"
        ) from None
    except Exception as error:  # torch.load promises no closed set for damaged files
        why = first_line(error)
        kind = kind_hint(path, but=[ZIP])
        raise UserError(f"is truncated or not what torch.save writes{kind or f': {shortened(why, 120)}'}") from None


def tensors_in(path: Path, sections: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a file as memory maps, by names without wrappers.

    Args:
        path: the file.
        sections: keys that may hold the tensors. The first existing one is used. Without any, the file itself holds
            them.

    Raises:
        UserError: as :func:`contents_of`. Also anything but tensors by name, or tensors that claim more bytes than the
            file has. The message does not name the file.
    """
    return tensors_under(contents_of(path), sections, path.stat().st_size)


def tensors_under(found: Any, sections: Sequence[str], num_bytes: int) -> dict[str, Tensor]:
    """Return the tensors in the contents of a file of ``num_bytes``, see :func:`tensors_in`."""
    section = next((name for name in sections if isinstance(found, dict) and name in found), None)
    tensors = _plain(found if section is None else found[section], num_bytes)
    return {name: tensors[stored] for name, stored in unwrapped(tensors).items()}


def sets_in(found: Any, markers: Collection[str], num_bytes: int) -> list[WeightSet[Tensor]]:
    """Return every set of weights in the contents of a file, under any keys and prefixes.

    Numbers and texts are ignored.

    Args:
        found: from :func:`contents_of`.
        markers: see :func:`weight_sets`.
        num_bytes: of the file.

    Raises:
        UserError: a tensor that is not a plain one, or tensors that claim more bytes than the file has.
    """
    sets = list(_sets(found, markers, (), set()))
    for one in sets:
        _plain(one.weights, num_bytes)
    return sets


def weight_sets[Value](
    stored: Mapping[str, Value], markers: Collection[str], place: str = ""
) -> list[WeightSet[Value]]:
    """Return the sets of weights in a flat dictionary of tensors. There is none where no marker is found.

    Args:
        stored: tensors, or whatever stands for them, by stored name.
        markers: tensor names. Every set has one of them.
        place: the place of the dictionary itself.

    Raises:
        UserError: see :func:`unwrapped`.
    """
    names = unwrapped(stored)
    # If a name ends with two markers, the longer one gives the prefix.
    longest_first = sorted(markers, key=len, reverse=True)
    prefixes = {prefix for name in names if (prefix := _before_marker(name, longest_first)) is not None}
    # A name belongs to its longest prefix. The empty prefix takes the rest.
    by_prefix: dict[str | None, list[str]] = {prefix: [] for prefix in sorted(prefixes)}
    for name in names:
        owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        by_prefix.setdefault(owner, []).append(name)
    beside = tuple(names[name] for name in by_prefix.pop(None, []))
    return [
        WeightSet(
            ".".join(part for part in (place, prefix.removesuffix(".")) if part) or TOP,
            {name.removeprefix(prefix): stored[names[name]] for name in owned},
            beside,
        )
        for prefix, owned in by_prefix.items()
    ]


def chosen_set[Value](sets: list[WeightSet[Value]], section: str | None, *, are_alike: bool) -> WeightSet[Value]:
    """Return the set of weights to use.

    Args:
        sets: at least one.
        section: the place that the user named, or None.
        are_alike: whether all sets hold the same weights. Any of them is then right.

    Raises:
        UserError: the place holds no set, or there are several different sets and no place.
    """
    places = ", ".join(one.place for one in sets)
    if section is not None:
        named = [one for one in sets if one.place == section]
        if not named:
            raise UserError(f"no weights of this family lie under {section!r}; there are: {places}")
        return named[0]
    if len(sets) > 1 and not are_alike:
        raise UserError(
            f"holds {len(sets)} sets of weights that differ ({places}); say which to take: --section "
            f"{sets[0].place} (megatron-cca convert import)"
        )
    return sets[0]


def same_tensors[Value](sets: Sequence[WeightSet[Value]], are_equal: Callable[[Value, Value], bool]) -> bool:
    """Return whether all sets have the same names and, by ``are_equal``, the same tensors."""
    first, *others = (one.weights for one in sets)
    return all(
        first.keys() == other.keys() and all(are_equal(first[name], other[name]) for name in first) for other in others
    )


def equal_tensors(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and numbers."""
    return one.dtype == other.dtype and torch.equal(one, other)


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return the names without the parts that wrappers add, each with its name in the file.

    Raises:
        UserError: two names differ only in wrappers.
    """
    found: dict[str, str] = {}
    for stored in names:
        name = ".".join(part for part in stored.split(".") if part not in _WRAPPERS) or stored
        if name in found:
            raise UserError(f"tensors {found[name]} and {stored} have one name, {name}, without their wrappers")
        found[name] = stored
    return found


def row_ranges(shape: Sequence[int], dtype: torch.dtype, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover a tensor of this shape: at most ``piece_bytes`` each, at least one row."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    # Rows of no bytes all fit in one piece.
    step = max(1, piece_bytes // row_bytes if row_bytes else rows)
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


def is_recomputed(name: str) -> bool:
    """Return whether a tensor of this name is computed and not learnt: frequencies, masks, caches."""
    return name.rpartition(".")[2] in _RECOMPUTED


def check_frequencies(name: str, found: Tensor, architecture: Architecture) -> None:
    """Refuse rotary frequencies of another base than the model's. The weights were trained with these frequencies.

    Args:
        name: name of the tensor, for messages.
        found: ``[channels of a head / 2]``. A tensor of another shape is ignored.
        architecture: sizes of the model.

    Raises:
        UserError: the bases differ. Names the tensor and both bases.
    """
    channels = architecture.kv_channels
    if found.shape != (channels // 2,) or channels < 4:
        return
    places = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    wanted = architecture.rotary_base**-places
    if not torch.allclose(found.double(), wanted, rtol=_TOLERANCE, atol=0):
        base = (found[1].double() ** (-channels / 2)).item()
        raise UserError(
            f"tensor {name} is of the rotary base {base:.6g}, config.json says {architecture.rotary_base:.6g}; mend "
            "the one that is wrong"
        )


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        why = first_line(error)
        # The length of a header can look like UTF-16.
        kind = kind_hint(path, but=[UTF_16])
        raise UserError(f"is truncated or not a safetensors file{kind or f': {shortened(why, 120)}'}") from None


def _sets(found: Any, markers: Collection[str], keys: tuple[str, ...], seen: set[int]) -> Iterator[WeightSet[Tensor]]:
    # A pickle can hold one dictionary many times, or in itself.
    if not isinstance(found, Mapping) or id(found) in seen:
        return
    seen.add(id(found))
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    yield from weight_sets(tensors, markers, ".".join(keys))
    if len(keys) < _DEEPEST:
        for key, value in found.items():
            if isinstance(key, str):
                yield from _sets(value, markers, (*keys, key), seen)


def _before_marker(name: str, markers: Iterable[str]) -> str | None:
    for marker in markers:
        if name == marker or name.endswith(f".{marker}"):
            return name.removesuffix(marker)
    return None


def _plain(found: Any, num_bytes: int) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        raise UserError(f"must hold tensors by name, found {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise UserError(f"must hold tensors by name, found the key {shortened(repr(name), 60)}")
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} is no tensor")
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_nested
        ):
            raise UserError(f"tensor {name} is not a plain one")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if claimed > num_bytes:
        raise UserError(f"its tensors claim {claimed} bytes, more than its own {num_bytes}")
    return found
