"""Sending images through an extractor, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError

_PARTS = ("features", "logits", "spatial")

OnProgress = Callable[[int], object]


def widths(extractor: nn.Module, images: np.ndarray) -> dict[str, int]:
    """The parts that an extractor gives and how many numbers an image each has, found on the first of the images."""
    return {name: part.shape[1] for name, part in _run(extractor, _batch(images[:1], _device(extractor))).items()}


def check_images(name: str, images: np.ndarray) -> None:
    """Refuse anything but uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.

    Raises:
        UserError: begins with ``name``, which says whose images they are.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise UserError(f"{name}: expected uint8 [N, H, W] or [N, H, W, 3], found {images.dtype} {list(images.shape)}")


def extract(
    who: str,
    images: np.ndarray,
    extractor: nn.Module,
    names: set[str],
    batch_size: int,
    on_progress: OnProgress | None,
) -> dict[str, Tensor]:
    """The named parts of an extractor's answers, float32 ``[N, D]`` on the CPU.

    Args:
        who: whose images they are, for messages.
        images: uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.
        extractor: see :func:`megatron_cca.lab.evaluation.fidelity.fidelity`.
        names: parts that it gives; none means that it is not run.
        batch_size: images it sees together.
        on_progress: called with the number of images just done.

    Raises:
        UserError: it gives something else, or what is not a number.
    """
    device, kept = _device(extractor), {name: [] for name in names}
    for start in range(0, len(images), batch_size) if names else ():
        batch = _batch(images[start : start + batch_size], device)
        answer = _run(extractor, batch)
        for name in names:
            kept[name].append(answer[name].float().cpu())
            if not kept[name][-1].isfinite().all():
                last = start + len(batch) - 1
                raise UserError(f"{who}: the extractor's {name} of images {start} to {last} are not all finite numbers")
        if on_progress is not None:
            on_progress(len(batch))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _device(extractor: nn.Module) -> torch.device:
    tensor = next(chain(extractor.parameters(), extractor.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _batch(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 ``[N, 3, H, W]``."""
    pixels = torch.tensor(images).to(device)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@torch.no_grad()
def _run(extractor: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    answer = extractor(batch)
    if isinstance(answer, tuple | list):
        answer = dict(zip(_PARTS, answer, strict=False)) if len(answer) in (2, 3) else None
    good = isinstance(answer, Mapping) and all(
        name in _PARTS and isinstance(part, Tensor) and part.ndim >= 2 and len(part) == len(batch)
        for name, part in answer.items()
    )
    if not good or not answer:
        raise UserError(
            "extractor: must give features [N, D], logits [N, C] and perhaps spatial features [N, S], as a tuple of 2 "
            "or 3 tensors or a dict with the keys features, logits and spatial"
        )
    return {name: part.flatten(1) for name, part in answer.items()}
