"""From a step number to the token tensors of this data-parallel rank's microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cca.data.pairing import GlobalBatch, global_batch
from megatron_cca.data.shards import TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models.emu3.grammar import image_ids, prompt_ids, sequence_length

_NO_CAPTION = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward pass. With pairs, the first half of the rows is positive and the second negative.

    Attributes:
        tokens: int64 ``[R, S]``.
        targets: int64 ``[R, S]``, the next token.
        mask: bool ``[R, S]``, true where the target is an image token.
        negative_is_positive: bool ``[R / 2]``, or ``[R]`` without pairs.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    negative_is_positive: Tensor

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on another device."""
        return Microbatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class StepBatch:
    """One step's share of a data-parallel rank.

    Attributes:
        microbatches: in order; all of one shape.
        seq_length: S, the same on every rank.
        mean_num_tokens: image tokens per sample, averaged over the global batch.
        num_tokens: non-padding tokens that the policy sees in the global batch.
    """

    microbatches: list[Microbatch]
    seq_length: int
    mean_num_tokens: float
    num_tokens: int


@dataclass(frozen=True)
class BatchBuilder:
    """Builds the batches of a run.

    Attributes:
        shards: the data.
        with_pairs: whether each sample becomes a positive and a negative row.
        global_batch_size, micro_batch_size: in samples.
        condition_dropout: probability of an emptied caption.
        seed: of the run.
        sequence_multiple: S is a multiple of this, so that ranks can share a sequence equally.
        max_sequence_length: the model's limit.
    """

    shards: TokenShards
    with_pairs: bool
    global_batch_size: int
    micro_batch_size: int
    condition_dropout: float
    seed: int
    sequence_multiple: int
    max_sequence_length: int

    def pairing(self, step: int) -> GlobalBatch:
        """The step's global batch."""
        return global_batch(
            num_samples=len(self.shards),
            condition_ids=self.shards.condition_ids,
            global_batch_size=self.global_batch_size,
            condition_dropout=self.condition_dropout,
            seed=self.seed,
            step=step,
        )

    def build(self, step: int, data_parallel_rank: int, data_parallel_size: int) -> StepBatch:
        """The microbatches of a rank.

        Raises:
            UserError: a sample longer than the model's positions; names the sample.
        """
        batch = self.pairing(step)
        lengths = self._row_lengths(batch)
        multiple = self.sequence_multiple
        # A token is not an input of its own prediction, hence one less.
        seq_length = -(-(int(lengths.max()) - 1) // multiple) * multiple
        if seq_length > self.max_sequence_length:
            longest = int(batch.sample_ids[int(lengths.max(axis=0).argmax())])
            raise UserError(
                f"data.path: sample {longest} needs {seq_length} positions, model.max_position_embeddings is "
                f"{self.max_sequence_length}; shorten its caption or image, or raise it"
            )
        grids = self.shards.grids[batch.sample_ids].astype(np.int64)
        per_rank = self.global_batch_size // data_parallel_size
        first = per_rank * data_parallel_rank
        return StepBatch(
            microbatches=[
                self._microbatch(batch, slice(start, start + self.micro_batch_size), seq_length)
                for start in range(first, first + per_rank, self.micro_batch_size)
            ],
            seq_length=seq_length,
            mean_num_tokens=float(grids.prod(axis=1).mean()),
            num_tokens=int((lengths - 1).sum()),
        )

    def _row_lengths(self, batch: GlobalBatch) -> np.ndarray:
        """int64 ``[1 or 2, B]``: the length of each row's sequence, positives first."""
        captions = [batch.sample_ids] + ([batch.negative_ids] if self.with_pairs else [])
        caption_lengths = np.stack([self.shards.caption_lengths[ids] for ids in captions]).astype(np.int64)
        caption_lengths[:, batch.condition_dropped] = 0
        heights, widths = self.shards.grids[batch.sample_ids].astype(np.int64).T
        words = np.array([len(self.shards.grid_words(sample)) for sample in batch.sample_ids])
        return sequence_length(caption_lengths, words, heights, widths)

    def _microbatch(self, batch: GlobalBatch, rows: slice, seq_length: int) -> Microbatch:
        captions = [batch.sample_ids] + ([batch.negative_ids] if self.with_pairs else [])
        sequences = [
            self._sequence(sample, None if dropped else caption)
            for ids in captions
            for sample, caption, dropped in zip(
                batch.sample_ids[rows], ids[rows], batch.condition_dropped[rows], strict=True
            )
        ]
        tokens = np.full((len(sequences), seq_length + 1), self.shards.vocabulary.pad, dtype=np.int64)
        mask = np.zeros((len(sequences), seq_length + 1), dtype=bool)
        for row, (ids, is_image) in enumerate(sequences):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = is_image
        return Microbatch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            targets=torch.from_numpy(tokens[:, 1:].copy()),
            mask=torch.from_numpy(mask[:, 1:].copy()),
            negative_is_positive=torch.from_numpy(batch.negative_is_positive[rows].copy()),
        )

    def _sequence(self, sample: int, caption_of: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and image mask of one row; the row keeps its own grid whatever caption it is given."""
        caption = _NO_CAPTION if caption_of is None else self.shards.caption(caption_of)
        prompt = prompt_ids(self.shards.vocabulary, caption, self.shards.grid_words(sample))
        image, is_visual = image_ids(self.shards.vocabulary, self.shards.codes(sample))
        return np.concatenate([prompt, image]), np.concatenate([np.zeros(len(prompt), dtype=bool), is_visual])
