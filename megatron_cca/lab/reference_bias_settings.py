"""The options of a measurement of the reference's bias. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

from megatron_cca.io.options import Option, PathOrWord, Seed, options


@options
class BiasSettings:
    """What to measure; half of the rows are positives, the others their negatives."""

    checkpoint: PathOrWord
    """a run folder or an iter_ folder"""
    data: PathOrWord
    """a folder of token shards, or the word digits"""
    rows: int = 32
    """half of them images with their captions, half with others"""
    lengths: Annotated[tuple[int, ...], Option(metavar="TOKENS", values="+")] | None = None
    """measure the first so many image tokens (default: 256, 512, ... 8192 and the whole image)"""
    precisions: Annotated[tuple[str, ...], Option(metavar="NAME", values="+")] | None = None
    """fp32 bf16 fp8-tensorwise fp8-blockwise (default: what this machine can compute); weights kept in FP8 are measured
    with each"""
    seed: Seed = 1234
    """draws the rows, as training.seed does"""
