"""Log-ratio of a policy and a reference with the same weights. Here: the options and the precisions. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from megatron_cca.errors import UserError
from megatron_cca.io.options import Option, PathOrWord, Seed, options

# Each precision with the multiple that it needs for the length of a row; see check_fp8_sizes.
PRECISIONS = {"fp32": 1, "bf16": 1, "fp8-tensorwise": 16, "fp8-blockwise": 128}
IN_FP8 = " with FP8 weights"


@options
class BiasSettings:
    """What to measure. Half of the rows are positives, the others their negatives.

    Raises:
        UserError: an odd number of rows.
    """

    checkpoint: PathOrWord
    """a run folder or an iter_ folder"""
    data: PathOrWord
    """a folder of token shards, or the word digits"""
    rows: Annotated[int, Field(ge=2)] = 32
    """an even number: half of them are images with their captions, half the same images with other captions"""
    lengths: Annotated[tuple[int, ...], Option(metavar="TOKENS", values="+")] | None = None
    """measure the log-ratio of the first so many image tokens of a row (default: 256, 512, ... 8192 and the whole
    image)"""
    precisions: Annotated[tuple[str, ...], Option(metavar="NAME", values="+")] | None = None
    """fp32 bf16 fp8-tensorwise fp8-blockwise (default: all that this machine can compute); a reference is measured in
    each, and in each with its weights kept in FP8"""
    seed: Seed = 1234
    """draws the rows, as training.seed does"""

    def __post_init__(self) -> None:
        if self.rows % 2:
            raise UserError(f"--rows: must be even, since every positive has a negative beside it, found {self.rows}")


@dataclass(frozen=True)
class ModelPrecision:
    """The precision of a model's computation.

    Attributes:
        precision: one of ``PRECISIONS``.
        fp8_param: whether the weights are kept in FP8, as with ``reference.fp8_param``.
    """

    precision: str
    fp8_param: bool = False

    def __str__(self) -> str:
        return self.precision.replace("-", " ") + (IN_FP8 if self.fp8_param else "")

    def keys(self) -> dict[str, str]:
        """Return the keys of the precision in the sections ``training`` and ``reference``."""
        precision, _, recipe = self.precision.partition("-")
        return {"precision": precision, **({"fp8_recipe": recipe} if recipe else {})}
