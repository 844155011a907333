"""What lies under the name that a user gave: a folder of Hugging Face's, or a file of a family's own authors."""

from __future__ import annotations

from pathlib import Path

from megatron_cca.checkpoint.huggingface.source import HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.weights_file import SUFFIXES, WeightsFile
from megatron_cca.errors import UserError

PublicCheckpoint = HuggingFaceCheckpoint | WeightsFile


def open_public(path: Path, option: str, max_position_embeddings: int | None = None) -> PublicCheckpoint:
    """Recognise and check it.

    Args:
        path: the folder or file.
        option: the command-line option that named it, for messages.
        max_position_embeddings: of a file's model, whose weights do not tell; a folder says it itself.

    Raises:
        UserError: see :class:`HuggingFaceCheckpoint` and :class:`WeightsFile`.
    """
    if path.is_file():
        return WeightsFile(path, option, max_position_embeddings)
    if path.suffix in SUFFIXES and not path.exists():
        raise UserError(f"{option}: no file at {path}; nothing is fetched from a hub here, download it first")
    return HuggingFaceCheckpoint(path, option)
