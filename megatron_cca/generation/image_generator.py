"""Generate images for prompts: encode captions, sample codes over all ranks, decode codes to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca import platform
from megatron_cca.config import Precision
from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes
from megatron_cca.generation.model_loading import (
    InspectedCheckpoint,
    Tokenizers,
    inspect_for_sampling,
    load_for_sampling,
    open_tokenizers,
)
from megatron_cca.generation.prompts import Prompt, caption_ids, negative_ids
from megatron_cca.models.architecture import Architecture, grid_misfit

# Tokens that pass through the image tokenizer together: 64 images of 16 x 16 codes, or one of Emu3's.
_TOKENS_DECODED = 16_384

OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class GeneratedImages:
    """Generated images, in the order of the prompts.

    Attributes:
        images: uint8 ``[N, H, W, 3]``.
        codes: int64 ``[N, h, w]``, codebook indices.
    """

    images: np.ndarray
    codes: np.ndarray


class ImageGenerator:
    """A model with its tokenizers, which generates images for prompts.

    Args:
        chunks: this rank's model chunks, frozen or in training.
        architecture: of the model.
        tokenizers: of the model.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], architecture: Architecture, tokenizers: Tokenizers) -> None:
        self.chunks, self.architecture, self.tokenizers = chunks, architecture, tokenizers

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        negative: str = "",
        on_progress: OnProgress = lambda images: None,
        on_tokens: OnProgress = lambda tokens: None,
    ) -> GeneratedImages:
        """Generate all images and return them on every rank.

        Data-parallel ranks share the work. Collective over all ranks.

        Args:
            prompts: with seeds.
            settings: how to draw.
            negative: the second stream's caption where there is one. Empty for the unconditional one.
            on_progress: called with the number of images that were just finished, on the rank that finished them.
            on_tokens: called on every rank that draws, with the number of tokens that were just drawn.

        Raises:
            UserError: a caption that is too long for the model's positions, or a grid that does not fit.
        """
        group = parallel_state.get_data_parallel_group()
        mine = range(group.rank(), len(prompts), group.size())
        requests = self.requests(prompts, settings, negative)
        own = [requests[index] for index in mine]
        parts = _parts(own, settings.batch_size, on_progress)
        drawn = [self._drawn(part, settings, on_tokens) for part in parts]
        return _gathered(drawn, len(prompts), settings, group)

    def requests(self, prompts: Sequence[Prompt], settings: SamplingSettings, negative: str = "") -> list[ImageRequest]:
        """Return the requests for :func:`sample_codes`. The arguments and errors are those of :meth:`generate`."""
        vocabulary, text = self.architecture.vocabulary, self.tokenizers.text
        captions = [caption_ids(vocabulary, text, prompt) for prompt in prompts]
        # By the number of ids of the caption.
        second: dict[int, np.ndarray] = {}
        if settings.forwards_per_token == 2:
            for length in {len(caption) for caption in captions}:
                ids = negative_ids(vocabulary, text, negative, length)
                second[length] = self._prompt_ids(negative, ids, settings)
        return [
            ImageRequest(self._prompt_ids(prompt.title, caption, settings), prompt.seed, second.get(len(caption)))
            for prompt, caption in zip(prompts, captions, strict=True)
        ]

    def codes(
        self,
        requests: Sequence[ImageRequest],
        settings: SamplingSettings,
        on_tokens: OnProgress = lambda tokens: None,
    ) -> np.ndarray:
        """Draw codes int64 ``[N, h, w]`` for this replica's own requests. Collective over its model-parallel ranks."""
        return sample_codes(self.chunks, self.architecture.vocabulary, requests, settings, on_tokens)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes int64 ``[N, h, w]`` to images uint8 ``[N, H, W, 3]``."""
        at_once = max(1, _TOKENS_DECODED // (codes.shape[1] * codes.shape[2]))
        parts = torch.from_numpy(codes).split(at_once)
        return np.concatenate([self.tokenizers.images.decode(part).cpu().numpy() for part in parts])

    def _drawn(
        self,
        requests: Sequence[ImageRequest],
        settings: SamplingSettings,
        on_tokens: OnProgress,
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = self.codes(requests, settings, on_tokens)
        return self.decode(codes), codes

    def _prompt_ids(self, title: str, caption: np.ndarray, settings: SamplingSettings) -> np.ndarray:
        vocabulary = self.architecture.vocabulary
        meta_text = vocabulary.meta_text(1, settings.height, settings.width)
        meta_ids = np.array(self.tokenizers.text.encode(meta_text) if meta_text else [], dtype=np.int64)
        self._check_length(title, caption, meta_ids, settings)
        return vocabulary.prompt(caption, meta_ids)

    def _check_length(self, title: str, caption: np.ndarray, meta_ids: np.ndarray, settings: SamplingSettings) -> None:
        height, width, vocabulary = settings.height, settings.width, self.architecture.vocabulary
        misfit = grid_misfit(self.architecture, 1, height, width)
        if misfit is not None:
            raise UserError(f"grid {height}*{width}: {misfit}")
        positions = self.architecture.max_position_embeddings
        fixed, whole = (vocabulary.sequence_length(size, len(meta_ids), height, width) for size in (0, len(caption)))
        grid = f"{height}*{width}"
        if fixed > positions:
            raise UserError(f"grid {grid}: takes {fixed} tokens, the model has {positions} positions; take a smaller")
        if whole > positions:
            raise UserError(
                f"prompt {title[:40]!r}: {len(caption)} tokens, but a grid of {grid} leaves {positions - fixed} of the "
                f"model's {positions} positions; shorten it by {whole - positions}"
            )


def open_image_generator(
    checkpoint: str | InspectedCheckpoint,
    *,
    text_tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
    precision: Precision | None = None,
    before_loading: Callable[[ImageGenerator], object] = lambda generator: None,
) -> ImageGenerator:
    """Open a checkpoint for generation, over all ranks of the job. Process groups must be initialised.

    Args:
        checkpoint: see :func:`load_for_sampling`, or one inspected already.
        text_tokenizer, image_tokenizer: folders. None means those that belong to the checkpoint.
        precision: of the model. None means the checkpoint's.
        before_loading: called with the generator once it has tokenizers but no weights, to refuse what does not fit.

    Raises:
        UserError: see :func:`load_for_sampling` and :func:`open_tokenizers`.
    """
    found = inspect_for_sampling(checkpoint) if isinstance(checkpoint, str) else checkpoint
    tokenizers = open_tokenizers(
        found.folder,
        found.config,
        found.architecture.vocabulary,
        text=text_tokenizer,
        images=image_tokenizer,
        device=platform.device(),
    )
    generator = ImageGenerator([], found.architecture, tokenizers)
    before_loading(generator)
    generator.chunks = load_for_sampling(found, precision).chunks
    return generator


def _parts(requests: Sequence[ImageRequest], size: int, on_progress: OnProgress) -> Iterator[Sequence[ImageRequest]]:
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        yield part
        on_progress(len(part))


def _gathered(
    drawn: list[tuple[np.ndarray, np.ndarray]], total: int, settings: SamplingSettings, group: dist.ProcessGroup
) -> GeneratedImages:
    mine = tuple(np.concatenate(parts) for parts in zip(*drawn, strict=True)) if drawn else None
    everyone = [mine]
    if group.size() > 1:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
    images, codes = ([share[place] for share in everyone if share is not None] for place in (0, 1))
    return GeneratedImages(_interleaved(images, total), _interleaved(codes, total))


def _interleaved(shares: Sequence[np.ndarray], total: int) -> np.ndarray:
    """Return the rows of all ranks in their order. Rank r has rows r, r + size, ..."""
    whole = np.empty((total, *shares[0].shape[1:]), dtype=shares[0].dtype)
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
