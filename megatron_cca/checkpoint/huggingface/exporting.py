"""Megatron -> Hugging Face, piece by piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_cca.checkpoint.huggingface import options, placing
from megatron_cca.checkpoint.huggingface.progress import ByteProgress
from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.huggingface.source import CONFIG, check_shape
from megatron_cca.checkpoint.huggingface.target import MegatronCheckpoint
from megatron_cca.checkpoint.huggingface.template import Template, template_from_checkpoint, template_from_folder
from megatron_cca.checkpoint.huggingface.weights_file import export_weights_file
from megatron_cca.checkpoint.pieces import row_ranges
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.outputs import check_apart, check_output, claimed, staging
from megatron_cca.models import family_of
from megatron_cca.models.huggingface_format import HuggingFaceFormat, Json, Naming


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    form: str | None = None,
    template: str | Path | None = None,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> Path:
    """Turn a Megatron checkpoint, imported or trained, into a folder that ``from_pretrained`` takes.

    A family that is on Hugging Face in no such form has its authors' own: one file, see :func:`export_weights_file`.

    Args:
        checkpoint: a run folder, an import's output or an ``iter_`` folder.
        output: an empty or new folder; or the file's name.
        form: ``original`` or ``transformers``; None means the template's, or the form it was imported from, or
            ``original``.
        template: a Hugging Face folder whose configuration, tokenizer and image tokenizer go along; None means those
            kept since the import.
        overwrite: replace a former export in ``output``, and nothing else.
        progress_bar: show one on a terminal.

    Returns:
        ``output``.

    Raises:
        UserError: see :class:`MegatronCheckpoint`; a form that needs parts which are not there; an output that holds
            something else; a full disk.
    """
    source, output = MegatronCheckpoint(checkpoint, options.CHECKPOINT), Path(output)
    check_apart(output, source.folder, options.CHECKPOINT)
    if family_of(source.config.model).huggingface is None:
        for option, value in ((options.FORMAT, form), (options.HF_TEMPLATE, template)):
            if value is not None:
                raise UserError(f"{option}: means nothing to {source.config.model.name}, whose weights are one file")
        return export_weights_file(source, output, overwrite=overwrite, progress_bar=progress_bar)
    if template is None:
        along = template_from_checkpoint(source.folder, options.CHECKPOINT)
    else:
        check_apart(output, Path(template), options.HF_TEMPLATE)
        along = template_from_folder(Path(template), source.format, options.HF_TEMPLATE)
    naming = _naming(source, along, form)
    config = _config(source, along, naming)
    tensors = [*_companions(along, naming, source.format, config), *_decoder(source, naming)]
    total = sum(tensor.num_bytes for tensor in tensors)
    with ExitStack() as stack:
        stack.enter_context(claimed(output))
        placing.undo(output)
        check_output(output, placing.listed(output), placing.UNFINISHED, overwrite=overwrite)
        partial = output / placing.PARTIAL
        stack.enter_context(staging(partial, total))
        progress = stack.enter_context(ByteProgress("exporting", total, shown=progress_bar))
        write_safetensors(partial, [replace(t, pieces=progress.watch(t.pieces)) for t in tensors])
        for path in along.files:
            shutil.copyfile(path, partial / path.name)
        _write_config(partial / CONFIG, config, along)
        placing.record(partial)
        placing.place(output)
    return output


def _naming(source: MegatronCheckpoint, along: Template, form: str | None) -> Naming:
    if form is None:
        form = source.format.form(along.config) if along.config is not None else source.format.namings[0].form
    return next(naming for naming in source.format.namings if naming.form == form)


def _config(source: MegatronCheckpoint, along: Template, naming: Naming) -> Json:
    dtype = str(source.dtype).removeprefix("torch.")
    try:
        return source.format.write_config(along.config, source.architecture, dtype, naming.form)
    except UserError as error:
        raise UserError(f"{options.FORMAT} {naming.form}: {error} ({options.HF_TEMPLATE})") from None


def _decoder(source: MegatronCheckpoint, naming: Naming) -> Iterator[OutgoingTensor]:
    for name, shape in source.shapes.items():
        yield OutgoingTensor(naming.on_disk(name), shape, source.dtype, _pieces(source, name))


def _pieces(source: MegatronCheckpoint, name: str) -> Iterator[Tensor]:
    return (source.read(name, start, stop) for start, stop in row_ranges(source.shapes[name], source.dtype))


def _companions(along: Template, naming: Naming, format: HuggingFaceFormat, config: Json) -> list[OutgoingTensor]:
    with said_of(f"{along.option}: {along.config_file}"):
        wanted = format.companion_shapes(config) or {}
    missing = sorted(wanted.keys() - along.names.keys())
    if missing:
        raise UserError(
            f"{options.FORMAT} {naming.form}: tensor {naming.companion_prefix}{missing[0]} (and {len(missing) - 1} "
            f"more) is neither in the checkpoint nor in a template; give {options.HF_TEMPLATE} with a folder that has "
            "it"
        )
    extra = sorted(along.names.keys() - wanted.keys()) if wanted else []
    if extra:
        raise UserError(f"{along.option}: tensor {along.names[extra[0]]} belongs to no part of {along.config_file}")
    return [_companion(along, bare, shape, f"{naming.companion_prefix}{bare}") for bare, shape in wanted.items()]


def _companion(along: Template, bare: str, shape: tuple[int, ...], on_disk: str) -> OutgoingTensor:
    name = along.names[bare]
    info = along.tensors.tensors[name]
    check_shape(name, info, shape, along.option)
    return OutgoingTensor(on_disk, shape, info.dtype, along.tensors.pieces(name))


def _write_config(path: Path, config: Json, along: Template) -> None:
    if config == along.config:
        shutil.copyfile(along.config_file, path)
    else:
        path.write_text(json.dumps(config, indent=2) + "\n")
