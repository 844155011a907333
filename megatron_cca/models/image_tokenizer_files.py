"""How a family finds its image tokenizer on disk; no torch, which opening one imports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_cca.models.image_tokenizer_protocol import ImageTokenizer


class ImageTokenizerFiles(Protocol):
    """The files of a family's image tokenizer.

    Attributes:
        description: what they are, for messages.
    """

    description: str

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like one, by names alone."""

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> ImageTokenizer:
        """The image tokenizer in a file or folder that was recognised.

        Args:
            path: where its files lie.
            device: where it runs.
            weights: the folder of its tensors where they travel with a checkpoint; None means that they lie there too.

        Raises:
            UserError: a missing or damaged file, or one of another model; names it.
        """
