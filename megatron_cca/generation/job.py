"""A sampling job over all ranks: replicas of the model share the prompts, and rank 0 puts their pictures together."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_cca import __version__, platform
from megatron_cca.errors import UserError
from megatron_cca.generation import files
from megatron_cca.generation.best_of import SCORER, Scorer, best, candidates, cut_prompts
from megatron_cca.generation.options import GenerateOptions
from megatron_cca.generation.painting import Painter
from megatron_cca.generation.prompts import Prompt
from megatron_cca.generation.sampler import ImageRequest, SamplingSettings
from megatron_cca.io.figures import contact_sheet
from megatron_cca.io.outputs import check_output, claimed, staging

_PARTIAL = ".partial"
_ON_SHEET = 16


@dataclass(frozen=True)
class Job:
    """What to draw and where to put it.

    Attributes:
        options: as the user gave them.
        prompts: with seeds.
        settings: how to draw.
    """

    options: GenerateOptions
    prompts: Sequence[Prompt]
    settings: SamplingSettings


@dataclass(frozen=True)
class Speed:
    """Of all replicas together, drawing and decoding: visual tokens and pictures kept, a second."""

    tokens_per_second: float
    images_per_second: float


@dataclass(frozen=True)
class _Share:
    """One replica's part: places in the list of prompts, codes int64 ``[n, h, w]``, scores of the chosen."""

    places: list[int]
    codes: list[np.ndarray]
    scores: list[float]


def check_job_output(job: Job) -> None:
    """Refuse an output folder that holds something else, before a model is loaded; on rank 0.

    Raises:
        UserError: names what it holds.
    """
    with claimed(job.options.output):
        check_output(job.options.output, files.FORMER, {_PARTIAL}, overwrite=job.options.where.overwrite)


def job_requests(job: Job, painter: Painter) -> tuple[list[ImageRequest], np.ndarray | None]:
    """What the sampler is asked for, and the second stream's prompt; the painter needs no weights for it.

    Raises:
        UserError: a caption or grid that does not fit the model.
    """
    suffix = job.options.what.prompt_suffix
    if suffix and painter.architecture.vocabulary.num_classes is not None:
        raise UserError("--prompt-suffix: this model takes classes, not texts; leave it out")
    prompts = [replace(prompt, text=None if prompt.text is None else prompt.text + suffix) for prompt in job.prompts]
    return painter.requests(prompts, job.settings), painter.second_prompt(job.settings, job.options.how.negative_prompt)


def run(job: Job, painter: Painter, scorer: Scorer | None = None) -> Speed:
    """Draw everything; collective over all ranks, which must share a file system.

    Raises:
        UserError: a caption or grid that does not fit the model; an output that holds something else; a full disk.
    """
    requests, second = job_requests(job, painter)
    partial = job.options.output / _PARTIAL
    leads = dist.get_rank() == 0
    with ExitStack() as stack:
        if leads:
            stack.enter_context(claimed(job.options.output))
            check_output(job.options.output, files.FORMER, {_PARTIAL}, overwrite=job.options.where.overwrite)
            stack.enter_context(staging(partial, 0))
            (partial / files.IMAGES).mkdir()
            cut = cut_prompts(scorer, [prompt.title for prompt in job.prompts])
            if cut is not None and (line := cut.line()) is not None:
                print(f"{SCORER}: {line}", file=sys.stderr, flush=True)
        dist.barrier()
        started = time.perf_counter()
        bar = stack.enter_context(_bar(job) if leads else nullcontext())
        share = _draw_share(job, painter, scorer, requests, second, partial, bar)
        shares = _collected(share)
        seconds = time.perf_counter() - started
        if leads:
            bar.close()
            _finish(job, requests, partial, shares, {} if cut is None else {"scorer_prompts_cut": cut.prompts})
        dist.barrier()
    kept = len(job.prompts)
    tokens = kept * job.options.how.best_of * job.settings.height * job.settings.width
    return Speed(tokens / seconds, kept / seconds)


def _bar(job: Job) -> tqdm:
    total = len(job.prompts) * job.options.how.best_of * job.settings.height * job.settings.width
    return tqdm(total=total, unit="token", unit_scale=True, desc=job.options.output.name, disable=None)


def _draw_share(job, painter: Painter, scorer, requests, second, partial: Path, bar: tqdm | None) -> _Share:
    replicas = parallel_state.get_data_parallel_world_size()

    def on_tokens(count: int) -> None:
        if bar is not None:
            bar.update(min(count * replicas, bar.total - bar.n))  # the others draw as fast

    share = _Share([], [], [])
    for places in _my_batches(len(requests), max(1, job.settings.batch_size // job.options.how.best_of)):
        codes = painter.codes(
            candidates([requests[place] for place in places], job.options.how.best_of), job.settings, second, on_tokens
        )
        if not _writes():
            continue
        images = painter.decoded(codes)
        if scorer is not None:
            choice = best(scorer, images, [job.prompts[place].title for place in places], job.options.how.best_of)
            codes, images = codes[choice.indices], images[choice.indices]
            share.scores.extend(choice.scores.tolist())
        files.write_images(partial, places, images)
        share.places.extend(places)
        share.codes.extend(codes)
        if bar is not None:
            bar.set_postfix_str(f"{len(share.places) * replicas} images", refresh=False)
    return share


def _my_batches(count: int, size: int) -> Iterator[list[int]]:
    group = parallel_state.get_data_parallel_group()
    mine = list(range(group.rank(), count, group.size()))
    return (mine[start : start + size] for start in range(0, len(mine), size))


def _writes() -> bool:
    """Whether this rank decodes and writes its replica's pictures."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def _collected(share: _Share) -> list[_Share]:
    everyone: list[_Share | None] = [share]
    if dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, share)
    return everyone


def _finish(
    job: Job, requests: Sequence[ImageRequest], partial: Path, shares: Sequence[_Share], facts: dict[str, int]
) -> None:
    """Put together what all replicas wrote, and let it appear in the output folder; ``settings.json`` comes last."""
    count = len(job.prompts)
    codes = np.empty((count, job.settings.height, job.settings.width), dtype=np.int32)
    rows = [
        {"prompt": prompt.title, "label": prompt.label, "seed": prompt.seed, "prompt_ids": request.prompt.tolist()}
        for prompt, request in zip(job.prompts, requests, strict=True)
    ]
    for share in shares:
        for turn, place in enumerate(share.places):
            codes[place] = share.codes[turn]
            if share.scores:
                rows[place]["score"] = share.scores[turn]
    np.save(partial / files.CODES, codes)
    files.write_prompts(partial, rows)
    labels = [prompt.label for prompt in job.prompts]
    if job.options.where.npz:
        files.write_npz(partial, count, None if None in labels else labels)
    shown = on_sheet(count)
    images = [files.read_image(partial, place) for place in shown]
    contact_sheet(partial / files.SHEET, images, [job.prompts[place].title for place in shown])
    (partial / files.SETTINGS).write_text(json.dumps(_record(job) | facts, indent=1) + "\n")
    _place(partial, job.options.output)


def on_sheet(count: int) -> list[int]:
    """Which of so many pictures the contact sheet shows: evenly from all, since the first may be of one prompt."""
    return np.linspace(0, count - 1, min(count, _ON_SHEET)).round().astype(int).tolist()


def _record(job: Job) -> dict:
    return {
        "checkpoint": job.options.checkpoint,
        "sampling": asdict(job.settings),
        "forwards_per_token": job.settings.forwards_per_token,
        "prompt_suffix": job.options.what.prompt_suffix,
        "negative_prompt": job.options.how.negative_prompt,
        "best_of": job.options.how.best_of,
        "scorer": job.options.how.scorer,
        "images": len(job.prompts),
        "ranks": dist.get_world_size(),
        "device": platform.device_name(),
        "version": __version__,
    }


def _place(partial: Path, output: Path) -> None:
    for name in sorted(files.FORMER, key=lambda name: name != files.SETTINGS):
        former = output / name
        shutil.rmtree(former) if former.is_dir() else former.unlink(missing_ok=True)
    for name in sorted(files.FORMER, key=lambda name: name == files.SETTINGS):
        if (partial / name).exists():
            (partial / name).rename(output / name)
    partial.rmdir()
