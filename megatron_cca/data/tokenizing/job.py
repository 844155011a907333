"""A tokenising job on one process of several."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cca import __version__
from megatron_cca.config import ModelConfig
from megatron_cca.data.image_tokenizers import open_image_tokenizer
from megatron_cca.data.patch_codebook import FILE_NAME as CODEBOOK_FILE
from megatron_cca.data.shards import merge_shards
from megatron_cca.data.sources import Source, open_source
from megatron_cca.data.text import TextTokenizer, open_text_tokenizer
from megatron_cca.data.tokenizing.parts import SKIPPED, Part, PartsFolder, PartWriter, Span
from megatron_cca.data.tokenizing.progress import Progress
from megatron_cca.data.tokenizing.samples import Prepared, SampleMaker, Skipped
from megatron_cca.data.tokenizing.settings import TokenizeSettings
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3.grammar import meta_text
from megatron_cca.models.emu3.vocabulary import Emu3Vocabulary
from megatron_cca.models.image_tokenizers import ImageTokenizer
from megatron_cca.output import OPTION, check_apart, claimed, file_system_errors

# Records that are decoded together, while those before them are encoded.
_CHUNK = 64
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Result:
    """What a job wrote: ``samples`` in the shard folder, ``skipped`` records; the speed of all its processes."""

    samples: int
    skipped: int
    images_per_second: float


@dataclass(frozen=True)
class _Job:
    settings: TokenizeSettings
    source: Source
    vocabulary: Emu3Vocabulary
    images: ImageTokenizer | None
    text: TextTokenizer
    parts: PartsFolder

    @property
    def skip_limit(self) -> int:
        return int(self.settings.max_skipped * len(self.source))


def tokenize(settings: TokenizeSettings, rank: int, world_size: int, device: torch.device) -> Result | None:
    """Do this process's share; process 0 then waits for the others and merges all parts into the shard folder.

    The same call continues an interrupted job, on any number of processes; the result does not depend on either.

    Args:
        settings: the same on every process.
        rank, world_size: of the job; the processes meet in the file system alone.
        device: of the image tokenizer.

    Returns:
        On process 0 what was written; None elsewhere.

    Raises:
        UserError: bad input, too many records skipped, a full disk, another job on the same output; one line.
    """
    try:
        return _share(settings, rank, world_size, device)
    except UserError:
        # Process 0 has finished, which it cannot before this one's share is done, and has put everything away under
        # this one's feet. Were the output an older one, process 0 would refuse it.
        if rank != 0 and settings.output.exists():
            return None
        raise


def _share(settings: TokenizeSettings, rank: int, world_size: int, device: torch.device) -> Result | None:
    job = _open(settings, device)
    with (
        file_system_errors(settings.output),
        claimed(job.parts.scratch(rank)),
        job.parts.begun(_description(job), leads=rank == 0),
    ):
        with Progress(job.parts, len(job.source), shown=rank == 0) as progress:
            _write_parts(job, rank, world_size, device, progress)
            if rank != 0:
                return None
            while not job.parts.is_complete():
                time.sleep(_POLL_SECONDS)
                progress.refresh()
        parts, speed = job.parts.done(), progress.per_second()
        _merge(job, parts)
        shutil.rmtree(job.parts.folder)
        return Result(sum(part.samples for part in parts), sum(part.skipped for part in parts), speed)


def _open(settings: TokenizeSettings, device: torch.device) -> _Job:
    if settings.output.exists():
        raise UserError(f"{OPTION}: {settings.output} exists already; give another folder, or remove it")
    if settings.source.is_dir():
        check_apart(settings.output, settings.source, "--source")
    meta_text(2, 1, 1, settings.clip_meta)
    vocabulary = _vocabulary(settings.model)
    with said_of("--text-tokenizer"):
        text = open_text_tokenizer(settings.text_tokenizer)
        if text.size != vocabulary.text_size:
            raise UserError(
                f"{settings.text_tokenizer} has {text.size} words, model {settings.model} {vocabulary.text_size}; give "
                "the folder of that model's checkpoint"
            )
    images = None
    if settings.image_tokenizer is not None:
        with said_of("--image-tokenizer"):
            images = open_image_tokenizer(settings.image_tokenizer, device)
            if images.codebook_size != vocabulary.codebook_size:
                raise UserError(
                    f"{settings.image_tokenizer} has a codebook of {images.codebook_size}, model {settings.model} one "
                    f"of {vocabulary.codebook_size}"
                )
    with said_of("--source"):
        source = open_source(settings.source, settings.layout, settings.source_options)
    return _Job(settings, source, vocabulary, images, text, PartsFolder(settings.output, len(source), settings.block))


def _vocabulary(model: str) -> Emu3Vocabulary:
    with said_of("--model"):
        return resolve_architecture(ModelConfig(name=model)).vocabulary


def _description(job: _Job) -> dict:
    """All that the tokens depend on."""
    settings = job.settings
    return {
        "source": job.source.fingerprint(),
        "records": len(job.source),
        "vocabulary": job.vocabulary.fingerprint(),
        "image_tokenizer": job.images.fingerprint() if job.images is not None else None,
        "text_tokenizer": job.text.fingerprint(),
        "area": settings.area,
        "max_caption_tokens": settings.max_caption_tokens,
        "max_pixels": settings.limits.max_pixels,
        "block": settings.block,
        "version": __version__,
    }


def _write_parts(job: _Job, rank: int, world_size: int, device: torch.device, progress: Progress) -> None:
    spans = list(job.parts.todo(rank, world_size))
    if not spans:
        return
    maker = SampleMaker(job.source, job.vocabulary, job.images, job.text, device, job.settings)
    with ThreadPoolExecutor(1) as ahead:
        for span in spans:
            with PartWriter(job.parts, rank, span[0], job.vocabulary) as writer:
                for prepared in _prepared(maker, span, ahead):
                    outcomes = maker.encode(prepared)
                    writer.add(outcomes)
                    skips = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
                    progress.count(len(outcomes), len(skips))
                    _check_skips(job, progress.skipped, skips)
            progress.refresh()


def _prepared(maker: SampleMaker, span: Span, ahead: ThreadPoolExecutor) -> Iterator[list[Prepared | Skipped]]:
    """The span's chunks, each prepared while the one before is in use."""
    # An interrupted part ends with a chunk, so that what is encoded together does not depend on interruptions.
    edges = [*range(*span, _CHUNK), span[1]]
    following = ahead.submit(maker.prepare, range(edges[0], edges[1]))
    for start, stop in zip(edges[1:], [*edges[2:], None], strict=True):
        prepared = following.result()
        if stop is not None:
            following = ahead.submit(maker.prepare, range(start, stop))
        yield prepared


def _check_skips(job: _Job, skipped: int, latest: list[Skipped]) -> None:
    if skipped > job.skip_limit:
        last = f"; the last, {latest[-1].name}: {latest[-1].reason}" if latest else ""
        raise UserError(
            f"--source: {skipped} of {len(job.source)} records cannot be used, --max-skipped "
            f"{job.settings.max_skipped:g} allows {job.skip_limit}{last}"
        )


def _merge(job: _Job, parts: list[Part]) -> None:
    skipped = sum(part.skipped for part in parts)
    _check_skips(job, skipped, [])
    if skipped == len(job.source):
        raise UserError(f"--source: none of the {skipped} records can be used; see {parts[0].folder / SKIPPED}")

    def write_extras(folder: Path) -> None:
        job.text.save(folder)
        with (folder / SKIPPED).open("w", encoding="utf-8") as file:
            for part in parts:
                file.write((part.folder / SKIPPED).read_text(encoding="utf-8"))
        codebook = job.settings.image_tokenizer and job.settings.image_tokenizer / CODEBOOK_FILE
        if codebook and codebook.is_file():
            shutil.copyfile(codebook, folder / CODEBOOK_FILE)

    # Below the parts, so that what a kill leaves of it goes with them.
    aside = job.parts.scratch(0) / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    merge_shards(
        job.settings.output,
        [part.folder for part in parts],
        job.vocabulary,
        job.text.encode,
        write_extras,
        _facts(job, skipped),
        aside,
        job.settings.clip_meta,
    )


def _facts(job: _Job, skipped: int) -> dict:
    """What the manifest says of where the tokens came from."""
    settings, images = job.settings, None
    if job.images is not None:
        folder = str(settings.image_tokenizer.resolve())
        images = {"kind": job.images.kind, "fingerprint": job.images.fingerprint(), "folder": folder}
    return {
        "skipped": skipped,
        "image_tokenizer": images,
        "text_tokenizer": {"fingerprint": job.text.fingerprint()},
        "source": {"path": str(settings.source), "fingerprint": job.source.fingerprint()},
        "area": settings.area,
        "version": __version__,
    }
