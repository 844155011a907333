"""The interface of a family's weights in its authors' own format: one file, without a configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from megatron_cca.config import ModelConfig
from megatron_cca.models.weight_map import WeightMap

Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, float]


class WeightsFileFormat(Protocol):
    """A family's weights in one file.

    Attributes:
        weights: the weight map. It maps Megatron's names to the authors'.
        sections: keys that the authors' programs use for the tensors, beside what else they save. Exports use the
            first.
        marker: the name of a tensor that every model of the family has. Sets of weights in a file are found by it.
        unsaid: keys of the ``model`` section that do not always follow from shapes.
    """

    weights: WeightMap
    sections: Sequence[str]
    marker: str
    unsaid: Collection[str]

    def knows(self, names: Collection[str]) -> bool:
        """Return whether tensors of these names look like any model of the family."""

    def read_model_config(self, shapes: Shapes, given: Sizes, assumed: Sizes) -> ModelConfig:
        """Return the ``model`` section with every size.

        Args:
            shapes: of the tensors, computed ones included.
            given: sizes that the user gave, by key.
            assumed: values of ``unsaid`` keys that neither shapes nor the user nor a released model give.

        Raises:
            UserError: an unsupported model of this family, a size that nothing gives, or a given size that is wrong.
                The message says what the model looks like.
        """
