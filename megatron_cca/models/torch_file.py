"""Tensors by name out of one file that ``torch.save`` wrote and somebody else made."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError, shortened
from megatron_cca.pickles import NotPlainError, load_tensors


def tensors_in(path: Path, sections: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file, as maps of it.

    Args:
        path: the file.
        sections: keys under which they may be, the first that is there counts; without any, they are the file's own.

    Raises:
        UserError: a damaged file, one that holds anything but tensors by name, or tensors that claim more bytes than
            the file has; does not name the file.
    """
    found = _loaded(path)
    section = next((name for name in sections if isinstance(found, dict) and name in found), None)
    return _plain(found if section is None else found[section], path.stat().st_size)


def _loaded(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A training checkpoint records its command line, too.
            return load_tensors(path, [(argparse.Namespace, "argparse.Namespace")])
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except NotPlainError as error:
        raise UserError(f"holds more than tensors: {error}") from None
    except Exception as error:  # torch.load promises no closed set for damaged files
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"is truncated or not what torch.save writes: {shortened(why, 120)}") from None


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
