"""Files of reward models: their weights read without running anything, and what another file looks like.

A file is what ``torch.save`` wrote, read as tensors only, or safetensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors

_SUFFIX = ".safetensors"
_MOST_REASON = 200


class FileKind(NamedTuple):
    """A kind of reward model in a file.

    ``article`` is its name in messages, ``look`` what its weights look like. ``example`` is a published file.
    """

    article: str
    look: str
    example: str


FILE_KINDS = {
    "hpsv2": FileKind("an HPSv2", "a CLIP in open_clip's form", "HPS_v2.1_compressed.pt of xswu/HPSv2"),
    "imagereward": FileKind("an ImageReward", "an ImageReward", "ImageReward.pt of THUDM/ImageReward"),
}
# A name that only this kind of model has among its weights.
_LOOKS = {
    "blip.visual_encoder.cls_token": "an ImageReward",
    "visual.class_embedding": "a CLIP in open_clip's form",
    "vision_model.embeddings.class_embedding": "a CLIP in transformers' form",
    "visual_encoder.cls_token": "a BLIP",
    "vision_model.embeddings.position_embedding": "a BLIP in transformers' form",
    "embeddings.cls_token": "a DINOv2 in transformers' form",
    "Mixed_6d.branch1x1.conv.weight": "an Inception",
}


def looks_like(names: Collection[str]) -> str | None:
    """Return what a model with weights of these names looks like, if it is known."""
    return next((look for name, look in _LOOKS.items() if name in names), None)


def read_weights(kind: str, file: str | Path, option: str) -> dict[str, Tensor]:
    """Return the weights of a reward model's file by name, on the CPU.

    They may be memory maps.

    Args:
        kind: one of ``FILE_KINDS``.
        file: its path. A table under ``state_dict``, as training scripts write it, is looked into.
        option: the option that named the file, for messages.

    Raises:
        UserError: no such file; a file that is damaged or holds more than tensors; another model's file, with what it
            looks like.
    """
    wanted, file = FILE_KINDS[kind], Path(file)
    remedy = f"give a copy of {wanted.example}"
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{option}: the file {file} {what}; {remedy}")
    try:
        weights = _tensors(file)
    except Exception as error:  # torch and safetensors promise no closed set for damaged files
        reason = " ".join(str(error).split())[:_MOST_REASON]
        raise UserError(f"{option}: {file} is not read ({type(error).__name__}: {reason}); {remedy}") from None
    found = looks_like(weights)
    if found != wanted.look:
        first = min(weights, default=None)
        shown = found or (f"another model, with {first[:60]!r}" if first is not None else "no model: no weights")
        raise UserError(f"{option}: {file} looks like {shown}, not like {wanted.article}; {remedy}")
    return weights


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == _SUFFIX:
        from safetensors.torch import load_file

        return load_file(file)
    found = load_tensors(file)
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    named = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Return the number of layers among names of the form ``PREFIX.NUMBER.REST``."""
    rests = (name[len(prefix) + 1 :] for name in names if name.startswith(f"{prefix}."))
    numbers = {rest.partition(".")[0] for rest in rests}
    return len({one for one in numbers if one.isdecimal()})


def square_side(patches: int) -> int:
    """Return the side of a square of so many patches.

    Raises:
        ValueError: it is none.
    """
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise ValueError(f"{patches} patches are no square")
    return side


def unusable(error: Exception, title: str, file: str | Path, option: str) -> Exception:
    """Return a :class:`UserError` for whatever a model's own code raised about its weights.

    That code promises no closed set of errors for damaged files. A package that is missing stays what it is.
    """
    if isinstance(error, ModuleNotFoundError):
        return error
    reason = " ".join(str(error).split())[:_MOST_REASON]
    return UserError(f"{option}: {file} holds no usable {title} ({type(error).__name__}: {reason})")
