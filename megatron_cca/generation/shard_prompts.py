"""The captions and conditions of a shard folder as prompts, taken as token ids without going through text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import TextTokenizer, open_text_tokenizer
from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.prompts import Prompt
from megatron_cca.models.image_vocabulary import ImageVocabulary

OPTION = "--like"


class ShardPrompts(Sequence[Prompt]):
    """One prompt for each sample of a shard folder, in their order. It is read when it is asked for.

    Args:
        folder: of the shards.
        vocabulary: the model's.
        keeps_grids: whether each image has the grid of its sample.

    Raises:
        UserError: what :class:`TokenShards` refuses, no text tokenizer beside captions that are texts, or clips.
    """

    def __init__(self, folder: Path, vocabulary: ImageVocabulary, *, keeps_grids: bool) -> None:
        self.keeps_grids = keeps_grids
        self._shards = TokenShards(folder, vocabulary, OPTION)
        with error_context(OPTION):
            self._text = open_text_tokenizer(folder) if vocabulary.num_classes is None else None
        if keeps_grids and (self._shards.table["grid"][:, 0] > 1).any():
            raise UserError(f"{OPTION}: {folder} holds clips, and images are drawn; say their --grid")

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, place: int) -> Prompt:
        sample = range(len(self))[place]
        row, ids = self._shards.table[sample], tuple(self._shards.caption(sample).tolist())
        grid = tuple(row["grid"][1:].tolist()) if self.keeps_grids else None
        text, label = self._named(ids)
        return Prompt(text, label=label, ids=ids, condition=int(row["condition"]), grid=grid)

    def longest(self) -> list[Prompt]:
        """Return a prompt with the longest caption for each grid: if they fit the model, all do."""
        table = self._shards.table
        by_length = np.argsort(-table["caption_length"], kind="stable")
        if not self.keeps_grids:
            return [self[by_length[0]]]
        _, first = np.unique(table["grid"][by_length], axis=0, return_index=True)
        return [self[place] for place in by_length[first]]

    def check_text_tokenizer(self, text: TextTokenizer | None) -> None:
        """Refuse shards whose ids mean something else to the model's text tokenizer.

        Raises:
            UserError: they do.
        """
        if self._text is not None and self._text.fingerprint() != text.fingerprint():
            raise UserError(
                f"{OPTION}: {self._shards.folder} has another text tokenizer than the model; give shards that were "
                "tokenized with the model's, or that one as --text-tokenizer"
            )

    def fingerprint(self) -> str:
        """Return a short hash of the shards."""
        return self._shards.fingerprint()

    def _named(self, ids: Sequence[int]) -> tuple[str | None, int | None]:
        """Return the text and the class of a caption. The empty caption is an empty text for every model."""
        if self._text is None:
            return (None, ids[0]) if ids else ("", None)
        with error_context(f"{OPTION}: {self._shards.folder}"):
            return self._text.decode_caption(ids, self._shards.vocabulary.template), None
