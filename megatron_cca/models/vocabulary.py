"""The number of token ids of a model. Families add which id means what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from megatron_cca.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Token ids ``0 .. size - 1`` of unknown meaning.

    Such a model can be converted, but neither trained on images nor sampled.
    """

    size: int

    @property
    def output_size(self) -> int:
        """How many of the ids, from 0 on, the LM head predicts.

        The head's rows after them are masked, as padding is.
        """
        return self.size

    def resized(self, codebook_size: int | None, num_classes: int | None) -> Vocabulary:
        """Return the vocabulary of the same family with other sizes. None leaves a size as it is.

        Raises:
            UserError: a family whose vocabulary has one size.
        """
        key = "codebook_size" if codebook_size is not None else "num_classes"
        raise UserError(f"model.{key}: this model's vocabulary has one size, {self.size}; leave the key out")

    def fingerprint(self) -> str:
        """Return a short hash of the whole vocabulary. Shards and models whose hashes differ do not fit."""
        layout = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(layout.encode()).hexdigest()[:16]
