"""Export a Megatron checkpoint to a Hugging Face folder, or to a file of a family's authors, all or nothing.

A folder is written piece by piece. Every export lists its files in a hidden file beside them. A later export replaces
only these. ``config.json`` is removed first and written last: no program loads a folder without it as a model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca import __version__
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import (
    CHECKPOINT,
    FORMAT,
    HF_TEMPLATE,
    check_shape,
)
from megatron_cca.checkpoint.huggingface.megatron_checkpoint import (
    ExportTemplate,
    MegatronCheckpoint,
    template_from_checkpoint,
    template_from_folder,
)
from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.stored_tensors import ByteProgress
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.external_files import is_file_name
from megatron_cca.io.output_folders import check_apart, check_file, check_output, check_space, claimed, staging
from megatron_cca.io.outputs import OPTION, file_system_errors, whole_file
from megatron_cca.models import family_of
from megatron_cca.models.formats import HuggingFaceFormat, Json
from megatron_cca.models.naming import Naming
from megatron_cca.models.stock_llama import GRAMMAR, LLAMA, image_grammar
from megatron_cca.models.weight_files import CONFIG, row_ranges

_RECORD, _PARTIAL, _FORMER = ".megatron_cca_export.json", ".partial", ".former"
_UNFINISHED = frozenset({_PARTIAL, _FORMER})
_FIRST_AND_LAST = (CONFIG, _RECORD)
# Names that a file of weights may end in, as torch.save writes it.
_SUFFIXES = (".pt", ".pth")


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    form: str | None = None,
    template: str | Path | None = None,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> Path:
    """Convert a Megatron checkpoint, imported or trained, to a folder that ``from_pretrained`` loads.

    A family without such a folder on Hugging Face is exported as a file, see :func:`export_weights_file`.

    Args:
        checkpoint: a run folder, an import's output or an ``iter_`` folder.
        output: an empty or new folder, or the name of the file.
        form: ``original``, ``transformers``, or ``llama`` for stock engines. None means the template's form, else the
            form of the import, else ``original``.
        template: a Hugging Face folder. Its configuration, tokenizer and image tokenizer are copied. None means
            those that the import kept.
        overwrite: replace an earlier export in ``output``, and nothing else.
        progress_bar: show a progress bar on a terminal.

    Returns:
        ``output``.

    Raises:
        UserError: see :class:`MegatronCheckpoint`; also if ``form`` needs parts that are missing, ``output`` holds
            something else, or the disk is full.
    """
    source, output = MegatronCheckpoint(checkpoint, CHECKPOINT), Path(output)
    check_apart(output, source.folder, CHECKPOINT)
    if family_of(source.config.model).huggingface is None:
        for option, value in ((FORMAT, form), (HF_TEMPLATE, template)):
            if value is not None:
                raise UserError(f"{option}: means nothing to {source.config.model.name}, whose weights are one file")
        return export_weights_file(source, output, overwrite=overwrite, progress_bar=progress_bar)
    if template is None:
        copied = template_from_checkpoint(source.folder, CHECKPOINT)
    else:
        check_apart(output, Path(template), HF_TEMPLATE)
        copied = template_from_folder(Path(template), source.format, HF_TEMPLATE)
    naming = _naming(source, copied, form)
    config = _config(source, copied, naming)
    tensors = [*_companions(copied, naming, source.format, config), *_decoder(source, naming)]
    total = sum(tensor.num_bytes for tensor in tensors)
    with ExitStack() as stack:
        stack.enter_context(claimed(output))
        _undo_move(output)
        check_output(output, _exported_files(output), _UNFINISHED, overwrite=overwrite)
        partial = output / _PARTIAL
        stack.enter_context(staging(partial, total))
        progress = stack.enter_context(ByteProgress("exporting", total, shown=progress_bar))
        watched = [replace(tensor, pieces=progress.watch(tensor.pieces)) for tensor in tensors]
        write_safetensors(partial, watched)
        for path in copied.files:
            shutil.copyfile(path, partial / path.name)
        _write_config(partial / CONFIG, config, copied)
        if naming.form == LLAMA:
            (partial / GRAMMAR).write_text(json.dumps(image_grammar(source.architecture.vocabulary), indent=2) + "\n")
        _list_files(partial)
        _move_into_place(output)
    return output


def export_weights_file(source: MegatronCheckpoint, output: Path, *, overwrite: bool, progress_bar: bool) -> Path:
    """Write a checkpoint as a file that the programs of the family's authors load. The file is whole or does not exist.

    All weights are in memory during the export.

    Raises:
        UserError: the name does not end in .pt or .pth, the file exists, the disk is full, or another error of the
            file system.
    """
    if output.suffix not in _SUFFIXES:
        raise UserError(f"{OPTION}: {output}: this family's weights are one file; give a name that ends in .pt")
    check_file(output, overwrite=overwrite)
    buffers = source.format.buffers(source.architecture)
    total = source.dtype.itemsize * sum(map(math.prod, source.shapes.values()))
    total += sum(buffer.nbytes for buffer in buffers.values())
    with file_system_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        check_space(output.parent, total)
        with whole_file(output) as partial:
            state = _state(source, total, progress_bar) | buffers
            sections = source.format.sections
            _save({sections[0]: state} if sections else state, partial)
    return output


def _naming(source: MegatronCheckpoint, copied: ExportTemplate, form: str | None) -> Naming:
    if form is None:
        form = source.format.form(copied.config) if copied.config is not None else source.format.namings[0].form
    known = {naming.form: naming for naming in reversed(source.format.namings)}
    if form not in known:
        raise UserError(f"{FORMAT}: {source.config.model.name} has no {form} form; leave it out")
    return known[form]


def _config(source: MegatronCheckpoint, copied: ExportTemplate, naming: Naming) -> Json:
    dtype = str(source.dtype).removeprefix("torch.")
    try:
        return source.format.write_config(copied.config, source.architecture, dtype, naming.form)
    except UserError as error:
        raise UserError(f"{FORMAT} {naming.form}: {error} ({HF_TEMPLATE})") from None


def _decoder(source: MegatronCheckpoint, naming: Naming) -> Iterator[OutgoingTensor]:
    for name, shape in source.shapes.items():
        yield OutgoingTensor(naming.on_disk(name), shape, source.dtype, _pieces(source, name))


def _pieces(source: MegatronCheckpoint, name: str) -> Iterator[Tensor]:
    return (source.read(name, start, stop) for start, stop in row_ranges(source.shapes[name], source.dtype))


def _companions(
    copied: ExportTemplate, naming: Naming, format: HuggingFaceFormat, config: Json
) -> list[OutgoingTensor]:
    found = {bare: copied.tensors.tensors[name].shape for bare, name in copied.names.items()}
    with error_context(f"{copied.option}: {copied.config_file}"):
        wanted = format.companion_shapes(config, found)
    missing = sorted(wanted.keys() - copied.names.keys())
    if missing:
        raise UserError(
            f"{FORMAT} {naming.form}: tensor {naming.companion_on_disk(missing[0])} (and {len(missing) - 1} "
            f"more) is neither in the checkpoint nor in a template; give {HF_TEMPLATE} with a folder that has "
            "it"
        )
    extra = sorted(copied.names.keys() - wanted.keys()) if wanted else []
    if extra:
        raise UserError(f"{copied.option}: tensor {copied.names[extra[0]]} belongs to no part of {copied.config_file}")
    return [_companion(copied, bare, shape, naming.companion_on_disk(bare)) for bare, shape in wanted.items()]


def _companion(copied: ExportTemplate, bare: str, shape: tuple[int, ...], on_disk: str) -> OutgoingTensor:
    name = copied.names[bare]
    info = copied.tensors.tensors[name]
    check_shape(name, info, shape, copied.option)
    return OutgoingTensor(on_disk, shape, info.dtype, copied.tensors.pieces(name))


def _write_config(path: Path, config: Json, copied: ExportTemplate) -> None:
    if config == copied.config:
        shutil.copyfile(copied.config_file, path)
    else:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _list_files(folder: Path) -> None:
    """Write the names of all files in ``folder``, a finished export, to the hidden file."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / _RECORD).write_text(json.dumps({"version": __version__, "files": names}, indent=1) + "\n")


def _exported_files(folder: Path) -> list[str]:
    """Return the files of the export in ``folder`` with the hidden file. Empty if there is no export."""
    try:
        names = json.loads((folder / _RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    mine = isinstance(names, list) and all(is_file_name(name) for name in names)
    return [*names, _RECORD] if mine else []


def _move_into_place(output: Path) -> None:
    """Move all files from ``output/.partial`` to ``output``. If this fails, restore everything."""
    partial, former = output / _PARTIAL, output / _FORMER
    former.mkdir()
    try:
        _move(_exported_files(output), output, former, first=True)
        _move(_exported_files(partial), partial, output, first=False)
    except BaseException:
        _undo_move(output)
        raise
    partial.rmdir()
    shutil.rmtree(former, ignore_errors=True)


def _undo_move(output: Path) -> None:
    """Undo a move that did not finish, for example because the process was killed. Else do nothing."""
    partial, former = output / _PARTIAL, output / _FORMER
    if not former.is_dir():
        return
    # The list of the new files is moved last. If it is still in partial, some files have not been moved.
    for name in _exported_files(partial):
        if not (partial / name).exists():
            (output / name).unlink(missing_ok=True)
    if _exported_files(partial):
        _move([path.name for path in former.iterdir()], former, output, first=False)
    shutil.rmtree(former)


def _move(names: list[str], source: Path, target: Path, *, first: bool) -> None:
    def order(name: str) -> int:
        late = _FIRST_AND_LAST.index(name) + 1 if name in _FIRST_AND_LAST else 0
        return -late if first else late

    for name in sorted(names, key=order):
        if (source / name).exists():
            _replace(source / name, target / name)


# A name of its own, so that tests can let a move fail.
_replace = Path.replace


def _save(contents: dict[str, Tensor | dict[str, Tensor]], path: Path) -> None:
    try:
        # Given a path instead of an open file, torch.save hides the error of the file system.
        with path.open("wb") as file:
            torch.save(contents, file)
    except RuntimeError as error:
        # torch reports a failed write only as a file that is too short.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _state(source: MegatronCheckpoint, total_bytes: int, progress_bar: bool) -> dict[str, Tensor]:
    with ByteProgress("exporting", total_bytes, shown=progress_bar) as progress:
        read = (source.read(name, 0, shape[0]).contiguous() for name, shape in source.row_shapes.items())
        state = dict(zip(source.shapes, progress.watch(read), strict=True))
    return {name: state[name].view(shape) for name, shape in source.shapes.items()}
