"""Import a Hugging Face folder, or a file of a family's authors, into a Megatron checkpoint, piece by piece."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_cca.checkpoint import layout, summary
from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.huggingface.source import AS_IT_IS, CONFIG, HF, HuggingFaceCheckpoint, Reading
from megatron_cca.checkpoint.huggingface.target import READABLE, WeightsFile
from megatron_cca.checkpoint.stored_tensors import ByteProgress, Piece, num_bytes, row_ranges, save_pieces
from megatron_cca.checkpoint.summary import IMPORTED_FROM, config_of_weights, summarize
from megatron_cca.config import ParallelConfig
from megatron_cca.errors import UserError
from megatron_cca.io.output_folders import check_apart, check_output, claimed, staging
from megatron_cca.megatron_compat import COMMON_STATE, extra_state_keys
from megatron_cca.models.architecture import check_layout, padded_vocab_size
from megatron_cca.models.weight_map import MappedTensor

PublicCheckpoint = HuggingFaceCheckpoint | WeightsFile


def import_checkpoint(
    hf: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    parallel: ParallelConfig | None = None,
    max_position_embeddings: int | None = None,
    sizes: Mapping[str, float] | None = None,
    section: str | None = None,
    dtype: Literal["fp32"] | None = None,
    progress_bar: bool = True,
) -> Path:
    """Convert a Hugging Face folder, or a file of a family's authors, to a Megatron distributed checkpoint, bit-exact.

    The checkpoint loads at any TP x PP x VPP. Tokenizer, configurations and image tokenizer are kept beside the
    weights. Training copies them to its checkpoints, and :func:`export_checkpoint` writes them out again.

    Args:
        hf: a folder with safetensors of a known family, in any of its forms, or a file of the family's authors.
        output: an empty or new folder. It will hold ``iter_0000000``, and ``training.pretrained_checkpoint`` can
            name it.
        overwrite: replace an earlier import in ``output``.
        parallel: the layout that the model is meant for. A layout that it cannot have is refused now.
        max_position_embeddings: size of a model whose weights do not tell it. The same key can be in ``sizes``.
        sizes: keys of the ``model`` section that a file's tensors do not tell, such as ``num_attention_heads``.
        section: which set of weights to take if several differ. The error message lists them.
        dtype: ``fp32`` converts bf16, fp16 or mixed weights to fp32, without loss. None keeps their bits.
        progress_bar: show a progress bar on a terminal.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: see :func:`open_public`; also if ``output`` holds something else, or the disk is full.
    """
    sizes = dict(sizes or {})
    if max_position_embeddings is not None:
        sizes["max_position_embeddings"] = max_position_embeddings
    source = open_public(Path(hf), HF, Reading(sizes, section=section, dtype=dtype))
    output = Path(output)
    check_layout(source.architecture, source.model, parallel or ParallelConfig())
    partial_folder, final = layout.partial_folder(output, 0), layout.iteration_folder(output, 0)
    check_apart(output, source.folder, HF)
    pieces = [piece for tensor in source.format.weights.tensors(source.architecture) for piece in _cut(source, tensor)]
    companions = [
        OutgoingTensor(bare, info.shape, info.dtype, source.files.pieces(name))
        for bare, name in sorted(source.companions.items())
        for info in [source.files.tensors[name]]
    ]
    total = sum(num_bytes(p.sizes, p.dtype) for p in pieces) + sum(tensor.num_bytes for tensor in companions)
    with ExitStack() as stack:
        stack.enter_context(claimed(output))
        unfinished = layout.own_names(output, 0) - {layout.LATEST, final.name}
        check_output(output, {layout.LATEST, final.name}, unfinished, overwrite=overwrite)
        stack.enter_context(staging(partial_folder, total))
        progress = stack.enter_context(ByteProgress("importing", total, shown=progress_bar))
        watched = [replace(piece, read=progress.watched(piece.read)) for piece in pieces]
        save_pieces(partial_folder, watched, _objects(source))
        _copy_files(source.companion_files(), partial_folder / layout.COMPANION_FILES)
        if companions:
            folder = partial_folder / layout.COMPANION_TENSORS
            folder.mkdir()
            write_safetensors(folder, [replace(c, pieces=progress.watch(c.pieces)) for c in companions])
        layout.finalize(partial_folder, output, 0, _summary(source))
    return final


def _cut(source: PublicCheckpoint, tensor: MappedTensor) -> Iterator[Piece]:
    rows = padded_vocab_size(source.architecture, source.model, 1) if tensor.padded else tensor.num_rows
    shape = (rows,) if tensor.columns is None else (rows, tensor.columns)
    stack, layer = ((), ()) if tensor.layer is None else ((source.architecture.num_layers,), (tensor.layer,))
    for start, stop in row_ranges(shape, source.dtype):
        yield Piece(
            key=tensor.key,
            global_shape=(*stack, *shape),
            offsets=(*layer, start, *(0 for _ in shape[1:])),
            sizes=(*(1 for _ in layer), stop - start, *shape[1:]),
            dtype=source.dtype,
            read=partial(gathered_rows, source, tensor, start, stop),
        )


def gathered_rows(source: PublicCheckpoint, tensor: MappedTensor, start: int, stop: int) -> Tensor:
    """Return rows ``start .. stop`` of a Megatron tensor. Rows after its last one are padding: zeros."""
    parts = [source.read(rows.name, rows.start, rows.start + rows.count) for rows in tensor.cut(start, stop)]
    padding = stop - start - sum(part.size(0) for part in parts)
    if padding:
        shape = (padding,) if tensor.columns is None else (padding, tensor.columns)
        parts.append(torch.zeros(shape, dtype=source.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _copy_files(files: list[Path], to: Path) -> None:
    to.mkdir()
    for path in files:
        shutil.copyfile(path, to / path.name)


def _objects(source: PublicCheckpoint) -> dict:
    extra_states = dict.fromkeys(extra_state_keys(source.architecture.num_layers))
    config = config_of_weights(source.model, source.precision)
    return {COMMON_STATE: summary.common_state(config, 0), **extra_states}


def _summary(source: PublicCheckpoint) -> dict:
    # No run wrote these weights: of a configuration only what they say is known.
    summary = summarize(config_of_weights(source.model, source.precision))
    return {**summary, IMPORTED_FROM: {"folder": str(source.folder), "form": source.form}}


def open_public(path: Path, option: str, reading: Reading = AS_IT_IS) -> PublicCheckpoint:
    """Recognise and check a folder or file of published weights.

    Args:
        path: the folder or file.
        option: the command-line option that named it, for messages.
        reading: what the user said about it.

    Raises:
        UserError: see :class:`HuggingFaceCheckpoint` and :class:`WeightsFile`; also if ``path`` is a folder and
            ``reading`` has sizes.
    """
    if path.is_file():
        return WeightsFile(path, option, reading)
    if path.suffix in READABLE and not path.exists():
        raise UserError(f"{option}: no file at {path}; nothing is fetched from a hub here, download it first")
    if reading.sizes:
        raise UserError(f"model.{next(iter(reading.sizes))}: a folder says it itself, in {CONFIG}; leave it out")
    return HuggingFaceCheckpoint(path, option, reading)
