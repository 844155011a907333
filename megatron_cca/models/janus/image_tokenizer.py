"""Janus-Pro's image tokenizer, which is of LlamaGen's structure, in a folder of the model in either form.

original      ``gen_vision_model.``, by the names of LlamaGen's authors.
transformers  ``model.vqmodel.``, by transformers' names.

transformers encodes to the nearest vector, and not to that of the nearest direction as the authors do. This is the same
where the codebook's vectors have one length.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import model_type_in, read_json
from megatron_cca.models.vq_directions import LLAMAGEN_FORM, DirectionTokenizer, check_directions, direction_tokenizer
from megatron_cca.models.vq_files import VqForm, vq_contents, with_vqgan_parts
from megatron_cca.models.weight_files import CONFIG


def _transformers_name(name: str, _: int) -> str:
    # VQGAN's names, but the decoder's levels keep the network's numbers.
    return with_vqgan_parts(re.sub(r"^decoder\.conv_blocks\.", "decoder.up.", name))


# By model_type, the prefix of the names and the rest of them.
_FORMS: dict[str, tuple[str, VqForm]] = {
    "multi_modality": ("gen_vision_model.", replace(LLAMAGEN_FORM, owner="Janus-Pro's")),
    "janus": ("model.vqmodel.", replace(LLAMAGEN_FORM, owner="Janus-Pro's", file_name=_transformers_name)),
}


class JanusVqFiles:
    """See :class:`megatron_cca.models.formats.ImageTokenizerFiles`."""

    description = f"the {CONFIG} and weights of Janus-Pro"

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return (path / CONFIG).is_file()

    def knows(self, path: Path) -> bool:
        """See the protocol."""
        return model_type_in(path / CONFIG) in _FORMS

    def open(
        self,
        path: Path,
        device: str | torch.device,
        weights: Path | None = None,
        scales: tuple[int, ...] = (),
    ) -> DirectionTokenizer:
        """See the protocol. Only the tensors of the image tokenizer are read."""
        prefix, form = _form(path)
        files = path if weights is None else weights
        try:
            from megatron_cca.models.weights_folder import open_weights
        except ImportError:
            raise UserError("needs safetensors; pip install 'megatron-cca[hf]'") from None
        folder = open_weights(files, None)
        found = {
            name.removeprefix(prefix): folder.read_info(info)
            for name, info in folder.tensors.items()
            if name.startswith(prefix)
        }
        with error_context(f"{files}: {prefix}*"):
            if not found:
                raise UserError("there are no such tensors")
            return direction_tokenizer(check_directions(vq_contents(found, form)), device)


def _form(path: Path) -> tuple[str, VqForm]:
    """Return the prefix of tensors' names, and the form of the rest, in the folder of a model."""
    with error_context(path / CONFIG):
        config: dict[str, Any] = read_json(path / CONFIG)
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in _FORMS:
            raise UserError(f"model_type {repr(kind)[:60]} is not Janus-Pro's: {' or '.join(_FORMS)}")
    return _FORMS[kind]
