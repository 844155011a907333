"""Share what scorers with a model of images and texts need: batches, and the count of prompts that are cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cca.errors import UserError


@dataclass(frozen=True)
class TruncatedPrompts:
    """The number of prompts, of ``count``, that the model reads only in part.

    The model reads ``tokens`` tokens. ``model`` is its kind's name in messages.
    """

    prompts: int
    count: int
    tokens: int
    model: str = "CLIP"

    def line(self) -> str | None:
        """Return a line for the user; None if no prompt is cut."""
        if not self.prompts:
            return None
        return (
            f"{self.prompts} of {self.count} prompts are longer than the {self.tokens} tokens that this {self.model} "
            "reads; their ends are not scored"
        )


class ModelScorer(ABC):
    """A scorer of images and their prompts in batches.

    Attributes:
        title: the name of its kind of model in messages.
        batch_size: number of images and prompts in one batch.
    """

    title = "CLIP"
    batch_size = 64

    def scores(
        self, images: np.ndarray, prompts: Sequence[str], on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Return the score of each image and its prompt, float32 ``[N]``.

        Prompts are cut to the model's length. :meth:`cut` counts those that are cut.

        Args:
            images: uint8 ``[N, H, W, 3]``.
            prompts: as many prompts.
            on_progress: called with the number of images just scored.

        Raises:
            UserError: scores that are not finite.
        """
        assert len(images) == len(prompts)
        scores = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores.append(self._batch(images[rows], list(prompts[rows])))
            if not np.isfinite(scores[-1]).all():
                raise UserError(f"{self.title} gives numbers that are not finite; its weights are damaged")
            if on_progress is not None:
                on_progress(len(scores[-1]))
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return :meth:`scores`."""
        return self.scores(images, prompts)

    def cut(self, prompts: Sequence[str]) -> TruncatedPrompts:
        """Count the prompts that are cut before they are scored."""
        long = 0
        for start in range(0, len(prompts), self.batch_size):
            lengths = self._lengths(list(prompts[start : start + self.batch_size]))
            long += sum(one > self._length for one in lengths)
        return TruncatedPrompts(long, len(prompts), self._length, self.title)

    @property
    @abstractmethod
    def side(self) -> int:
        """Side in pixels of the square that the model sees."""

    @property
    @abstractmethod
    def _length(self) -> int:
        """Number of tokens that the model reads, begin and end included."""

    @abstractmethod
    def _lengths(self, prompts: list[str]) -> list[int]:
        """Return the number of tokens of each whole prompt, begin and end included."""

    @abstractmethod
    def _batch(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return the scores of one batch, float32 ``[N]``."""
