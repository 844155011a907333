"""Open and check everything that a tokenising job needs before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_cca.config import ModelConfig
from megatron_cca.data.image_tokenizers import open_image_tokenizer
from megatron_cca.data.resizing import DALI, check_resizing
from megatron_cca.data.sources import Source, open_source
from megatron_cca.data.text_tokenizers import TextTokenizer, open_text_tokenizer
from megatron_cca.data.tokenizing.parts import PartsFolder
from megatron_cca.data.tokenizing.tokenize_settings import TokenizeSettings
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.outputs import OPTION, check_apart
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, only_grid
from megatron_cca.models.image_tokenizer_protocol import ImageTokenizer
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class TokenizingJob:
    """The opened inputs of a job. ``text`` is None for a model of classes. ``grid`` is None for a model of any grid."""

    settings: TokenizeSettings
    source: Source
    vocabulary: ImageVocabulary
    images: ImageTokenizer | None
    text: TextTokenizer | None
    grid: tuple[int, int] | None
    parts: PartsFolder

    @property
    def skip_limit(self) -> int:
        """The number of records that may be skipped."""
        return int(self.settings.max_skipped * len(self.source))


def open_job(settings: TokenizeSettings, device: torch.device) -> TokenizingJob:
    """Open everything that a job needs.

    Args:
        settings: of the job.
        device: of the image tokenizer.

    Raises:
        UserError: something is missing, damaged or not the model's; names the option.
    """
    if settings.output.exists():
        raise UserError(f"{OPTION}: {settings.output} exists already; give another folder, or remove it")
    if settings.source.is_dir():
        check_apart(settings.output, settings.source, "--source")
    # Codes are not resized, so that the default library need not be installed.
    if settings.image_tokenizer is not None or settings.resize != DALI:
        check_resizing(settings.resize)
    architecture = _architecture(settings)
    vocabulary = architecture.vocabulary
    vocabulary.meta_text(2, 1, 1, settings.clip_meta)
    with error_context("--text-tokenizer"):
        text = _open_text(settings, vocabulary)
    grid = _grid(settings, architecture)
    images = None
    if settings.image_tokenizer is not None:
        with error_context("--image-tokenizer"):
            images = open_image_tokenizer(settings.image_tokenizer, device)
            if images.codebook_size != vocabulary.codebook_size:
                raise UserError(
                    f"{settings.image_tokenizer} has a codebook of {images.codebook_size}, model {settings.model} one "
                    f"of {vocabulary.codebook_size}"
                )
    with error_context("--source"):
        source = open_source(settings.source, settings.layout, settings.source_options)
    parts = PartsFolder(settings.output, len(source), settings.block)
    return TokenizingJob(settings, source, vocabulary, images, text, grid, parts)


def _grid(settings: TokenizeSettings, architecture: Architecture) -> tuple[int, int] | None:
    own = only_grid(architecture)
    if settings.grid is None:
        return own
    if own is None:
        raise UserError(f"--grid: model {settings.model} takes any, which follows from --area; leave it out")
    height, width = settings.grid
    if height != width:
        raise UserError(f"--grid: model {settings.model} takes square images alone, found {height} {width}")
    return settings.grid


def _architecture(settings: TokenizeSettings) -> Architecture:
    with error_context("--model"):
        architecture = resolve_architecture(settings.sizes or ModelConfig(name=settings.model))
        if not isinstance(architecture.vocabulary, ImageVocabulary):
            raise UserError(
                f"{settings.model} has a vocabulary of {architecture.vocabulary.size}, whose image tokens are not known"
            )
        return architecture


def _open_text(settings: TokenizeSettings, vocabulary: ImageVocabulary) -> TextTokenizer | None:
    if vocabulary.num_classes is not None:
        if settings.text_tokenizer is not None:
            raise UserError(f"model {settings.model} takes classes, not texts; leave it out")
        return None
    if settings.text_tokenizer is None:
        raise UserError(f"is missing; model {settings.model} takes texts: give the folder of its checkpoint")
    text = open_text_tokenizer(settings.text_tokenizer)
    if text.size != vocabulary.caption_size:
        raise UserError(
            f"{settings.text_tokenizer} has {text.size} words, model {settings.model} {vocabulary.caption_size}; give "
            "the folder of that model's checkpoint"
        )
    return text
