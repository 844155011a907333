"""What an exported folder holds besides the decoder: kept since the import, or taken from a folder of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface.safetensors_files import INDEX, SINGLE, SafetensorsFolder
from megatron_cca.checkpoint.huggingface.source import CONFIG, companion_files, read_config, recognise
from megatron_cca.errors import UserError, said_of
from megatron_cca.models.huggingface_format import HuggingFaceFormat, Json, recognise_naming


@dataclass(frozen=True)
class Template:
    """Configuration, files and tensors that travel along.

    Attributes:
        option: the option by which messages name it.
        config: the contents of ``config.json``; None where nothing is known.
        config_file: the file itself.
        files: all other files to copy.
        tensors: where the tensors of ``names`` are.
        names: from their names without prefix to those in ``tensors``.
    """

    option: str
    config: Json | None = None
    config_file: Path | None = None
    files: tuple[Path, ...] = ()
    tensors: SafetensorsFolder | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def template_from_folder(folder: Path, format: HuggingFaceFormat, option: str) -> Template:
    """From a Hugging Face folder of the same family; of its tensors only those that are not the decoder's are used.

    It may have no safetensors at all.

    Raises:
        UserError: not a folder of this family, a configuration that is not this family's, damaged files.
    """
    config = read_config(folder, option)
    if recognise(config, folder, option) is not format:
        raise UserError(f"{option}: {folder} is of another family than the checkpoint")
    tensors, names = None, {}
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        tensors = SafetensorsFolder(folder, option)
        naming = recognise_naming(format.namings, tensors.tensors)
        names = {bare: name for name in tensors.tensors if (bare := naming.companion(name)) is not None}
    return _template(option, folder, config, tensors, names)


def template_from_checkpoint(checkpoint: Path, option: str) -> Template:
    """What the import, and every training run since, left in a checkpoint; an empty one where that is nothing."""
    folder, parts = checkpoint / layout.COMPANION_FILES, checkpoint / layout.COMPANION_TENSORS
    if not (folder / CONFIG).is_file():
        return Template(option)
    tensors = SafetensorsFolder(parts, option) if parts.is_dir() else None
    names = {name: name for name in tensors.tensors} if tensors else {}
    return _template(option, folder, read_config(folder, option), tensors, names)


def _template(
    option: str, folder: Path, config: Json, tensors: SafetensorsFolder | None, names: Mapping[str, str]
) -> Template:
    format = recognise(config, folder, option)
    with said_of(f"{option}: {folder / CONFIG}"):
        format.read_model_config(config)
    files = tuple(path for path in companion_files(folder) if path.name != CONFIG)
    return Template(option, config, folder / CONFIG, files, tensors, names)
