"""The interface of a family's Hugging Face checkpoints: names on disk, config.json, the weight map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_cca.config import ModelConfig
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.weight_map import WeightMap

Json = dict[str, Any]


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
            UserError: this family's Megatron model cannot have the value of a key; names the key.
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
            UserError: no template where this form needs one.
        """

    def companion_shapes(self, config: Json) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of the companion tensors, by name without prefix. None where the form has none.

        Raises:
            UserError: what transformers says about a configuration that it does not take.
        """

    def transformers_model(self, config: Json):
        """Return transformers' own decoder, on the meta device except for its buffers, in evaluation mode.

        Raises:
            UserError: what transformers says about a configuration that it does not take.
        """
