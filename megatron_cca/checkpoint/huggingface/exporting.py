"""Megatron -> Hugging Face, piece by piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_cca.checkpoint.huggingface.progress import ByteProgress
from megatron_cca.checkpoint.huggingface.safetensors_files import INDEX, OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.huggingface.source import CONFIG
from megatron_cca.checkpoint.huggingface.target import MegatronCheckpoint
from megatron_cca.checkpoint.huggingface.template import Template, template_from_checkpoint, template_from_folder
from megatron_cca.checkpoint.output import check_apart, check_output, staging
from megatron_cca.checkpoint.pieces import row_ranges
from megatron_cca.errors import UserError
from megatron_cca.models.huggingface import Json, Naming

OPTION, TEMPLATE_OPTION = "--checkpoint", "--hf-template"


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

    Args:
        checkpoint: a run folder, an import's output or an ``iter_`` folder.
        output: an empty or new folder.
        form: ``original`` or ``transformers``; None means the form it was imported from, or ``original``.
        template: a Hugging Face folder whose configuration, tokenizer and image tokenizer go along; None means those
            kept since the import.
        overwrite: replace a former export in ``output``.
        progress_bar: show one on a terminal.

    Returns:
        ``output``.

    Raises:
        UserError: see :class:`MegatronCheckpoint`; a form that needs parts which are not there; an output that holds
            something else; a full disk.
    """
    source, output = MegatronCheckpoint(checkpoint, OPTION), Path(output)
    partial = output / ".partial"
    check_apart(output, source.folder, OPTION)
    is_ours = partial.is_dir()
    check_output(output, partial, overwrite=overwrite, replaceable=lambda names: CONFIG in names or is_ours)
    if template is None:
        along = template_from_checkpoint(source.folder, OPTION)
    else:
        check_apart(output, Path(template), TEMPLATE_OPTION)
        along = template_from_folder(Path(template), source.format, TEMPLATE_OPTION)
    naming = _naming(source, along, form)
    dtype = str(source.dtype).removeprefix("torch.")
    config = source.format.write_config(along.config, source.architecture, dtype, naming.form)
    tensors = [*_companions(along, naming, source, config), *_decoder(source, naming)]
    total = sum(tensor.num_bytes for tensor in tensors)
    with staging(partial, total), ByteProgress("exporting", total, shown=progress_bar) as progress:
        write_safetensors(partial, [replace(t, pieces=progress.watch(t.pieces)) for t in tensors])
        for path in along.files:
            shutil.copyfile(path, partial / path.name)
        _write_config(partial / CONFIG, config, along)
        _move_into_place(partial, output)
    return output


def _naming(source: MegatronCheckpoint, along: Template, form: str | None) -> Naming:
    if form is None:
        form = source.format.form(along.config) if along.config is not None else source.format.namings[0].form
    return next(naming for naming in source.format.namings if naming.form == form)


def _decoder(source: MegatronCheckpoint, naming: Naming) -> Iterator[OutgoingTensor]:
    for name, shape in source.shapes.items():
        yield OutgoingTensor(naming.on_disk(name), shape, source.dtype, _pieces(source, name))


def _pieces(source: MegatronCheckpoint, name: str) -> Iterator[Tensor]:
    return (source.read(name, start, stop) for start, stop in row_ranges(source.shapes[name], source.dtype))


def _companions(along: Template, naming: Naming, source: MegatronCheckpoint, config: Json) -> list[OutgoingTensor]:
    wanted = source.format.companion_shapes(config) or {}
    names = along.names or {}
    missing = sorted(wanted.keys() - names.keys())
    if missing:
        raise UserError(
            f"--format {naming.form}: tensor {naming.companion_prefix}{missing[0]} (and {len(missing) - 1} more) is "
            f"neither in the checkpoint nor in a template; give {TEMPLATE_OPTION} with a folder that has it"
        )
    return [
        OutgoingTensor(f"{naming.companion_prefix}{bare}", info.shape, info.dtype, along.tensors.pieces(names[bare]))
        for bare in wanted
        for info in [along.tensors.tensors[names[bare]]]
    ]


def _write_config(path: Path, config: Json, along: Template) -> None:
    if config == along.config:
        shutil.copyfile(along.config_file, path)
    else:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _move_into_place(partial: Path, output: Path) -> None:
    # Without config.json nothing takes the folder for a model: it goes first and comes last.
    (output / CONFIG).unlink(missing_ok=True)
    for former in [*output.glob("model*.safetensors"), output / INDEX]:
        former.unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(output / path.name)
    partial.rmdir()
