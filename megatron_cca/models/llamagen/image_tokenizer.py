"""LlamaGen's image tokenizer: the authors' VQ-16 (``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt``), or one of its structure."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cca.errors import error_context
from megatron_cca.models.vq_directions import LLAMAGEN_FORM, DirectionTokenizer, check_directions, direction_tokenizer
from megatron_cca.models.vq_files import VqContents, VqFiles, read_vq_file


class LlamaGenVqFiles(VqFiles):
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = "the .pt of LlamaGen's, such as vq_ds16_c2i.pt"
    form = LLAMAGEN_FORM

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> DirectionTokenizer:
        """See the protocol."""
        assert weights is None, "LlamaGen's checkpoints carry no image tokenizer"
        return open_llamagen_vq(self.only_file(path), device)


def open_llamagen_vq(path: str | Path, device: str | torch.device = "cpu") -> DirectionTokenizer:
    """Open the image tokenizer in a ``.pt`` of the authors': their release, or a checkpoint of their training.

    If a file has several sets of weights, "model" is read, as the authors' sampling and code extraction do, and not the
    average "ema". Sizes are read from the shapes of tensors.

    Args:
        path: of the file.
        device: where it runs.

    Raises:
        UserError: a damaged file, one of another model, or a tensor that is missing, unknown or of a wrong shape.
    """
    path = Path(path)
    with error_context(path):
        contents = read_vq(path)
    return direction_tokenizer(contents, device)


def read_vq(path: Path) -> VqContents:
    """Return the contents of a file of the authors', as copies.

    Raises:
        UserError: as :func:`read_vq_file`, or a vector of the codebook without direction.
    """
    return check_directions(read_vq_file(path, LLAMAGEN_FORM))
