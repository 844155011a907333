"""A sampling job over all ranks: replicas of the model share the prompts, and rank 0 collects and writes images."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from tqdm import tqdm

from megatron_cca import __version__, platform
from megatron_cca.config import Config
from megatron_cca.data import DIGITS
from megatron_cca.errors import UserError, error_context
from megatron_cca.generation import GenerateOptions, PromptOptions
from megatron_cca.generation.decode_loop import (
    SCORER,
    ImageRequest,
    SamplingSettings,
    Scorer,
    best_candidates,
    candidate_requests,
    cut_prompts,
)
from megatron_cca.generation.image_generator import ImageGenerator
from megatron_cca.generation.model_loading import InspectedCheckpoint, default_grid
from megatron_cca.generation.prompts import (
    Prompt,
    RepeatedPrompts,
    check_conditions,
    class_prompts,
    digit_classes,
    prompts_named,
    read_class_captions,
)
from megatron_cca.generation.shard_prompts import ShardPrompts
from megatron_cca.io.figures import contact_sheet
from megatron_cca.io.output_folders import check_output, claimed, staging
from megatron_cca.models.image_vocabulary import ImageVocabulary

# What an output folder holds.
IMAGES, PROMPTS, CODES = "images", "prompts.jsonl", "codes.npy"
SETTINGS, SHEET, NPZ = "settings.json", "sheet.png", "samples.npz"
_ALL_NAMES = frozenset({IMAGES, PROMPTS, CODES, SETTINGS, SHEET, NPZ})
_PARTIAL = ".partial"
# Images on the contact sheet.
_ON_SHEET = 16


@dataclass(frozen=True)
class SamplingJob:
    """The prompts to draw, the settings and the output.

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
    """The speed of all replicas together, drawing and decoding: visual tokens and kept images per second."""

    tokens_per_second: float
    images_per_second: float


def job_of(options: GenerateOptions, checkpoint: InspectedCheckpoint) -> SamplingJob:
    """Return the job that the options ask for with this checkpoint.

    Raises:
        UserError: a grid, class, caption or number that is impossible.
    """
    prompts = _prompts(options.prompting, checkpoint)
    with error_context("--grid"):
        height, width = options.prompting.grid or prompts[0].grid or default_grid(checkpoint.config)
    settings = SamplingSettings(height, width, options.run.batch_size, **vars(options.candidates.sampling))
    return SamplingJob(options, prompts, settings)


def _prompts(prompting: PromptOptions, checkpoint: InspectedCheckpoint) -> RepeatedPrompts:
    vocabulary = checkpoint.architecture.vocabulary
    if prompting.like is not None:
        prompts = ShardPrompts(prompting.like, vocabulary, keeps_grids=prompting.grid is None)
    elif prompting.prompts is not None:
        with error_context("--prompts"):
            prompts = prompts_named(prompting.prompts)
            _say_hashes(prompts)
            check_conditions(vocabulary, prompts)
    elif prompting.classes:
        captions = _class_captions(prompting.class_captions, checkpoint.config, vocabulary.num_classes)
        with error_context("--classes"):
            prompts = class_prompts(captions, prompting.classes)
    elif vocabulary.num_classes is not None:
        raise UserError("--caption: this model takes classes, not texts; give --classes, such as --classes 0 1")
    else:
        prompts = [Prompt(caption) for caption in prompting.caption]
    return RepeatedPrompts(prompts, prompting.images_per_prompt, prompting.seed)


def _say_hashes(prompts: list[Prompt]) -> None:
    """Print how many prompts begin with "#", since the user may have meant comments."""
    hashes = sum((prompt.text or "").startswith("#") for prompt in prompts)
    if hashes and os.environ.get("RANK", "0") == "0":
        print(
            f'--prompts: {hashes} of {len(prompts)} prompts begin with "#" and are drawn as all others', file=sys.stderr
        )


def _class_captions(file: Path | None, saved: Config, num_classes: int | None) -> list[str | None]:
    """Return the caption of each label. None for a class without a name."""
    if file is not None:
        with error_context("--class-captions"):
            return read_class_captions(file, num_classes)
    if saved.data.path == DIGITS:
        return [prompt.text for prompt in digit_classes()]
    if num_classes is not None:
        return [None] * num_classes
    raise UserError("--classes: this model's classes are not known; say them in --class-captions FILE")


def check_sampling_output(job: SamplingJob) -> None:
    """Refuse an output folder that holds something else. Called on rank 0, before a model is loaded.

    Raises:
        UserError: names what it holds.
    """
    with claimed(job.options.output):
        check_output(job.options.output, _ALL_NAMES, {_PARTIAL}, overwrite=job.options.run.overwrite)


def sampling_requests(job: SamplingJob, generator: ImageGenerator) -> list[ImageRequest]:
    """Return the requests of the job. The generator needs no weights for it.

    Raises:
        UserError: a caption or grid that does not fit the model.
    """
    prompts = suffixed(job, generator.architecture.vocabulary, job.prompts)
    return generator.requests(prompts, job.settings, job.options.candidates.negative_prompt)


def suffixed(job: SamplingJob, vocabulary: ImageVocabulary, prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return some prompts of the job as the model gets them, with its suffix behind their texts.

    Raises:
        UserError: a suffix for a model of classes.
    """
    suffix = job.options.prompting.prompt_suffix
    if suffix and vocabulary.num_classes is not None:
        raise UserError("--prompt-suffix: this model takes classes, not texts; leave it out")
    return [replace(prompt, text=None if prompt.text is None else prompt.text + suffix) for prompt in prompts]


def run_sampling(job: SamplingJob, generator: ImageGenerator, scorer: Scorer | None = None) -> Speed:
    """Draw everything. Collective over all ranks, which must share a file system.

    Raises:
        UserError: a caption or grid that does not fit the model, an output that holds something else, or a full disk.
    """
    requests = sampling_requests(job, generator)
    partial = job.options.output / _PARTIAL
    leads = dist.get_rank() == 0
    with ExitStack() as stack:
        if leads:
            stack.enter_context(claimed(job.options.output))
            check_output(job.options.output, _ALL_NAMES, {_PARTIAL}, overwrite=job.options.run.overwrite)
            stack.enter_context(staging(partial, 0))
            (partial / IMAGES).mkdir()
            cut = say_cut_prompts(scorer, job.prompts)
        dist.barrier()
        started = time.perf_counter()
        bar = stack.enter_context(_bar(job) if leads else nullcontext())
        share = _draw_share(job, generator, scorer, requests, partial, bar)
        shares = _collected(share)
        seconds = time.perf_counter() - started
        if leads:
            bar.close()
            _finish(job, requests, partial, shares, cut)
        dist.barrier()
    kept = len(job.prompts)
    tokens = kept * job.options.candidates.best_of * job.settings.height * job.settings.width
    return Speed(tokens / seconds, kept / seconds)


def say_cut_prompts(scorer: Scorer | None, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Print how many prompts the scorer reads in part, and return it for a record.

    The record is empty for a scorer that does not tell.
    """
    cut = cut_prompts(scorer, _Titles(prompts))
    if cut is None:
        return {}
    if (line := cut.line()) is not None:
        print(f"{SCORER}: {line}", file=sys.stderr, flush=True)
    return {"scorer_prompts_cut": cut.prompts}


class _Titles(Sequence[str]):
    """The titles of prompts. Few of them are in memory at a time."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, places):
        if isinstance(places, slice):
            return [self._prompts[place].title for place in range(len(self))[places]]
        return self._prompts[places].title


def image_name(index: int) -> str:
    """Return the path of an image inside the output folder."""
    return f"{IMAGES}/{index:06d}.png"


def write_images(folder: Path, indices: Sequence[int], images: np.ndarray) -> None:
    """Write one PNG per image, uint8 ``[N, H, W, 3]``. Each is named by the index of its prompt."""
    for index, image in zip(indices, images, strict=True):
        Image.fromarray(image).save(folder / image_name(index))


def read_image(folder: Path, index: int) -> np.ndarray:
    """Read one written image, uint8 ``[H, W, 3]``."""
    with Image.open(folder / image_name(index)) as image:
        return np.asarray(image.convert("RGB"))


def write_prompts(folder: Path, rows: Sequence[dict]) -> None:
    """Write one JSON object per image: ``file``, ``prompt``, ``label``, ``seed``, and what else a row has."""
    lines = (json.dumps({"file": image_name(index), **row}, ensure_ascii=False) for index, row in enumerate(rows))
    (folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_npz(folder: Path, count: int, labels: Sequence[int] | None) -> None:
    """Write all images in one file: ``arr_0`` uint8 ``[N, H, W, 3]`` and, with labels, ``arr_1`` int64 ``[N]``.

    The evaluator that the CCA authors used reads this file (openai/guided-diffusion, ``evaluations/``). Images are
    written one at a time, so that 50,000 of them need not fit into memory.
    """
    first = read_image(folder, 0)
    with zipfile.ZipFile(folder / NPZ, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(count):
                file.write(np.ascontiguousarray(read_image(folder, index)).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))


def sheet_indices(count: int) -> list[int]:
    """Return the indices of the images on the contact sheet.

    They are spread evenly, since the first may share one prompt.
    """
    return np.linspace(0, count - 1, min(count, _ON_SHEET)).round().astype(int).tolist()


@dataclass(frozen=True)
class _Share:
    """One replica's part: indices of prompts, codes int64 ``[n, h, w]``, scores of the chosen candidates."""

    places: list[int]
    codes: list[np.ndarray]
    scores: list[float]


def _bar(job: SamplingJob) -> tqdm:
    total = len(job.prompts) * job.options.candidates.best_of * job.settings.height * job.settings.width
    return tqdm(total=total, unit="token", unit_scale=True, desc=job.options.output.name, disable=None)


def _draw_share(job, generator: ImageGenerator, scorer, requests, partial: Path, bar: tqdm | None) -> _Share:
    replicas = parallel_state.get_data_parallel_world_size()

    def on_tokens(count: int) -> None:
        if bar is not None:
            bar.update(min(count * replicas, bar.total - bar.n))  # other replicas are taken to be as fast

    share = _Share([], [], [])
    best_of = job.options.candidates.best_of
    for places in _my_batches(len(requests), max(1, job.settings.batch_size // best_of)):
        batch = candidate_requests([requests[place] for place in places], best_of)
        codes = generator.codes(batch, job.settings, on_tokens)
        if not writes_images():
            continue
        images = generator.decode(codes)
        if scorer is not None:
            best = best_candidates(scorer, images, [job.prompts[place].title for place in places], best_of)
            codes, images = codes[best.indices], images[best.indices]
            share.scores.extend(best.scores.tolist())
        write_images(partial, places, images)
        share.places.extend(places)
        share.codes.extend(codes)
        if bar is not None:
            bar.set_postfix_str(f"{len(share.places) * replicas} images", refresh=False)
    return share


def _my_batches(count: int, size: int) -> Iterator[list[int]]:
    group = parallel_state.get_data_parallel_group()
    mine = list(range(group.rank(), count, group.size()))
    return (mine[start : start + size] for start in range(0, len(mine), size))


def writes_images() -> bool:
    """Return whether this rank decodes and writes its replica's images."""
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
    job: SamplingJob, requests: Sequence[ImageRequest], partial: Path, shares: Sequence[_Share], facts: dict[str, int]
) -> None:
    """Join what all replicas wrote and move it into the output folder. ``settings.json`` comes last."""
    count = len(job.prompts)
    codes = np.empty((count, job.settings.height, job.settings.width), dtype=np.int32)
    rows = [
        {"prompt": prompt.title, "label": prompt.label, "seed": prompt.seed, "prompt_ids": request.prompt.tolist()}
        for prompt, request in zip(job.prompts, requests, strict=True)
    ]
    for share in shares:
        for position, place in enumerate(share.places):
            codes[place] = share.codes[position]
            if share.scores:
                rows[place]["score"] = share.scores[position]
    np.save(partial / CODES, codes)
    write_prompts(partial, rows)
    labels = [prompt.label for prompt in job.prompts]
    if job.options.run.npz:
        write_npz(partial, count, None if None in labels else labels)
    shown = sheet_indices(count)
    images = [read_image(partial, place) for place in shown]
    contact_sheet(partial / SHEET, images, [job.prompts[place].title for place in shown])
    (partial / SETTINGS).write_text(json.dumps(_record(job) | facts, indent=1) + "\n")
    _move_into_place(partial, job.options.output)


def _record(job: SamplingJob) -> dict:
    return {
        "checkpoint": job.options.checkpoint,
        "sampling": asdict(job.settings),
        "forwards_per_token": job.settings.forwards_per_token,
        "prompt_suffix": job.options.prompting.prompt_suffix,
        "negative_prompt": job.options.candidates.negative_prompt,
        "best_of": job.options.candidates.best_of,
        "scorer": job.options.candidates.scorer,
        "images": len(job.prompts),
        "ranks": dist.get_world_size(),
        "device": platform.device_name(),
        "version": __version__,
    }


def _move_into_place(partial: Path, output: Path) -> None:
    for name in sorted(_ALL_NAMES, key=lambda name: name != SETTINGS):
        former = output / name
        shutil.rmtree(former) if former.is_dir() else former.unlink(missing_ok=True)
    for name in sorted(_ALL_NAMES, key=lambda name: name == SETTINGS):
        if (partial / name).exists():
            (partial / name).rename(output / name)
    partial.rmdir()
