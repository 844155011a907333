"""What a family says about the files in which its own authors publish weights: one file, without a configuration."""

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
        weights: the weight map; its other names are the authors'.
        sections: keys under which the authors' programs keep or look for the tensors, beside what else they save. What
            is written stands under the first of all.
        marker: a tensor that every model of the family has, by which sets of weights are found in a file.
        unsaid: keys of the ``model`` section that shapes do not tell, or not always.
    """

    weights: WeightMap
    sections: Sequence[str]
    marker: str
    unsaid: Collection[str]

    def knows(self, names: Collection[str]) -> bool:
        """Whether tensors of these names look like any model of the family."""

    def read_model_config(self, shapes: Shapes, given: Sizes, assumed: Sizes) -> ModelConfig:
        """The ``model`` section with every size.

        Args:
            shapes: of the tensors, computed ones included.
            given: what the user said of the model, by key.
            assumed: what holds for ``unsaid`` keys where neither shapes nor the user nor a released model tell.

        Raises:
            UserError: a model of this family that is none here; a size that nothing tells, or that is given and wrong;
                says what the model looks like.
        """
