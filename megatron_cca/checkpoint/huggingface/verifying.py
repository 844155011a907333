"""Prove that a Hugging Face folder and a Megatron checkpoint are the same model: by their bits, and by their logits.

The logits, in fp32, are also those of models that do not fit in memory. The models of transformers and of Megatron are
built without weights. Each part gets its weights just before it runs, and loses them afterwards. Megatron's sharding
tells which block of a global tensor a weight is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import (
    CHECKPOINT,
    HF,
    UNDESCRIBED,
    HuggingFaceCheckpoint,
    WeightsDescription,
)
from megatron_cca.checkpoint.huggingface.importing import PublicCheckpoint, open_public
from megatron_cca.checkpoint.huggingface.megatron_checkpoint import (
    ExportTemplate,
    MegatronCheckpoint,
    template_from_checkpoint,
)
from megatron_cca.checkpoint.stored_tensors import ByteProgress, StoredTensors
from megatron_cca.config import Config, ParallelConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.architecture import check_layout
from megatron_cca.models.naming import recognise_naming
from megatron_cca.models.weight_files import num_bytes, row_ranges

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

# Returns rows from the first number up to the second.
ReadRows = Callable[[int, int], Tensor]
# Fills the parameters of the part of a model that has this name.
FillPart = Callable[[str, torch.nn.Module], None]

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
    hf: str | Path, checkpoint: str | Path, description: WeightsDescription = UNDESCRIBED
) -> tuple[PublicCheckpoint, MegatronCheckpoint]:
    """Recognise and check both checkpoints, and refuse them if their sizes differ.

    Args:
        hf: a Hugging Face folder, or a file of a family's authors.
        checkpoint: a Megatron checkpoint.
        description: what the user said about ``hf``. Sizes that are still unknown are taken from ``checkpoint``.

    Raises:
        UserError: see :func:`open_public` and :class:`MegatronCheckpoint`; also if sizes differ.
    """
    hf = Path(hf)
    source = None if hf.is_file() else open_public(hf, HF, description)
    target = MegatronCheckpoint(checkpoint, CHECKPOINT)
    if source is None:
        not_in_shapes = getattr(target.format, "not_in_shapes", ())
        assumed = {name: getattr(target.architecture, name) for name in not_in_shapes}
        source = open_public(hf, HF, replace(description, assumed=assumed))
    ours, theirs = vars(target.architecture), vars(source.architecture)
    for name in ours:
        if name == "vocabulary":
            if ours[name].size != theirs[name].size:
                raise UserError(
                    f"{CHECKPOINT}: {target.folder} has {ours[name].size} ids, {source.folder} {theirs[name].size}"
                )
        elif ours[name] != theirs[name]:
            raise UserError(f"{CHECKPOINT}: {target.folder} has {name} {ours[name]}, {source.folder} {theirs[name]}")
    return source, target


def compare_tensors(
    source: PublicCheckpoint, target: MegatronCheckpoint, *, progress_bar: bool = True
) -> TensorComparison:
    """Compare every tensor bit by bit, also the image tokenizer's tensors if folder or model have them."""
    frozen = source.frozen_tensors()
    kept = template_from_checkpoint(target.folder, target.option)
    total = sum(num_bytes(shape, source.dtype) for shape in target.shapes.values())
    total += sum(source.files.tensors[name].num_bytes for name in source.companions.values())
    total += sum(tensor.nbytes for tensor in frozen.values())
    with ByteProgress("comparing", total, shown=progress_bar) as progress:
        found = [
            *(_decoder_difference(source, target, name, progress) for name in target.shapes),
            *(_companion_difference(source, kept, bare, progress) for bare in source.companions),
            *(_frozen_difference(tensor, target, key, progress) for key, tensor in frozen.items()),
        ]
    return TensorComparison(len(found), tuple(difference for difference in found if difference))


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


@torch.no_grad()
def transformers_logits(source: HuggingFaceCheckpoint, tokens: Tensor, *, progress_bar: bool = True) -> Tensor:
    """Return float32 logits ``[B, S, V]`` of transformers' decoder on the CPU, for int64 ``tokens`` ``[B, S]``.

    V is the number of ids that the head predicts.
    """
    with error_context(f"{source.option}: {source.folder}"):
        model = source.format.transformers_model(source.config)

    naming = recognise_naming(source.format.namings, (name for name, _ in model.named_parameters()))

    def fill(prefix: str, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(source.read(naming.mapped(f"{prefix}.{name}"), 0, parameter.size(0)))

    parts = _parts(model)
    with _streamed(model, parts, fill, "cpu", "transformers' logits", progress_bar):
        return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def megatron_logits(checkpoint: MegatronCheckpoint, tokens: Tensor, *, progress_bar: bool = True) -> Tensor:
    """Return float32 logits ``[B, S, V]`` of Megatron's GPTModel for int64 ``tokens`` ``[B, S]``.

    V is the number of ids that the head predicts. The model is tensor-parallel over all ranks. Process groups must have
    the layout of :func:`verification_config`.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_cca.models.gpt import build_gpt
    from megatron_cca.models.initialization import sharded_tensors

    config = verification_config(checkpoint)
    with torch.device("meta"):
        (model,) = build_gpt(checkpoint.architecture, config.model, config.parallel, config.training)

    def fill(prefix: str, module: torch.nn.Module) -> None:
        state = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(f"{prefix}.")}
        for shard in sharded_tensors(state):
            _fill_shard(shard, checkpoint.stored)

    parts = _parts(model)
    tokens = tokens.to(platform.device())
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    shown = progress_bar and dist.get_rank() == 0
    with _streamed(model.eval(), parts, fill, platform.device(), "Megatron's logits", shown):
        logits = model(tokens, positions, None)
    return gather_from_tensor_model_parallel_region(logits)[..., : checkpoint.architecture.vocabulary.output_size].cpu()


def verification_config(checkpoint: MegatronCheckpoint) -> Config:
    """Return a configuration of the checkpoint's model in fp32, without dropout, tensor-parallel over all ranks.

    It uses Megatron's local layers. Transformer Engine multiplies float32 in TF32, which can hide a wrong weight.
    """
    saved, ranks = checkpoint.config, int(os.environ.get("WORLD_SIZE", "1"))
    return replace(
        saved,
        model=replace(saved.model, transformer_impl="local", hidden_dropout=0.0, attention_dropout=0.0),
        parallel=ParallelConfig(tensor_model_parallel_size=ranks),
        # The other ranks wait while rank 0 compares tensors.
        training=replace(saved.training, precision="fp32", recompute_granularity=None, distributed_timeout_minutes=60),
    )


def _decoder_difference(
    source: PublicCheckpoint, target: MegatronCheckpoint, name: str, progress: ByteProgress
) -> str | None:
    shape, on_disk = target.row_shapes[name], source.naming.on_disk(name)
    if source.dtype != target.dtype:
        return f"{on_disk}: {source.dtype} there, {target.dtype} in the checkpoint"
    theirs, ours = partial(source.read, name), partial(target.read, name)
    return _difference(on_disk, shape, source.dtype, theirs, ours, progress)


def _companion_difference(
    source: PublicCheckpoint, kept: ExportTemplate, bare: str, progress: ByteProgress
) -> str | None:
    name = source.companions[bare]
    if bare not in kept.names:
        return f"{name}: not in the checkpoint"
    theirs, ours = source.files.tensors[name], kept.tensors.tensors[kept.names[bare]]
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        there, here = (f"{info.dtype} {list(info.shape)}" for info in (theirs, ours))
        return f"{name}: {there} there, {here} in the checkpoint"
    read, read_kept = partial(source.files.read, name), partial(kept.tensors.read, kept.names[bare])
    return _difference(name, theirs.shape, theirs.dtype, read, read_kept, progress)


def _frozen_difference(theirs: Tensor, target: MegatronCheckpoint, key: str, progress: ByteProgress) -> str | None:
    if key not in target.stored:
        return f"{key}: not in the checkpoint"
    shape, dtype = target.stored.shape(key), target.stored.dtype(key)
    if (tuple(theirs.shape), theirs.dtype) != (shape, dtype):
        return f"{key}: {theirs.dtype} {list(theirs.shape)} there, {dtype} {list(shape)} in the checkpoint"
    return _difference(
        key, shape, dtype, lambda *rows: theirs[slice(*rows)], partial(target.stored.read, key, None), progress
    )


def _difference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, theirs: ReadRows, ours: ReadRows, progress: ByteProgress
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


def _fill_shard(shard: ShardedTensor, stored: StoredTensors) -> None:
    """Load this rank's part of a global tensor into a weight. Rows after the stored vocabulary padding become zeros."""
    sizes = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
    low, ends = shard.global_offset, stored.shape(shard.key)
    high = [max(start, min(start + size, end)) for start, size, end in zip(low, sizes, ends, strict=True)]
    shard.data.zero_()
    lengths = [stop - start for start, stop in zip(low, high, strict=True)]
    if all(lengths):
        inside = tuple(slice(0, length) for length in lengths)
        shard.data.view(sizes)[inside] = stored.read_block(shard.key, low, high).to(shard.data.device)


def _parts(model: torch.nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the largest modules with weights that hold no stack of layers: each layer is one."""
    parts = []
    for name, module in model.named_children():
        is_list = isinstance(module, torch.nn.ModuleList)
        holds_layers = any(isinstance(inner, torch.nn.ModuleList) for inner in module.modules())
        if is_list:
            parts += [f"{prefix}{name}.{index}" for index in range(len(module))]
        elif holds_layers:
            parts += _parts(module, f"{prefix}{name}.")
        elif any(True for _ in module.parameters()):
            parts.append(f"{prefix}{name}")
    return parts


@contextmanager
def _streamed(
    model: torch.nn.Module, parts: list[str], fill: FillPart, device: torch.device | str, what: str, progress_bar: bool
) -> Iterator[None]:
    """Load each part just before it runs, and empty it just after, within the block. A bar counts the parts."""
    with tqdm(total=len(parts), desc=what, unit="part", disable=None if progress_bar else True) as bar:
        for name in parts:
            module = model.get_submodule(name)

            def fill_it(module: torch.nn.Module, *_unused, name: str = name) -> None:
                module.to_empty(device=device)
                fill(name, module)

            def empty_it(module: torch.nn.Module, *_unused) -> None:
                module.to("meta")
                bar.update()

            module.register_forward_pre_hook(fill_it)
            module.register_forward_hook(empty_it)
        yield
