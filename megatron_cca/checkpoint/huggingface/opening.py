"""What lies under the name that a user gave: a folder of Hugging Face's, or a file of a family's own authors."""

from __future__ import annotations

from pathlib import Path

from megatron_cca.checkpoint.huggingface.options import AS_IT_IS, Reading
from megatron_cca.checkpoint.huggingface.source import CONFIG, HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.weights_file import READABLE, WeightsFile
from megatron_cca.errors import UserError

PublicCheckpoint = HuggingFaceCheckpoint | WeightsFile


def open_public(path: Path, option: str, reading: Reading = AS_IT_IS) -> PublicCheckpoint:
    """Recognise and check it.

    Args:
        path: the folder or file.
        option: the command-line option that named it, for messages.
        reading: what the user said of it.

    Raises:
        UserError: see :class:`HuggingFaceCheckpoint` and :class:`WeightsFile`; sizes said of a folder.
    """
    if path.is_file():
        return WeightsFile(path, option, reading)
    if path.suffix in READABLE and not path.exists():
        raise UserError(f"{option}: no file at {path}; nothing is fetched from a hub here, download it first")
    if reading.sizes:
        raise UserError(f"model.{next(iter(reading.sizes))}: a folder says it itself, in {CONFIG}; leave it out")
    return HuggingFaceCheckpoint(path, option, reading)
