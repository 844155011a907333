"""How weights of other programs are to be read: what the user says of them, and the one width that they have here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_cca.errors import UserError

HF, CHECKPOINT, HF_TEMPLATE, FORMAT = "--hf", "--checkpoint", "--hf-template", "--format"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Every number of theirs is one of float32's, too.
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
_REMEDY = "tools/convert_checkpoint.py import --dtype fp32 widens them, which loses nothing"


@dataclass(frozen=True)
class Reading:
    """What weights do not say of themselves.

    Attributes:
        sizes: keys of the ``model`` section, for a file without a configuration.
        assumed: the same, where neither the file nor ``sizes`` say it.
        section: which of several sets of weights to take, as a message lists them.
        dtype: ``fp32`` widens weights of fewer bits, or of several widths; None takes them as they are.
    """

    sizes: Mapping[str, float] = field(default_factory=dict)
    assumed: Mapping[str, float] = field(default_factory=dict)
    section: str | None = None
    dtype: Literal["fp32"] | None = None


AS_IT_IS = Reading()


def one_dtype(dtypes: Mapping[str, torch.dtype], asked: Literal["fp32"] | None = None) -> torch.dtype:
    """The dtype of all tensors, or float32 where they are to be widened.

    Nothing is rounded: float16 and bfloat16 become float32 when asked for, and nothing ever becomes bfloat16.

    Args:
        dtypes: of each tensor, by the name that messages have for it.
        asked: ``fp32``, or None to take the tensors as they are.

    Raises:
        UserError: dtypes that differ, or one that no model here has; does not name the file.
    """
    (first, dtype), *others = dtypes.items()
    if asked == "fp32":
        wrong = [f"tensor {name} is {found}" for name, found in dtypes.items() if found not in _WIDENED]
        if wrong:
            raise UserError(f"{wrong[0]}, which float32 cannot hold without rounding")
        return torch.float32
    for name, other in others:
        if other != dtype:
            remedy = f"; {_REMEDY}" if {dtype, other} <= set(_WIDENED) else ""
            raise UserError(f"tensor {name} is {other}, {first} is {dtype}; they must be alike{remedy}")
    check_dtype(dtype, f"; {_REMEDY}" if dtype in _WIDENED else "")
    return dtype


def check_dtype(dtype: torch.dtype, remedy: str = "") -> None:
    """Raise :class:`UserError` for weights in a dtype that no model here has."""
    if dtype not in PRECISIONS:
        raise UserError(f"is in {dtype}; models here are in float32 or bfloat16{remedy}")
