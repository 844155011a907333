"""Prove that a Hugging Face folder and a Megatron checkpoint are the same model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca import platform
from megatron_cca.checkpoint.huggingface.importing import PublicCheckpoint, open_public
from megatron_cca.checkpoint.huggingface.source import AS_IT_IS, CHECKPOINT, HF, HuggingFaceCheckpoint, Reading
from megatron_cca.checkpoint.huggingface.target import MegatronCheckpoint, Template, template_from_checkpoint
from megatron_cca.checkpoint.stored_tensors import ByteProgress, num_bytes, row_ranges
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import check_layout

Read = Callable[[int, int], Tensor]

# Relative to the largest logit. Correct fp32 implementations add thousands of products in different orders.
RELATIVE_TOLERANCE = 1e-4
_SAME_WIDTH_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorComparison:
    """Number of compared tensors, and one line for each difference."""

    compared: int
    differences: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences


@dataclass(frozen=True)
class LogitComparison:
    """Differences between Megatron's and transformers' logits, both in fp32.

    Attributes:
        max_absolute: largest absolute difference.
        max_relative: ``max_absolute`` divided by the largest absolute logit of transformers.
        top1_agreement: share of positions where both give the largest logit to the same token.
        finite: whether all logits of both are finite. If not, the other figures mean nothing.
        shape: shape of the compared logits.
    """

    max_absolute: float
    max_relative: float
    top1_agreement: float
    finite: bool
    shape: tuple[int, ...]

    @property
    def agree(self) -> bool:
        """Whether fp32 rounding explains the difference."""
        return self.finite and self.max_relative <= RELATIVE_TOLERANCE


def open_both(
    hf: str | Path, checkpoint: str | Path, reading: Reading = AS_IT_IS
) -> tuple[PublicCheckpoint, MegatronCheckpoint]:
    """Recognise and check both checkpoints, and refuse them if their sizes differ.

    Args:
        hf: a Hugging Face folder, or a file of a family's authors.
        checkpoint: a Megatron checkpoint.
        reading: what the user said about ``hf``. Sizes that are still unknown are taken from ``checkpoint``.

    Raises:
        UserError: see :func:`open_public` and :class:`MegatronCheckpoint`; also if sizes differ.
    """
    hf = Path(hf)
    source = None if hf.is_file() else open_public(hf, HF, reading)
    target = MegatronCheckpoint(checkpoint, CHECKPOINT)
    if source is None:
        unsaid = getattr(target.format, "unsaid", ())
        assumed = {name: getattr(target.architecture, name) for name in unsaid}
        source = open_public(hf, HF, replace(reading, assumed=assumed))
    ours, theirs = vars(target.architecture), vars(source.architecture)
    for name in ours:
        if name == "vocabulary":
            if ours[name].size != theirs[name].size:
                raise UserError(
                    f"{CHECKPOINT}: {target.folder} has {ours[name].size} words, {source.folder} {theirs[name].size}"
                )
        elif ours[name] != theirs[name]:
            raise UserError(f"{CHECKPOINT}: {target.folder} has {name} {ours[name]}, {source.folder} {theirs[name]}")
    return source, target


def compare_tensors(
    source: PublicCheckpoint, target: MegatronCheckpoint, *, progress_bar: bool = True
) -> TensorComparison:
    """Compare every tensor bit by bit, also the image tokenizer's tensors if the Hugging Face folder has them."""
    kept = template_from_checkpoint(target.folder, target.option)
    total = sum(num_bytes(shape, source.dtype) for shape in target.shapes.values())
    total += sum(source.files.tensors[name].num_bytes for name in source.companions.values())
    with ByteProgress("comparing", total, shown=progress_bar) as progress:
        found = [
            *(_decoder_difference(source, target, name, progress) for name in target.shapes),
            *(_companion_difference(source, kept, bare, progress) for bare in source.companions),
        ]
    return TensorComparison(len(found), tuple(difference for difference in found if difference))


def _decoder_difference(
    source: PublicCheckpoint, target: MegatronCheckpoint, name: str, progress: ByteProgress
) -> str | None:
    shape, on_disk = target.shapes[name], source.naming.on_disk(name)
    if source.dtype != target.dtype:
        return f"{on_disk}: {source.dtype} there, {target.dtype} in the checkpoint"
    theirs, ours = partial(source.read, name), partial(target.read, name)
    return _difference(on_disk, shape, source.dtype, theirs, ours, progress)


def _companion_difference(source: PublicCheckpoint, kept: Template, bare: str, progress: ByteProgress) -> str | None:
    name = source.companions[bare]
    if bare not in kept.names:
        return f"{name}: not in the checkpoint"
    theirs, ours = source.files.tensors[name], kept.tensors.tensors[kept.names[bare]]
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        there, here = (f"{info.dtype} {list(info.shape)}" for info in (theirs, ours))
        return f"{name}: {there} there, {here} in the checkpoint"
    read, read_kept = partial(source.files.read, name), partial(kept.tensors.read, kept.names[bare])
    return _difference(name, theirs.shape, theirs.dtype, read, read_kept, progress)


def _difference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, theirs: Read, ours: Read, progress: ByteProgress
) -> str | None:
    # Compare as integers, so that NaNs with the same bits are equal.
    integer = _SAME_WIDTH_INTEGERS[dtype.itemsize]
    count, first_row = 0, None
    for start, stop in row_ranges(shape, dtype):
        piece = theirs(start, stop)
        unequal = (piece.contiguous().view(integer) != ours(start, stop).contiguous().view(integer)).flatten()
        progress.count(piece)
        if first_row is None and unequal.any():
            first_row = start + int(unequal.nonzero()[0]) // math.prod(shape[1:])
        count += int(unequal.sum())
    return f"{name}: {count} of {math.prod(shape)} elements differ, the first in row {first_row}" if count else None


def compare_logits(
    source: HuggingFaceCheckpoint,
    target: MegatronCheckpoint,
    *,
    rows: int = 2,
    length: int = 64,
    seed: int = 0,
    progress_bar: bool = True,
) -> LogitComparison | None:
    """Compare the logits of both models for random tokens, in fp32, one layer in memory at a time.

    Collective over all ranks of the job. Tensor parallelism splits Megatron's model over them.

    Args:
        source, target: from :func:`open_both`.
        rows: number of random sequences.
        length: their length, at most the number of positions of the model.
        seed: seed of the tokens.
        progress_bar: show progress bars on a terminal.

    Returns:
        The comparison on rank 0, None on other ranks.

    Raises:
        UserError: the model cannot be split over this many ranks, or transformers refuses the configuration.
    """
    platform.current()
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.checkpoint.huggingface.loading import megatron_logits, transformers_logits, verification_config
    from megatron_cca.parallel.ranks import initialize_distributed

    config = verification_config(target)
    check_layout(target.architecture, config.model, config.parallel)
    initialize_distributed(config)
    architecture = target.architecture
    shape = (rows, min(length, architecture.max_position_embeddings))
    tokens = torch.randint(0, architecture.vocabulary.size, shape, generator=torch.Generator().manual_seed(seed))
    ours = megatron_logits(target, tokens, progress_bar=progress_bar)
    if dist.get_rank() != 0:
        return None
    theirs = transformers_logits(source, tokens, progress_bar=progress_bar)
    worst, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    same_top = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    finite = bool(ours.isfinite().all() and theirs.isfinite().all())
    relative = worst / largest if largest else math.inf
    return LogitComparison(worst, relative if worst else 0.0, same_top, finite, tuple(theirs.shape))
