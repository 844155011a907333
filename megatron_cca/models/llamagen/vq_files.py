"""Find LlamaGen's image tokenizer: a ``.pt`` file, or a folder with a single one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.errors import UserError

if TYPE_CHECKING:
    import torch

    from megatron_cca.models.llamagen.image_tokenizer import LlamaGenImageTokenizer

_SUFFIXES = (".pt", ".pth")


class LlamaGenVqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = "the .pt of LlamaGen's, such as vq_ds16_c2i.pt"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return bool(_files(path))

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> LlamaGenImageTokenizer:
        """See the protocol."""
        assert weights is None, "LlamaGen's checkpoints carry no image tokenizer"
        from megatron_cca.models.llamagen.image_tokenizer import open_llamagen_vq

        files = _files(path)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
            raise UserError(f"{path} holds {len(files)} .pt files ({names}); name the image tokenizer's itself")
        return open_llamagen_vq(files[0], device)


def _files(path: Path) -> list[Path]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in found if file.suffix in _SUFFIXES and file.is_file()]
