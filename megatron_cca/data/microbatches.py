"""Build the token tensors of a data-parallel rank's microbatches for a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.pairing import GlobalBatch, Pairing
from megatron_cca.data.shards import TokenData
from megatron_cca.errors import UserError
from megatron_cca.models.image_vocabulary import ImageVocabulary


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward pass. With pairs, the first half of the rows is positive and the second negative.

    Attributes:
        tokens: int64 ``[R, S]``. On a rank that needs no tokens, all but the flags are None.
        targets: int64 ``[R, S]``, the next token.
        mask: bool ``[R, S]``, true where the target is an image token.
        negative_is_positive: bool ``[R / 2]``, or ``[R]`` without pairs.
    """

    tokens: Tensor | None
    targets: Tensor | None
    mask: Tensor | None
    negative_is_positive: Tensor


@dataclass(frozen=True)
class StepBatch:
    """One step's share of a data-parallel rank.

    Attributes:
        microbatches: in order, all of one shape.
        seq_length: S, the same on every rank.
        mean_num_tokens: image tokens per sample, averaged over the global batch.
        num_tokens: tokens of the global batch that the policy processes, without padding.
    """

    microbatches: list[Microbatch]
    seq_length: int
    mean_num_tokens: float
    num_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """Everything about a step except its tokens. It is cheap, and the same on every rank.

    Attributes:
        batch: the rows.
        prompt_lengths: int64 ``[1 or 2, B]``, ids in front of the image, first rows of pairs first.
        image_lengths: int64 ``[1 or 2, B]``, ids of the image.
        num_visual: int64 ``[1 or 2, B]``, visual tokens among those.
        seq_length: S.
    """

    batch: GlobalBatch
    prompt_lengths: np.ndarray
    image_lengths: np.ndarray
    num_visual: np.ndarray
    seq_length: int


@dataclass(frozen=True)
class BatchBuilder:
    """A builder of the batches of a run.

    Attributes:
        data: the tokens.
        pairing: which samples and conditions a step has.
        with_pairs: whether each sample becomes a positive and a negative row.
        micro_batch_size: in samples.
        sequence_multiple: S is a multiple of this. Ranks can then share a sequence equally, and few lengths occur.
        max_sequence_length: the model's limit.
    """

    data: TokenData
    pairing: Pairing
    with_pairs: bool
    micro_batch_size: int
    sequence_multiple: int
    max_sequence_length: int

    @property
    def rows_per_microbatch(self) -> int:
        """R, the number of rows in a microbatch."""
        return self.micro_batch_size * (2 if self.with_pairs else 1)

    def rows_per_rank(self, data_parallel_size: int) -> int:
        """Return the number of rows in all microbatches of a rank."""
        per_rank = self.pairing.global_batch_size // data_parallel_size
        return per_rank * (2 if self.with_pairs else 1)

    def plan(self, step: int) -> StepPlan:
        """Return the plan of a step.

        Raises:
            UserError: a sample longer than the model's positions; names the sample.
        """
        batch = self.pairing.at(step)
        captions = [self.data.rows(ids)["caption_length"].astype(np.int64) for ids in self._caption_ids(batch)]
        dropped = np.stack([batch.condition_dropped, batch.second_dropped])[: len(captions)]
        caption_lengths = np.where(dropped, self._dropped_lengths(batch, dropped), np.stack(captions))
        first, *second = (ids for ids, _ in self._images(batch))
        measured = [self._measured(first)]
        # The images of a pair of conditions are the same. This loop over samples is the longest of a plan.
        measured += [measured[0] if ids is first else self._measured(ids) for ids in second]
        grids, meta_lengths = map(np.stack, zip(*measured, strict=True))
        frames, heights, widths = np.moveaxis(grids, -1, 0)
        vocabulary = self.data.vocabulary
        prompts = vocabulary.prompt_length(caption_lengths, meta_lengths)
        images = vocabulary.image_length(frames, heights, widths)
        return StepPlan(batch, prompts, images, frames * heights * widths, self._seq_length(batch, prompts + images))

    def sequences(self, plan: StepPlan, data_parallel_rank: int, data_parallel_size: int) -> np.ndarray:
        """Return the token ids of a rank's rows, int32 ``[rows_per_rank, S + 1]``, right-padded.

        Microbatches follow each other.

        Raises:
            UserError: a damaged sample; names the sample.
        """
        per_rank = self.pairing.global_batch_size // data_parallel_size
        shape = (per_rank // self.micro_batch_size, -1, self.micro_batch_size, plan.seq_length + 1)
        ids = np.full(
            (self.rows_per_rank(data_parallel_size), plan.seq_length + 1), self.data.vocabulary.pad, dtype=np.int32
        )
        # [microbatch, positive or negative, sample, position]
        view = ids.reshape(shape)
        for index in range(per_rank):
            place = divmod(index, self.micro_batch_size)
            self._write_sample(view[place[0], :, place[1]], plan, per_rank * data_parallel_rank + index)
        return ids

    def assemble(self, plan: StepPlan, ids: Tensor | None, rank: int, size: int, device: torch.device) -> StepBatch:
        """Return the batch of a data-parallel rank.

        Args:
            plan: of the step.
            ids: the step's :meth:`sequences`, as int64 and on the device. None where the tokens are not needed.
            rank, size: the data-parallel rank and how many there are.
            device: of everything else.
        """
        flags = torch.from_numpy(plan.batch.negative_is_positive).chunk(size)[rank].to(device)
        flags_by_microbatch = flags.split(self.micro_batch_size)
        rows = [None] * len(flags_by_microbatch) if ids is None else ids.split(self.rows_per_microbatch)
        return StepBatch(
            [_microbatch(self.data.vocabulary, *parts) for parts in zip(rows, flags_by_microbatch, strict=True)],
            plan.seq_length,
            mean_num_tokens=float(plan.num_visual.mean()),
            num_tokens=int((plan.prompt_lengths + plan.image_lengths - 1).sum()),
        )

    def build(self, step: int, data_parallel_rank: int, data_parallel_size: int) -> StepBatch:
        """Build the microbatches of a rank on the CPU in one call."""
        plan, place = self.plan(step), (data_parallel_rank, data_parallel_size)
        ids = torch.from_numpy(self.sequences(plan, *place)).long()
        return self.assemble(plan, ids, *place, torch.device("cpu"))

    def _measured(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the grids of samples, int64 ``[B, 3]``, and how many ids state each, int64 ``[B]``."""
        grids = self.data.rows(samples)["grid"].astype(np.int64)
        images = zip(samples.tolist(), map(tuple, grids.tolist()), strict=True)
        return grids, np.array([len(self.data.meta_ids(*image)) for image in images])

    def _dropped_lengths(self, batch: GlobalBatch, dropped: np.ndarray) -> np.ndarray:
        """Return the number of ids in place of a sample's caption, int64 ``[B]``, where any of its rows drops it."""
        lengths = np.zeros(len(batch.sample_ids), dtype=np.int64)
        for row in np.flatnonzero(dropped.any(0)):
            lengths[row] = len(self.data.dropped_caption(int(batch.sample_ids[row])))
        return lengths

    def _caption_ids(self, batch: GlobalBatch) -> list[np.ndarray]:
        return [batch.sample_ids, batch.negative_ids] if self.with_pairs else [batch.sample_ids]

    def _images(self, batch: GlobalBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the samples and variants of the images, of each row of a pair."""
        rows = [(batch.sample_ids, batch.variants), (batch.second_ids, batch.second_variants)]
        return rows[: 2 if self.with_pairs else 1]

    def _seq_length(self, batch: GlobalBatch, lengths: np.ndarray) -> int:
        # The last token is a target and no input, hence one less.
        seq_length = -(-(int(lengths.max()) - 1) // self.sequence_multiple) * self.sequence_multiple
        if seq_length > self.max_sequence_length:
            row, place = np.unravel_index(lengths.argmax(), lengths.shape)
            longest = self.data.describe(int(self._images(batch)[row][0][place]))
            raise UserError(
                f"data.path: {longest} needs {seq_length} positions, model.max_position_embeddings is "
                f"{self.max_sequence_length}; shorten its caption or image, or raise it"
            )
        return seq_length

    def _write_sample(self, ids: np.ndarray, plan: StepPlan, row: int) -> None:
        """Write a sample into int32 ``[1 or 2, S + 1]``.

        Both rows state the grid of their image, whatever their captions are.
        """
        vocabulary, batch = self.data.vocabulary, plan.batch
        captions, dropped = self._caption_ids(batch), (batch.condition_dropped, batch.second_dropped)
        written: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for place, (samples, variants) in enumerate(self._images(batch)):
            image = int(samples[row]), int(variants[row])
            start, length = int(plan.prompt_lengths[place, row]), int(plan.image_lengths[place, row])
            target = ids[place, start : start + length]
            if image in written:
                # The two rows of a pair of conditions have the same image.
                target[:], meta_ids = written[image]
            else:
                codes = self.data.codes(*image)
                meta_ids = self.data.meta_ids(image[0], codes.shape)
                vocabulary.write_image(target, codes)
                written[image] = target, meta_ids
            if dropped[place][row]:
                # Both rows of a pair have the same prompt then.
                caption = self.data.dropped_caption(int(batch.sample_ids[row]))
            else:
                caption = self.data.caption(int(captions[place][row]))
            vocabulary.write_prompt(ids[place, :start], caption, meta_ids)


def _microbatch(vocabulary: ImageVocabulary, ids: Tensor | None, flags: Tensor) -> Microbatch:
    if ids is None:
        return Microbatch(None, None, None, flags)
    targets = ids[:, 1:]
    return Microbatch(ids[:, :-1], targets, vocabulary.is_visual(targets), flags)
