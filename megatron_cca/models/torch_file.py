"""Read named tensors from one file that somebody else wrote with ``torch.save`` or safetensors."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError, shortened
from megatron_cca.io.external_files import UTF_16, ZIP, kind_hint
from megatron_cca.io.pickles import NotPlainError, load_tensors
from megatron_cca.models.weight_sets import WeightSet, unwrapped, weight_sets

SAFETENSORS = ".safetensors"
# How deep nested keys, such as "state_dict" in "trainer", are searched for weights.
_DEEPEST = 3


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
        why = (str(error).splitlines() or [type(error).__name__])[0]
        kind = kind_hint(path, but=[ZIP])
        raise UserError(f"is truncated or not what torch.save writes{kind or f': {shortened(why, 120)}'}") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        # The length of a header can look like UTF-16.
        kind = kind_hint(path, but=[UTF_16])
        raise UserError(f"is truncated or not a safetensors file{kind or f': {shortened(why, 120)}'}") from None


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


def same_tensors(sets: Sequence[WeightSet[Tensor]]) -> bool:
    """Return whether all sets have the same names and, in every tensor, the same numbers."""
    first, *others = (one.weights for one in sets)
    return all(
        first.keys() == other.keys()
        and all(first[name].dtype == other[name].dtype and torch.equal(first[name], other[name]) for name in first)
        for other in others
    )


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
