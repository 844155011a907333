"""The interface of a family's files: Hugging Face folders, the authors' own weights, the image tokenizer. No torch."""

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

    from megatron_cca.models.image_tokenizer_protocol import ImageTokenizer


@dataclass(frozen=True)
class Naming:
    """The names of tensors in one form of a checkpoint.

    Attributes:
        form: the name of the form on the command line.
        prefixes: from the prefix of a name on disk to its prefix in the weight map.
        companion_prefix: the prefix of companion tensors, which are copied unchanged. None where there are none.
    """

    form: str
    prefixes: Mapping[str, str]
    companion_prefix: str | None = None

    def mapped(self, name: str) -> str | None:
        """Return the weight map's name for a name on disk. None if it is not one of the decoder's."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return None

    def on_disk(self, name: str) -> str:
        """Return the name on disk for a name of the weight map, the inverse of :meth:`mapped`."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(replacement):
                return prefix + name.removeprefix(replacement)
        raise AssertionError(f"no prefix for {name}")

    def companion(self, name: str) -> str | None:
        """Return the name without its prefix if it is a companion tensor's, else None."""
        if self.companion_prefix is None or not name.startswith(self.companion_prefix):
            return None
        return name.removeprefix(self.companion_prefix)


def recognise_naming(namings: Sequence[Naming], names: Iterable[str]) -> Naming:
    """Return the naming that knows most of these names."""
    names = list(names)

    def known(naming: Naming) -> int:
        return sum(naming.mapped(name) is not None or naming.companion(name) is not None for name in names)

    return max(namings, key=known)


class HuggingFaceFormat(Protocol):
    """A family's checkpoints on Hugging Face. Configurations are the contents of ``config.json``.

    Attributes:
        weights: the weight map.
        marker: the weight map's name of a tensor that every model has. Sets of weights in a folder are found by it.
        model_types: the values that ``model_type`` may have.
        namings: all namings of tensors on disk. The first of a form is used for writing.
    """

    weights: WeightMap
    marker: str
    model_types: frozenset[str]
    namings: Sequence[Naming]

    def form(self, config: Json) -> str:
        """Return the form of a configuration."""

    def read_model_config(self, config: Json) -> ModelConfig:
        """Return the ``model`` section with every size in the configuration.

        Raises:
            UserError: this family's Megatron model cannot have the value of a key. Names the key.
        """

    def write_config(self, template: Json | None, architecture: Architecture, dtype: str, form: str) -> Json:
        """Return a configuration in ``form`` for this model.

        Everything else is as in ``template``, which may have any form.

        Args:
            template: an existing configuration, or None.
            architecture: the sizes to write.
            dtype: of the weights, as torch spells it ("bfloat16").
            form: one of the namings' forms.

        Raises:
            UserError: this form needs a template, and there is none.
        """

    def companion_shapes(self, config: Json) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of the companion tensors, by name without prefix. None if the form has none.

        Raises:
            UserError: transformers refuses the configuration. The message is that of transformers.
        """

    def transformers_model(self, config: Json):
        """Return transformers' own decoder, on the meta device except for its buffers, in evaluation mode.

        Raises:
            UserError: transformers refuses the configuration. The message is that of transformers.
        """


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


class ImageTokenizerFiles(Protocol):
    """The files of a family's image tokenizer.

    Attributes:
        description: what they are, for messages.
    """

    description: str

    def recognises(self, path: Path) -> bool:
        """Return whether a file or folder looks like one, by names alone."""

    def open(self, path: Path, device: str | torch.device, weights: Path | None = None) -> ImageTokenizer:
        """Return the image tokenizer in a file or folder that was recognised.

        Args:
            path: the file or folder.
            device: the device that it runs on.
            weights: the folder of its tensors, for the files in a checkpoint. None means that they are in ``path``.

        Raises:
            UserError: a file is missing or damaged, or is of another model. Names the file.
        """
