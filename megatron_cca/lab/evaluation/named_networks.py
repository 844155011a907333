"""Published networks that a user names as ``KIND:PATH``, from a folder in transformers' form or a file.

Extractors and scorers read the names here. Nothing is downloaded, no pickled weights are loaded, and no code of a
folder runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.paths import typed_path

# The side in pixels that dgm-eval gives to DINOv2, whatever the folder's own image processor does.
_DINOV2_SIDE = 224
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MOST_CONFIG_BYTES = 1 << 20


class Kind(NamedTuple):
    """A kind of published network.

    ``article`` is its name in messages. ``model_type`` is that of its ``config.json``. ``example`` is a published
    folder.
    """

    article: str
    model_type: str
    example: str


KINDS = {
    "dinov2": Kind("a DINOv2", "dinov2", "facebook/dinov2-large"),
    "clip": Kind("a CLIP", "clip", "openai/clip-vit-large-patch14"),
    "pickscore": Kind("a PickScore", "clip", "yuvalkirstain/PickScore_v1"),
}
EXTRACTOR_KINDS, SCORER_KINDS = ("dinov2", "clip"), ("clip", "pickscore")


def kind_of(name: str, kinds: tuple[str, ...]) -> str | None:
    """Return the kind before the colon of ``KIND:PATH``, if it is one of ``kinds``."""
    kind, separator, _ = name.partition(":")
    return kind if separator and kind in kinds else None


def folder_of(name: str, option: str) -> Path:
    """Return the path behind the colon.

    Raises:
        UserError: the path has a form that is not replaced, such as ``$A``.
    """
    with error_context(option):
        return Path(typed_path(name.partition(":")[2]))


def check_folder(kind: str, folder: str | Path, option: str) -> None:
    """Refuse a path that is no folder of this kind of network, by its ``config.json``.

    No weights are loaded.

    Raises:
        UserError: names the folder, what it looks like, and what would be right.
    """
    wanted = KINDS[kind]
    remedy = f"give the folder of {wanted.article} in transformers' form, such as a copy of {wanted.example}"
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{option}: {folder} has no config.json; {remedy}")
    found = read_config(file).get("model_type")
    if not isinstance(found, str):
        raise UserError(f"{option}: {file} names no model_type; {remedy}")
    if found != wanted.model_type:
        raise UserError(f"{option}: {folder} looks like a {found[:40]!r}, not like {wanted.article}; {remedy}")


def read_config(file: Path) -> dict:
    """Return the table in a ``config.json``; empty if it holds none. Nothing beyond a megabyte is read."""
    with file.open("rb") as opened:
        content = opened.read(_MOST_CONFIG_BYTES)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 of a folder's configuration and weights."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as opened:
            total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def loaded(kind: str, folder: Path, option: str, load: Callable[[], object]) -> object:
    """Return what ``load`` makes of a folder.

    Raises:
        UserError: in one line, whatever ``load`` raises.
    """
    try:
        return load()
    except Exception as error:  # transformers promises no closed set for damaged folders
        reason = " ".join(str(error).split())[:120]
        what = KINDS[kind].article.split()[-1]
        raise UserError(f"{option}: {folder} holds no usable {what} ({type(error).__name__}: {reason})") from None


def refuse_missing(report: dict) -> None:
    """Refuse weights that a folder lacks: transformers would draw them at random.

    Args:
        report: the second answer of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        ValueError: names one.
    """
    lacking = sorted(report["missing_keys"]) + sorted(str(one) for one in report["mismatched_keys"])
    if lacking:
        raise ValueError(f"{len(lacking)} weights are missing or of another shape, such as {lacking[0]}")


def open_network(name: str, option: str) -> tuple[nn.Module, dict[str, str]]:
    """Open an extractor of one of ``EXTRACTOR_KINDS`` on the CPU.

    Returns:
        The network, and its fingerprint under ``sha256`` for the record.

    Raises:
        UserError: see :func:`check_folder`; damaged weights.
    """
    kind, folder = kind_of(name, EXTRACTOR_KINDS), folder_of(name, option)
    check_folder(kind, folder, option)
    network = loaded(kind, folder, option, lambda: {"dinov2": Dinov2Features, "clip": ClipFeatures}[kind](folder))
    return network, {"sha256": fingerprint(folder)}


class Dinov2Features(nn.Module):
    """DINOv2's class token behind the last norm, as FD-DINOv2 compares it (arXiv 2306.04675, ``dgm-eval``).

    Images are resized to 224 x 224 (bicubic, antialiased, in whole grey levels) and normalised by ImageNet's mean and
    deviation. It maps uint8 ``[N, 3, H, W]`` to ``features`` float32 ``[N, D]``.
    """

    side = _DINOV2_SIDE

    def __init__(self, folder: Path) -> None:
        super().__init__()
        # Imported late: the import of transformers takes seconds.
        from transformers import Dinov2Model

        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        self.model, report = Dinov2Model.from_pretrained(folder, local_files_only=True, **options)
        refuse_missing(report)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the features."""
        pixels = normalised(images, self.side, *_IMAGENET)
        return {"features": self.model(pixel_values=pixels).pooler_output}


class ClipFeatures(nn.Module):
    """CLIP's image embedding of length 1, as CMMD compares it (arXiv 2401.09603).

    Images are resized to the model's square (bicubic, antialiased), not cropped, and normalised as the folder's
    ``preprocessor_config.json`` says. It maps uint8 ``[N, 3, H, W]`` to ``features`` and ``clip``, both the same
    float32 ``[N, D]``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPImageProcessor, CLIPModel

        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        # The class of the image part alone takes the embedding's width from the wrong place of a CLIP's config.json.
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, **options)
        refuse_missing(report)
        self.model, self.projection = model.vision_model, model.visual_projection
        self.side = model.config.vision_config.image_size
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self.scaling = tuple(processor.image_mean), tuple(processor.image_std)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the embeddings."""
        pixels = normalised(images, self.side, *self.scaling)
        embeddings = normalize(self.projection(self.model(pixel_values=pixels).pooler_output), dim=1)
        return {"features": embeddings, "clip": embeddings}


def normalised(images: Tensor, side: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Resize images to a square, in whole grey levels, and normalise them.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        side: pixels.
        mean, deviation: of each channel, for values from 0 to 1.
    """
    return scaled(resized(images, (side, side)).float() / 255, mean, deviation)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images uint8 ``[N, 3, H, W]`` to height and width as Pillow does: bicubic, antialiased, rounded."""
    if images.shape[2:] == size:
        return images
    # On bytes torch rounds and cuts off between the two passes, as Pillow does. It has this for the CPU alone.
    pixels = interpolate(images.cpu().contiguous(), size, mode="bicubic", antialias=True)
    return pixels.to(images.device)


def scaled(pixels: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Normalise values from 0 to 1, ``[N, 3, H, W]``, by each channel's mean and deviation."""
    shape = 1, 3, 1, 1
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(deviation).view(shape)
