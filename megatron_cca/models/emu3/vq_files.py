"""Find Emu3's image tokenizer in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.models.emu3.vq_config import CONFIG

if TYPE_CHECKING:
    import torch

    from megatron_cca.models.emu3.image_tokenizer import Emu3ImageTokenizer


class Emu3VqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = f"the {CONFIG} and safetensors of Emu3's"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return (path / CONFIG).is_file()

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> Emu3ImageTokenizer:
        """See the protocol."""
        from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq

        return open_emu3_vq(path, device, weights=weights)
