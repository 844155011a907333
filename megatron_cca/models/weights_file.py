"""What a family says about the files in which its own authors publish weights: one ``.pt``, without a configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from megatron_cca.config import ModelConfig
from megatron_cca.models.weight_map import WeightMap

Shapes = Mapping[str, tuple[int, ...]]


class WeightsFileFormat(Protocol):
    """A family's weights in one file.

    Attributes:
        weights: the weight map; its other names are the authors'.
        sections: keys under which the authors' programs keep or look for the tensors, beside what else they save. The
            first one that a file has counts; what is written stands under the first of all.
        ignored: tensors that are computed and not learnt; they may be there.
    """

    weights: WeightMap
    sections: Sequence[str]
    ignored: Collection[str]

    def knows(self, names: Collection[str]) -> bool:
        """Whether tensors of these names look like any model of the family."""

    def read_model_config(self, shapes: Shapes) -> ModelConfig:
        """The ``model`` section: a preset, as far as shapes can tell, with every size.

        Raises:
            UserError: a model of this family that is none here; says what it looks like.
        """
