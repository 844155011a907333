"""Run a tokenising job on one process of several. Everything is opened and checked before anything is written."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_cca import __version__
from megatron_cca.config import ModelConfig
from megatron_cca.data.codebooks import keep_codebook
from megatron_cca.data.outcomes import Compared, Skipped, all_skipped
from megatron_cca.data.parts import SKIPPED, Part, PartsFolder, PartsProgress, PartWriter, Span, join_notes
from megatron_cca.data.resizing import DALI, check_resizing
from megatron_cca.data.shard_writing import merge_shards
from megatron_cca.data.sources import Source, open_source
from megatron_cca.data.sources.source_protocol import SkipReasons, SomeRecords, read_skip_reasons
from megatron_cca.data.tiny_sizes import model_entry
from megatron_cca.data.tokenizers import (
    TextTokenizer,
    check_scales,
    open_image_tokenizer,
    open_text_tokenizer,
    tokenizer_facts,
)
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.fitting import (
    FITTED,
    check_fitting,
    fitted,
    fitted_before,
    fitted_facts,
    to_be_fitted,
    unfitted,
    with_sizes_of,
)
from megatron_cca.data.tokenizing.samples import Prepared, SampleMaker, class_notices
from megatron_cca.errors import UserError, error_context, one_line
from megatron_cca.io.output_folders import check_apart, claimed, remove_beside_others
from megatron_cca.io.outputs import OPTION, file_system_errors
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, only_grid
from megatron_cca.models.formats import ImageTokenizer
from megatron_cca.models.image_vocabulary import ImageVocabulary

# Records that are decoded together, while those before them are encoded.
_CHUNK = 64
_POLL_SECONDS = 0.5
# In pixels, as Emu3's authors have it.
_AREA = 720 * 720


@dataclass(frozen=True)
class TokenizingResult:
    """What a job wrote: ``samples``, ``pairs`` of them, ``skipped`` records or images, the reasons, counted, and the
    speed of all processes.
    """

    samples: int
    skipped: int
    records_per_second: float
    reasons: str = ""
    pairs: int = 0


def tokenize(settings: TokenizeSettings, rank: int, world_size: int, device: torch.device) -> TokenizingResult | None:
    """Do this process's share. Process 0 then waits for the others and merges all parts into the shard folder.

    The same call continues an interrupted job, on any number of processes. The result depends on neither.

    Args:
        settings: the same on every process.
        rank, world_size: of the job. The processes share only the file system.
        device: of the image tokenizer.

    Returns:
        The result on process 0, None elsewhere.

    Raises:
        UserError: bad input, too many skipped records, a full disk, or another job on the same output.
    """
    try:
        return _tokenize_share(settings, rank, world_size, device)
    except UserError:
        # Process 0 has finished and removed the parts. It finishes only after this process's share is done. If the
        # output were an older one, process 0 would refuse it.
        if rank != 0 and settings.output.exists():
            return None
        raise


@dataclass(frozen=True)
class TokenizingJob:
    """The opened inputs of a job. ``text`` is None for a model of classes. ``grid`` is None for a model of any grid."""

    settings: TokenizeSettings
    source: Source
    architecture: Architecture
    images: ImageTokenizer | None
    text: TextTokenizer | None
    grid: tuple[int, int] | None
    parts: PartsFolder

    @property
    def vocabulary(self) -> ImageVocabulary:
        """The vocabulary of the model."""
        return self.architecture.vocabulary

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
    check_fitting(settings)
    # Codes are not resized, so that the default library need not be installed.
    if settings.image_tokenizer is not None or settings.fit_codebook is not None or settings.resize != DALI:
        check_resizing(settings.resize)
    source, patches = None, fitted_before(settings)
    if patches is not None or settings.fit_codebook is not None:
        source = _open_source(settings)
        settings = with_sizes_of(settings, source, patches or to_be_fitted(settings, source))
    settings = replace(settings, area=settings.area or _AREA)
    architecture = _architecture(settings)
    vocabulary = architecture.vocabulary
    vocabulary.meta_text(2, 1, 1, settings.clip_meta)
    with error_context("--text-tokenizer"):
        text = _open_text(settings, vocabulary)
    grid = _grid(settings, architecture)
    if settings.crops and grid is None:
        raise UserError(f"--crops: model {settings.model} takes images of any size, as they are; leave it out")
    images = None if settings.fit_codebook is None else unfitted(settings, architecture)
    if settings.image_tokenizer is not None:
        with error_context("--image-tokenizer"):
            images = open_image_tokenizer(settings.image_tokenizer, device, architecture.scales)
            if images.codebook_size != vocabulary.codebook_size:
                raise UserError(
                    f"{settings.image_tokenizer} has a codebook of {images.codebook_size}, model {settings.model} one "
                    f"of {vocabulary.codebook_size}"
                )
            with error_context(settings.image_tokenizer):
                check_scales(images, architecture.scales)
    source = _open_source(settings) if source is None else source
    parts = PartsFolder(settings.output, len(source), settings.block)
    return TokenizingJob(settings, source, architecture, images, text, grid, parts)


def _open_source(settings: TokenizeSettings) -> Source:
    with error_context("--source"):
        source = open_source(settings.source, settings.layout, settings.source_options)
    if settings.limit is None or settings.limit >= len(source):
        return source
    return SomeRecords(source, settings.limit)


def _grid(settings: TokenizeSettings, architecture: Architecture) -> tuple[int, int] | None:
    own = only_grid(architecture)
    if settings.grid is None:
        return own
    if own is None:
        raise UserError(f"--grid: model {settings.model} takes any, which follows from --area; leave it out")
    if architecture.scales:
        raise UserError(f"--grid: model {settings.model} takes the codes of one pyramid of grids alone; leave it out")
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
    if settings.text_tokenizer is None and settings.fit_codebook is not None:
        return None
    if settings.text_tokenizer is None:
        raise UserError(f"is missing; model {settings.model} takes texts: give the folder of its checkpoint")
    text = open_text_tokenizer(settings.text_tokenizer)
    if text.size != vocabulary.text_size:
        raise UserError(
            f"{settings.text_tokenizer} has {text.size} ids, model {settings.model} {vocabulary.text_size}; give "
            "the folder of that model's checkpoint"
        )
    return text


def _tokenize_share(
    settings: TokenizeSettings, rank: int, world_size: int, device: torch.device
) -> TokenizingResult | None:
    job = open_job(settings, device)
    with (
        file_system_errors(settings.output),
        claimed(job.parts.scratch(rank)),
        fitted(job, rank, device) as job,
        job.parts.begun(_description(job), leads=rank == 0),
    ):
        # Rank 0 alone, since this may walk through all files.
        notices = [*class_notices(job.source, job.vocabulary), *job.source.notices()] if rank == 0 else []
        for notice in notices:
            print(f"--source: {one_line(notice)}", file=sys.stderr, flush=True)
        with PartsProgress(job.parts, len(job.source), shown=rank == 0) as progress:
            _write_parts(job, rank, world_size, device, progress)
            if rank != 0:
                return None
            while not job.parts.is_complete():
                time.sleep(_POLL_SECONDS)
                progress.refresh()
        parts, speed = job.parts.done(), progress.per_second()
        _merge(job, parts, notices)
        reasons = read_skip_reasons(part.folder / SKIPPED for part in parts).line()
        remove_beside_others(job.parts.folder)
        samples, skipped, pairs = (
            sum(getattr(part, what) for part in parts) for what in ("samples", "skipped", "pairs")
        )
        return TokenizingResult(samples, skipped, speed, reasons, pairs)


def _description(job: TokenizingJob) -> dict:
    """Return all facts that the tokens depend on."""
    settings = job.settings
    return {
        "source": job.source.fingerprint(),
        "records": len(job.source),
        "vocabulary": job.vocabulary.fingerprint(),
        "image_tokenizer": job.images.fingerprint() if job.images is not None else None,
        "text_tokenizer": job.text.fingerprint() if job.text is not None else None,
        "area": settings.area,
        **_optional_facts(job),
        "max_caption_tokens": settings.max_caption_tokens,
        "max_pixels": settings.limits.max_pixels,
        "block": settings.block,
        "version": __version__,
    }


def _optional_facts(job: TokenizingJob) -> dict:
    """Return the facts that have no entry by default, so that older jobs and shards without them still match."""
    resize = None if job.settings.resize == DALI else job.settings.resize
    facts = {"grid": job.grid and list(job.grid), "flips": job.settings.flips or None, "resize": resize}
    facts["crops"] = job.settings.crops or None
    facts[FITTED] = fitted_facts(job)
    facts["model"] = _model_entry(job)
    return {name: value for name, value in facts.items() if value is not None}


def _model_entry(job: TokenizingJob) -> dict | None:
    """Return the sizes of the vocabulary for a tiny preset, which takes them from its data. None for other models."""
    name = job.settings.model if job.settings.sizes is None else job.settings.sizes.name
    return model_entry(name, job.vocabulary)


def _write_parts(job: TokenizingJob, rank: int, world_size: int, device: torch.device, progress: PartsProgress) -> None:
    spans = list(job.parts.todo(rank, world_size))
    if not spans:
        return
    maker = SampleMaker(job.source, job.vocabulary, job.images, job.text, device, job.settings, job.grid)
    maker.check_some(job.settings.max_skipped)
    reasons = SkipReasons()
    with ThreadPoolExecutor(1) as ahead:
        for span in spans:
            with PartWriter(job.parts, rank, span[0], job.vocabulary) as writer:
                for prepared in _prepared(maker, span, ahead):
                    outcomes = maker.encode(prepared)
                    writer.add(outcomes)
                    faults = [skipped for skipped in all_skipped(outcomes) if skipped.is_fault]
                    progress.count(len(outcomes), len(faults))
                    for fault in faults:
                        reasons.add(fault.reason)
                    _check_skip_limit(job, progress.faults, faults, reasons)
            progress.refresh()


def _prepared(
    maker: SampleMaker, span: Span, ahead: ThreadPoolExecutor
) -> Iterator[list[Prepared | Skipped | Compared]]:
    """Yield the chunks of a span. Each is prepared while the one before is in use."""
    # An interrupted part ends with a whole chunk, so that batches do not depend on interruptions.
    edges = [*range(*span, _CHUNK), span[1]]
    following = ahead.submit(maker.prepare, range(edges[0], edges[1]))
    for start, stop in zip(edges[1:], [*edges[2:], None], strict=True):
        prepared = following.result()
        if stop is not None:
            following = ahead.submit(maker.prepare, range(start, stop))
        yield prepared


def _check_skip_limit(job: TokenizingJob, skipped: int, latest: list[Skipped], reasons: SkipReasons) -> None:
    if skipped > job.skip_limit:
        last = f"; the last, {latest[-1].name}: {latest[-1].reason}" if latest else ""
        if len(reasons) > 1:
            last = f"; {reasons.line()}"
        raise UserError(
            f"--source: {skipped} of {len(job.source)} records cannot be used, --max-skipped "
            f"{job.settings.max_skipped:g} allows {job.skip_limit}{last}"
        )


def _merge(job: TokenizingJob, parts: list[Part], notices: list[str]) -> None:
    skipped, faults = sum(part.skipped for part in parts), sum(part.faults for part in parts)
    _check_skip_limit(job, faults, [], read_skip_reasons(part.folder / SKIPPED for part in parts))
    if not any(part.samples for part in parts):
        raise UserError(f"--source: none of the {len(job.source)} records can be used; see {parts[0].folder / SKIPPED}")

    def write_extras(folder: Path) -> None:
        if job.text is not None:
            job.text.save(folder)
        join_notes(folder, parts, SKIPPED)
        if job.settings.image_tokenizer is not None:
            keep_codebook(folder, job.settings.image_tokenizer)

    # Inside the folder of parts, so that its remains after a kill are removed with the parts.
    aside = job.parts.scratch(0) / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    merge_shards(
        job.settings.output,
        [part.folder for part in parts],
        job.vocabulary,
        None if job.text is None else job.text.encode,
        write_extras,
        _facts(job, skipped, notices),
        aside,
        job.settings.clip_meta,
    )


def _facts(job: TokenizingJob, skipped: int, notices: list[str]) -> dict:
    """Return the facts in the manifest about the origin of the tokens."""
    settings = job.settings
    made_by = settings.image_tokenizer if settings.fit_codebook is None else settings.output
    return {
        "skipped": skipped,
        **tokenizer_facts(job.text, job.images, made_by),
        "source": {"path": str(settings.source), "fingerprint": job.source.fingerprint(), **_notices_entry(notices)},
        "area": settings.area,
        **_optional_facts(job),
        "version": __version__,
    }


def _notices_entry(notices: list[str]) -> dict:
    """Return the notices of the source's reader.

    There is no entry without notices, as in shards of earlier versions.
    """
    return {"notices": [one_line(notice) for notice in notices]} if notices else {}
