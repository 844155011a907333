"""From captions to pictures, for models whose shard folder carries its text tokenizer and patch codebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_cca.data.patch_codebook import FILE_NAME as CODEBOOK_FILE
from megatron_cca.data.patch_codebook import PatchCodebook
from megatron_cca.data.text import FILE_NAME as TOKENIZER_FILE
from megatron_cca.data.text import load_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.sampler import ImageRequest, SamplingSettings, sample_codes
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3.grammar import grid_text, sequence_length

# Image seeds of one run do not meet those of the next.
_SEEDS_PER_RUN = 1_000_000


class CaptionPainter:
    """Draws a caption's picture with a model.

    Args:
        shards: the folder that the model was trained on; its tokenizer and codebook are read.
        height, width: of the grid of visual tokens.

    Raises:
        UserError: a folder without tokenizer or codebook.
    """

    def __init__(self, shards: Path, height: int, width: int) -> None:
        for name in (TOKENIZER_FILE, CODEBOOK_FILE):
            if not (shards / name).is_file():
                raise UserError(f"shards: {shards / name} is missing; give a shard folder made with a patch codebook")
        self.tokenizer = load_tokenizer(shards)
        self.codebook = PatchCodebook.load(shards)
        self.height, self.width = height, width

    def paint(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        captions: Sequence[str],
        *,
        seed: int,
        guidance_scale: float = 0.0,
        on_progress: Callable[[int], None] = lambda images: None,
    ) -> np.ndarray:
        """One picture a caption: uint8 ``[N, H, W]``.

        Args:
            model, architecture: from :func:`megatron_cca.generation.loading.load_for_sampling`.
            captions: any text.
            seed: the same seed, caption and place in the list give the same picture.
            guidance_scale: s in (1 + s) cond - s uncond; 0 is guidance-free.
            on_progress: called with the number of pictures just finished.

        Raises:
            UserError: a caption too long for the model's positions.
        """
        words = self.tokenizer.encode(grid_text(self.height, self.width)).ids
        requests = []
        for index, caption in enumerate(captions):
            ids = np.array(self.tokenizer.encode(caption).ids, dtype=np.int64)
            self._check_length(caption, len(ids), len(words), architecture)
            requests.append(ImageRequest(ids, seed * _SEEDS_PER_RUN + index))
        settings = SamplingSettings(self.height, self.width, words, guidance_scale=guidance_scale)
        return self.codebook.decode(sample_codes(model, architecture.vocabulary, requests, settings, on_progress))

    def _check_length(self, caption: str, tokens: int, words: int, architecture: Architecture) -> None:
        surplus = sequence_length(tokens, words, self.height, self.width) - architecture.max_position_embeddings
        if surplus > 0:
            raise UserError(
                f"caption {caption[:40]!r}: {surplus} tokens too long for the model's positions; shorten it"
            )
