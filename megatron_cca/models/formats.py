"""What a family says of files: its Hugging Face folders, its authors' own weights, its image tokenizer; no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_cca.config import ModelConfig
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.weight_map import WeightMap

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, float]
if TYPE_CHECKING:
    import torch

    from megatron_cca.models.image_tokenizers import ImageTokenizer


@dataclass(frozen=True)
class Naming:
    """How tensors are called in one form of a checkpoint.

    Attributes:
        form: what the form is called on the command line.
        prefixes: from the start of a name on disk to its start in the weight map.
        companion_prefix: how the names of the parts start that travel along unchanged; None where there are none.
    """

    form: str
    prefixes: Mapping[str, str]
    companion_prefix: str | None = None

    def mapped(self, name: str) -> str | None:
        """The weight map's name for a name on disk; None if it is not one of the decoder's."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return None

    def on_disk(self, name: str) -> str:
        """The inverse of :meth:`mapped`."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(replacement):
                return prefix + name.removeprefix(replacement)
        raise AssertionError(f"no prefix for {name}")

    def companion(self, name: str) -> str | None:
        """The name without its prefix if it belongs to a part that travels along, else None."""
        if self.companion_prefix is None or not name.startswith(self.companion_prefix):
            return None
        return name.removeprefix(self.companion_prefix)


def recognise_naming(namings: Sequence[Naming], names: Iterable[str]) -> Naming:
    """The naming that knows most of these names."""
    names = list(names)

    def known(naming: Naming) -> int:
        return sum(naming.mapped(name) is not None or naming.companion(name) is not None for name in names)

    return max(namings, key=known)


class HuggingFaceFormat(Protocol):
    """A family's checkpoints on Hugging Face. Configurations are the contents of ``config.json``.

    Attributes:
        weights: the weight map.
        marker: its name for a tensor that every model has, by which sets of weights are found in a folder.
        model_types: what ``model_type`` may say.
        namings: every way in which tensors are named on disk; of one form, the first is the one written.
    """

    weights: WeightMap
    marker: str
    model_types: frozenset[str]
    namings: Sequence[Naming]

    def form(self, config: Json) -> str:
        """The form that a configuration belongs to."""

    def read_model_config(self, config: Json) -> ModelConfig:
        """The ``model`` section with every size that the configuration gives.

        Raises:
            UserError: a key whose value this family's Megatron model cannot have; names the key.
        """

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """A configuration in ``form`` for this model, otherwise like ``template`` (of any form).

        Args:
            template: an existing configuration, or None.
            architecture: the sizes to write.
            dtype: of the weights, as torch spells it ("bfloat16").
            form: one of the namings' forms.

        Raises:
            UserError: no template where this form needs one.
        """

    def companion_shapes(self, config: Json) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors that travel along, by name without prefix; None where the form has none.

        Raises:
            UserError: what transformers says about a configuration that it does not take.
        """

    def transformers_model(self, config: Json):
        """transformers' own decoder for a configuration, on the meta device but for its buffers, in evaluation mode.

        Raises:
            UserError: what transformers says about a configuration that it does not take.
        """


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


class ImageTokenizerFiles(Protocol):
    """The files of a family's image tokenizer.

    Attributes:
        description: what they are, for messages.
    """

    description: str

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like one, by names alone."""

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> ImageTokenizer:
        """The image tokenizer in a file or folder that was recognised.

        Args:
            path: where its files lie.
            device: where it runs.
            weights: the folder of its tensors where they travel with a checkpoint; None means that they lie there too.

        Raises:
            UserError: a missing or damaged file, or one of another model; names it.
        """
