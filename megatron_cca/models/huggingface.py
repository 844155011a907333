"""What a family says about its checkpoints on Hugging Face: names on disk, config.json, the weight map."""

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
