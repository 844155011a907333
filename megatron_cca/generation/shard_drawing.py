"""Draw images straight into a folder of token shards: replicas draw blocks of them, and rank 0 merges what they wrote.

Blocks and their batches follow from the prompts and the batch size alone. So the bytes are the same for any number of
replicas, and after a kill. With another batch size, or the model split in another way, they are the same except for
the rounding of logits, as :mod:`megatron_cca.generation.decode_loop` says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import batched
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca import __version__
from megatron_cca.data.codebooks import keep_codebook
from megatron_cca.data.manifest import Json
from megatron_cca.data.parts import PartsFolder, PartsProgress, PartWriter, Span, join_notes
from megatron_cca.data.shard_writing import Sample, merge_shards
from megatron_cca.data.tiny_sizes import MODEL, model_entry
from megatron_cca.data.tokenizers import tokenizer_facts
from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import (
    ImageRequest,
    SamplingSettings,
    Scorer,
    best_candidates,
    candidate_requests,
)
from megatron_cca.generation.image_generator import ImageGenerator
from megatron_cca.generation.model_loading import InspectedCheckpoint, sampling_precision, weights_of
from megatron_cca.generation.prompts import Prompt, RepeatedPrompts, caption_ids
from megatron_cca.generation.sampling_job import SamplingJob, say_cut_prompts, suffixed, writes_images
from megatron_cca.generation.shard_prompts import OPTION as LIKE
from megatron_cca.generation.shard_prompts import ShardPrompts
from megatron_cca.io.output_folders import check_apart, claimed, remove_beside_others
from megatron_cca.io.outputs import file_system_errors
from megatron_cca.parallel.ranks import attempted_on_rank_0

OPTION = "--shards"
# One line for each sample: what it was drawn for, its seed, its score.
DRAWN = "drawn.jsonl"
_BATCHES_PER_BLOCK = 4
_POLL_SECONDS = 0.5
_Numbered = tuple[int, Prompt]
OnTokens = Callable[[int], None]


class ShardDrawing:
    """A job that draws into a shard folder, over all ranks, which must share a file system.

    Args:
        job: its ``options.shards`` is the folder.
        checkpoint: of the model.
    """

    def __init__(self, job: SamplingJob, checkpoint: InspectedCheckpoint) -> None:
        assert isinstance(job.prompts, RepeatedPrompts)
        self._job, self._checkpoint, self._prompts = job, checkpoint, job.prompts
        self._output = job.options.shards
        self._at_once = max(1, job.settings.batch_size // job.options.candidates.best_of)
        block = job.options.run.block or _BATCHES_PER_BLOCK * self._at_once
        self._parts = PartsFolder(self._output, len(self._prompts), block, OPTION)
        self._block = block

    def check(self) -> None:
        """Refuse an output that is there already, or in the way of the shards that are read.

        Raises:
            UserError: names the folder.
        """
        if self._output.exists():
            raise UserError(f"{OPTION}: {self._output} exists already; give another folder, or remove it")
        if self._job.options.prompting.like is not None:
            check_apart(self._output, self._job.options.prompting.like, LIKE, OPTION)

    def prepare(self, generator: ImageGenerator) -> None:
        """Check all prompts, and that finished parts are of this job. Collective. The generator needs no weights yet.

        Raises:
            UserError: a prompt or grid that does not fit the model, or the parts of another job.
        """
        distinct = self._prompts.distinct
        if isinstance(distinct, ShardPrompts):
            distinct.check_text_tokenizer(generator.tokenizers.text)
            distinct = distinct.longest()
        for prompt in distinct:
            settings = self._settings_of(prompt)
            self._requests(generator, suffixed(self._job, generator.architecture.vocabulary, [prompt]), settings)
        self._description, problem = attempted_on_rank_0(partial(self._checked_description, generator))
        if problem is not None:
            raise UserError(problem)

    def run(self, generator: ImageGenerator, scorer: Scorer | None = None) -> float | None:
        """Draw what is missing and write the shard folder. Collective.

        Returns:
            The images per second of all replicas on rank 0, None elsewhere. A rank returns when its own share is done.

        Raises:
            UserError: logits that are not finite, a full disk, or another job on the same output.
        """
        leads, replica = dist.get_rank() == 0, parallel_state.get_data_parallel_rank()
        with ExitStack() as stack:
            stack.enter_context(file_system_errors(self._output, OPTION))
            if writes_images():
                stack.enter_context(claimed(self._parts.scratch(replica), OPTION))
                stack.enter_context(self._parts.begun(self._description, leads=leads))
            spans = self._spans()[replica]
            if not leads:
                self._draw_spans(spans, generator, scorer, None)
                return None
            cut = say_cut_prompts(scorer, self._prompts.distinct)
            progress = stack.enter_context(self._progress())
            self._draw_spans(spans, generator, scorer, progress)
            while not self._parts.is_complete():
                time.sleep(_POLL_SECONDS)
                progress.refresh()
            speed = progress.per_second()
            self._merge(generator, cut)
            remove_beside_others(self._parts.folder)
            return speed

    def _spans(self) -> list[list[Span]]:
        """Return what each replica has to draw. Rank 0 decides, so that all ranks of a replica agree."""
        replicas = parallel_state.get_data_parallel_world_size()
        found = [[list(self._parts.todo(replica, replicas)) for replica in range(replicas)]]
        dist.broadcast_object_list(found)
        return found[0]

    def _progress(self) -> PartsProgress:
        return PartsProgress(self._parts, len(self._prompts), shown=True, doing=self._output.name, done="drawn")

    def _draw_spans(
        self, spans: Sequence[Span], generator: ImageGenerator, scorer: Scorer | None, progress: PartsProgress | None
    ) -> None:
        replica, vocabulary = parallel_state.get_data_parallel_rank(), generator.architecture.vocabulary
        for span in spans:
            is_writer = writes_images()
            part = PartWriter(self._parts, replica, span[0], vocabulary, DRAWN) if is_writer else nullcontext()
            with part as writer:
                self._draw_span(span, generator, scorer, writer, progress)
            if progress is not None:
                progress.refresh()

    def _draw_span(
        self,
        span: Span,
        generator: ImageGenerator,
        scorer: Scorer | None,
        writer: PartWriter | None,
        progress: PartsProgress | None,
    ) -> None:
        drawn: dict[int, tuple[Sample, Json]] = {}
        numbered = [(place, self._prompts[place]) for place in range(*span)]
        has_one_grid = len({prompt.grid for _, prompt in numbered}) == 1
        for batch in _of_one_grid(numbered, self._at_once):
            drawn |= self._drawn(batch, generator, scorer, progress)
            # Images of several grids are drawn out of order, and a part that ended among them would change the batches
            # of the others.
            if writer is not None and (has_one_grid or len(drawn) == len(numbered)):
                ready = [drawn.pop(place) for place in sorted(drawn)]
                writer.add([sample for sample, _ in ready], [note for _, note in ready])

    def _drawn(
        self,
        batch: Sequence[_Numbered],
        generator: ImageGenerator,
        scorer: Scorer | None,
        progress: PartsProgress | None,
    ) -> dict[int, tuple[Sample, Json]]:
        """Return samples and notes by their places. Empty on a rank that writes nothing."""
        prompts = [prompt for _, prompt in batch]
        vocabulary, text = generator.architecture.vocabulary, generator.tokenizers.text
        settings, best_of = self._settings_of(prompts[0]), self._job.options.candidates.best_of
        fed = suffixed(self._job, vocabulary, prompts)
        requests = candidate_requests(self._requests(generator, fed, settings), best_of)
        codes = generator.codes(requests, settings, _counted(progress, settings, best_of))
        if not writes_images():
            return {}
        scores: Sequence[float | None] = [None] * len(batch)
        if scorer is not None:
            titles = [prompt.title for prompt in prompts]
            best = best_candidates(scorer, generator.decode(codes), titles, best_of)
            codes, scores = codes[best.indices], best.scores.tolist()
        captions = (caption_ids(vocabulary, text, prompt) for prompt in fed)
        return {
            place: (Sample(image, caption, prompt.condition), self._note(place, prompt, score))
            for (place, prompt), image, caption, score in zip(batch, codes, captions, scores, strict=True)
        }

    def _settings_of(self, prompt: Prompt) -> SamplingSettings:
        if prompt.grid is None:
            return self._job.settings
        return replace(self._job.settings, height=prompt.grid[0], width=prompt.grid[1])

    def _requests(
        self, generator: ImageGenerator, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[ImageRequest]:
        return generator.requests(prompts, settings, self._job.options.candidates.negative_prompt)

    def _note(self, place: int, prompt: Prompt, score: float | None) -> Json:
        note = {"prompt": prompt.title, "label": prompt.label, "seed": prompt.seed, "score": score}
        if isinstance(self._prompts.distinct, ShardPrompts):
            note["sample"] = place // self._prompts.times
        return {name: value for name, value in note.items() if value is not None}

    def _merge(self, generator: ImageGenerator, cut: Json) -> None:
        parts, tokenizers = self._parts.done(), generator.tokenizers
        text, images = tokenizers.text, tokenizers.images

        def write_extras(folder: Path) -> None:
            if text is not None:
                text.save(folder)
            keep_codebook(folder, tokenizers.images_path)
            join_notes(folder, parts, DRAWN)

        # Inside the folder of parts, so that its remains after a kill are removed with the parts.
        aside = self._parts.scratch(0) / "merged"
        shutil.rmtree(aside, ignore_errors=True)
        facts = tokenizer_facts(text, images, tokenizers.images_path, tokenizers.images_weights)
        merge_shards(
            self._output,
            [part.folder for part in parts],
            generator.architecture.vocabulary,
            None if text is None else text.encode,
            write_extras,
            {**facts, **self._model_entry(generator), "drawn": self._origin() | cut, "version": __version__},
            aside,
        )

    def _model_entry(self, generator: ImageGenerator) -> Json:
        entry = model_entry(self._checkpoint.config.model.name, generator.architecture.vocabulary)
        return {} if entry is None else {MODEL: entry}

    def _checked_description(self, generator: ImageGenerator) -> Json:
        """Return all facts that the tokens depend on, and refuse parts of another job."""
        tokenizers = generator.tokenizers
        description = {
            "images": len(self._prompts),
            "weights": weights_of(self._checkpoint),
            "prompts": _fingerprint(self._prompts.distinct),
            **self._settings(),
            "vocabulary": generator.architecture.vocabulary.fingerprint(),
            "image_tokenizer": tokenizers.images.fingerprint(),
            "text_tokenizer": None if tokenizers.text is None else tokenizers.text.fingerprint(),
            "block": self._block,
            "version": __version__,
        }
        self._parts.check(description)
        return description

    def _origin(self) -> Json:
        """Return the facts in the manifest about the origin of the samples."""
        given = {f"--{name}": getattr(self._job.options.prompting, name) for name in ("prompts", "like")}
        paths = {option: str(path) for option, path in given.items() if path is not None}
        return {
            "checkpoint": str(self._checkpoint.folder),
            "weights": self._description["weights"],
            "prompts": {**paths, "fingerprint": self._description["prompts"]},
            **self._settings(),
        }

    def _settings(self) -> Json:
        options, settings = self._job.options, self._job.settings
        distinct = self._prompts.distinct
        keeps_grids = isinstance(distinct, ShardPrompts) and distinct.keeps_grids
        return {
            "images_per_prompt": options.prompting.images_per_prompt,
            "grid": None if keeps_grids else [settings.height, settings.width],
            "seed": options.prompting.seed,
            "prompt_suffix": options.prompting.prompt_suffix,
            **asdict(options.candidates.sampling),
            "negative_prompt": options.candidates.negative_prompt,
            "best_of": options.candidates.best_of,
            "scorer": options.candidates.scorer,
            "precision": sampling_precision(self._checkpoint.config, options.run.precision),
        }


def _of_one_grid(numbered: Sequence[_Numbered], size: int) -> Iterator[Sequence[_Numbered]]:
    """Yield prompts of equal grids, ``size`` at most at a time."""
    by_grid: dict[tuple[int, int] | None, list[_Numbered]] = {}
    for place, prompt in numbered:
        by_grid.setdefault(prompt.grid, []).append((place, prompt))
    for group in by_grid.values():
        yield from batched(group, size)


def _counted(progress: PartsProgress | None, settings: SamplingSettings, best_of: int) -> OnTokens:
    """Return what counts the images that so many new tokens are."""
    per_image, waiting = settings.height * settings.width * best_of, 0

    def on_tokens(count: int) -> None:
        nonlocal waiting
        whole, waiting = divmod(waiting + count, per_image)
        if progress is not None and whole:
            progress.count(whole, 0)

    return on_tokens


def _fingerprint(distinct: Sequence[Prompt]) -> str:
    if isinstance(distinct, ShardPrompts):
        return distinct.fingerprint()
    digest = hashlib.sha256()
    for prompt in distinct:
        digest.update(json.dumps([prompt.text, prompt.label, prompt.seed]).encode())
    return digest.hexdigest()[:16]
