"""How to read weights of other programs: what the user says about them, and the one dtype that they have here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_cca.errors import UserError

HF, CHECKPOINT, HF_TEMPLATE, FORMAT = "--hf", "--checkpoint", "--hf-template", "--format"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# float32 holds every number of these dtypes exactly.
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
_REMEDY = "tools/convert_checkpoint.py import --dtype fp32 widens them, which loses nothing"


@dataclass(frozen=True)
class Reading:
    """What the user says about weights, because the files do not say it.

    Attributes:
        sizes: keys of the ``model`` section, for a file without a configuration.
        assumed: the same keys, used if neither the file nor ``sizes`` has them.
        section: which of several sets of weights to take. The error message lists them.
        dtype: ``fp32`` converts bf16, fp16 or mixed weights to fp32. None keeps their dtype.
    """

    sizes: Mapping[str, float] = field(default_factory=dict)
    assumed: Mapping[str, float] = field(default_factory=dict)
    section: str | None = None
    dtype: Literal["fp32"] | None = None


AS_IT_IS = Reading()


def one_dtype(dtypes: Mapping[str, torch.dtype], asked: Literal["fp32"] | None = None) -> torch.dtype:
    """Return the dtype of all tensors, or float32 if ``asked`` wants it.

    Nothing is rounded: float16 and bfloat16 become float32 only if asked, and nothing becomes bfloat16.

    Args:
        dtypes: dtype of each tensor, by the name for messages.
        asked: ``fp32``, or None to keep the dtype.

    Raises:
        UserError: dtypes differ, or a dtype is not supported. Does not name the file.
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
    """Refuse weights in a dtype that is not supported.

    Raises:
        UserError: the dtype is neither float32 nor bfloat16. Does not name the file.
    """
    if dtype not in PRECISIONS:
        raise UserError(f"is in {dtype}; models here are in float32 or bfloat16{remedy}")
