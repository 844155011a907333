"""Use NVIDIA DALI, which no other module imports: copy token batches to the device. ``dali_images`` decodes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cca import platform
from megatron_cca.errors import UserError


def is_installed() -> bool:
    """Return whether NVIDIA DALI can be imported."""
    try:
        installed()
    except UserError:
        return False
    return True


def sequence_stage(rows: int, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Return a function that copies an array int32 ``[rows, S]`` to the device, into memory of DALI's.

    DALI may overwrite that memory when the tensor is deleted, and in the next call. The tensor is ready for the current
    stream of the calling thread.

    Args:
        rows: of every array. S may differ from call to call.
        device: of the results.

    Raises:
        UserError: DALI is not installed, or does not start on this device.
    """
    dali = installed()
    with new_pipeline(device, rows, threads=1) as pipeline:
        ids = dali.fn.external_source(name="ids", dtype=dali.types.INT32, ndim=1)
        pipeline.set_outputs(ids if device.type == "cpu" else ids.gpu())
    start(pipeline, device)

    def stage(array: np.ndarray) -> Tensor:
        (staged,) = pipeline.run(ids=array)
        return torch.from_dlpack(staged.as_tensor())

    return stage


def installed() -> ModuleType:
    """Return DALI; raise :class:`UserError` where it is not installed."""
    try:
        import nvidia.dali.fn
    except ImportError:
        raise UserError("needs NVIDIA DALI; pip install 'megatron-cca[data]'") from None
    return nvidia.dali


def new_pipeline(device: torch.device, batch_size: int, threads: int) -> Any:
    """Return an empty pipeline whose ``run`` returns the batch that it was given."""
    on_gpu = device.type != "cpu"
    index = platform.device().index if on_gpu and device.index is None else device.index
    # So that nothing is read ahead.
    return installed().Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=index if on_gpu else None, prefetch_queue_depth=1
    )


def start(pipeline: Any, device: torch.device) -> Any:
    """Build a pipeline and return it; raise :class:`UserError` where DALI does not start on the device."""
    try:
        pipeline.build()
    except RuntimeError as error:
        raise UserError(f"DALI does not start on {device}: {one_line(error)}") from None
    return pipeline


def one_line(message: object) -> str:
    """Return DALI's message without its traceback of our own pipeline."""
    lines = str(message).partition("encountered:")[2] or str(message)
    return " ".join(lines.replace("Current pipeline object is no longer valid.", "").split())
