"""Find sets of weights among names that other programs changed: wrappers' prefixes, copies, computed buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cca.errors import UserError
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


def is_recomputed(name: str) -> bool:
    """Return whether a tensor of this name is computed and not learnt: frequencies, masks, caches."""
    return name.rpartition(".")[2] in _RECOMPUTED


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


def _before_marker(name: str, markers: Iterable[str]) -> str | None:
    for marker in markers:
        if name == marker or name.endswith(f".{marker}"):
            return name.removesuffix(marker)
    return None


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
            f"{sets[0].place} (tools/convert_checkpoint.py import)"
        )
    return sets[0]


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
