"""Hold stock engines to the grammar of images: a logits processor for transformers, vLLM and SGLang.

It needs torch, and a folder that ``megatron-cca convert export --format llama`` wrote. README.md has a command for each
engine. Copy this file to where the engine runs: nothing of megatron_cca is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class ImageGrammar:
    """The ids that an image may have, place by place.

    Attributes:
        visual_start: code k is id ``visual_start + k``.
        codebook_size: number of codes.
        row_end: the id behind a row of codes.
        row_end_is_last: whether it is behind the last row, too.
        tail: the ids behind all rows.
        prompt: how a prompt is written, see :meth:`prompt_ids`.
    """

    visual_start: int
    codebook_size: int
    row_end: int
    row_end_is_last: bool
    tail: list[int]
    prompt: dict

    @classmethod
    def of(cls, folder: str | Path) -> ImageGrammar:
        """Return the grammar of an exported model."""
        return cls(**json.loads((Path(folder) / "image_grammar.json").read_text()))

    def length(self, height: int, width: int) -> int:
        """Return the number of ids of an image of so many codes: how many to generate."""
        return height * (width + 1) - (not self.row_end_is_last) + len(self.tail)

    def prompt_ids(self, encode, caption: str, height: int, width: int) -> list[int]:
        """Return the ids of a prompt.

        Args:
            encode: turns a text into a list of ids, without special ones, such as ``tokenizer.encode`` with
                ``add_special_tokens=False``.
            caption: what the image shows.
            height, width: of the image, in codes.
        """
        prompt = self.prompt
        words, grid = [caption], [prompt["grid"].format(height=height, width=width)]
        if prompt["words_before"] or prompt["words_after"]:
            words = [prompt["words_before"], f" {caption.strip()}", prompt["words_after"]]
        written, meta = ([token for text in texts if text for token in encode(text)] for texts in (words, grid))
        return [*prompt["before"], *written, *prompt["between"], *meta, *prompt["after"]]

    def allowed(self, step: int, height: int, width: int) -> range:
        """Return the ids that may come behind so many ids of an image: all codes, or one forced id."""
        row, column = divmod(step, width + 1)
        if row < height and column < width:
            return range(self.visual_start, self.visual_start + self.codebook_size)
        if row < height and (row < height - 1 or self.row_end_is_last):
            return range(self.row_end, self.row_end + 1)
        behind = step - (self.length(height, width) - len(self.tail))
        # An engine that goes on regardless repeats the last one.
        forced = self.tail[min(behind, len(self.tail) - 1)] if self.tail else self.row_end
        return range(forced, forced + 1)

    def restrict(self, logits: torch.Tensor, step: int, height: int, width: int) -> torch.Tensor:
        """Return logits, float ``[..., vocabulary]``, with minus infinity in place of ids that are not allowed."""
        ids = self.allowed(step, height, width)
        restricted = torch.full_like(logits, float("-inf"))
        restricted[..., ids.start : ids.stop] = logits[..., ids.start : ids.stop]
        return restricted

    def codes(self, ids: list[int], height: int, width: int) -> list[list[int]]:
        """Return the codes of an image, row by row, from the ids behind its prompt."""
        rows = (ids[row * (width + 1) :][:width] for row in range(height))
        return [[token - self.visual_start for token in row] for row in rows]


class ForTransformers:
    """A logits processor of ``generate`` in transformers, for prompts of one length (or padded on the left)."""

    def __init__(self, grammar: ImageGrammar, prompt_length: int, height: int, width: int) -> None:
        self._grammar, self._prompt_length, self._grid = grammar, prompt_length, (height, width)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the restricted scores, ``[B, vocabulary]``."""
        return self._grammar.restrict(scores, input_ids.shape[1] - self._prompt_length, *self._grid)


class ForVLLM:
    """A logits processor of vLLM (``logits_processors=[ForVLLM]``, tried with the interface of vLLM 0.33).

    A request asks for an image by ``SamplingParams(extra_args={"height": 90, "width": 90})``. Others stay as they are.
    """

    @classmethod
    def validate_params(cls, params) -> None:
        """Refuse a request that names one side alone, or one that is no positive number."""
        _sides(params.extra_args)

    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        self._grammar = ImageGrammar.of(vllm_config.model_config.model)
        # By place in the batch: height, width and the ids drawn so far, a list that vLLM goes on writing.
        self._rows: dict[int, tuple[int, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Return whether the likeliest id stays the likeliest."""
        return False

    def update_state(self, batch_update) -> None:
        """Follow the requests that leave, come and change places, in this order."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._rows.pop(place, None)
        for place, params, _, drawn in batch_update.added:
            self._rows.pop(place, None)
            if sides := _sides(params.extra_args):
                self._rows[place] = (*sides, drawn)
        for one, other, direction in batch_update.moved:
            moved, replaced = self._rows.pop(one, None), self._rows.pop(other, None)
            if moved is not None:
                self._rows[other] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[one] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Restrict the rows of images in place, ``[B, vocabulary]``."""
        for place, (height, width, drawn) in self._rows.items():
            logits[place] = self._grammar.restrict(logits[place], len(drawn), height, width)
        return logits


class ForSGLang:
    """A custom logit processor of SGLang (tried with the interface of SGLang 0.5.23).

    A request's ``custom_params`` are ``{"grammar": FOLDER, "height": 90, "width": 90}``.
    """

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict] | None = None) -> torch.Tensor:
        """Restrict a row for each entry of the list, ``[B, vocabulary]``."""
        for row, params in enumerate(custom_param_list or []):
            if params and (sides := _sides(params)):
                drawn = len(params["__req__"].output_ids)
                logits[row] = _read(params["grammar"]).restrict(logits[row], drawn, *sides)
        return logits


@cache
def _read(folder: str) -> ImageGrammar:
    return ImageGrammar.of(folder)


def _sides(arguments: dict | None) -> tuple[int, int] | None:
    found = [(arguments or {}).get(side) for side in ("height", "width")]
    if found == [None, None]:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in found):
        raise ValueError(f"height, width: must be positive numbers of codes, found {found[0]!r} and {found[1]!r}")
    return found[0], found[1]
