"""Let Megatron read a checkpoint's pickles only if they hold plain data.

How Megatron-Core 0.19 reads the parts of a checkpoint:

- tensors: ``torch.load`` with ``weights_only``, which is safe;
- the index ``.metadata``: ``pickle.load``;
- objects (``common_state``, the layers' extra states, the optimizer's objects): ``torch.load`` with
  ``weights_only=False``;
- ``common.pt``, which only older versions wrote: an unpickler that allows unsafe functions of numpy.

Transformer Engine then unpickles the bytes of the layers' extra states.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors, unpickled
from megatron_cca.megatron_compat.checkpoint_format import COMMON_PREFIX, EXTRA_STATE, OLD_COMMON_FILE
from megatron_cca.megatron_compat.checkpoint_reader import replaced_reading
from megatron_cca.megatron_compat.extra_states import is_of_a_recipe

# Megatron-LM keeps its arguments in a Namespace.
_ALLOWED_IN_COMMON_STATE = [(Namespace, "argparse.Namespace")]


@contextmanager
def plain_data_only(stored: StoredTensors) -> Iterator[None]:
    """Prevent Megatron from running code of a checkpoint that it reads within the block.

    Args:
        stored: the checkpoint. Its index is already read and checked.

    Raises:
        UserError: there is a ``common.pt``. In the block: a file is damaged, or holds more than plain data. Names the
            file.
    """
    if (stored.folder / OLD_COMMON_FILE).exists():
        raise UserError(
            f"{stored.option}: {stored.folder / OLD_COMMON_FILE} is a pickle of an older Megatron, which is not "
            "read; choose another checkpoint"
        )

    def load(content: bytes, name: str) -> Any:
        return _loaded(content, name, stored)

    with replaced_reading(stored.folder, stored.index, load):
        try:
            yield
        except CheckpointException as error:
            # A BaseException of torch, with one failure for each rank. Here there is one rank.
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, UserError):
                raise cause from None
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"{stored.option}: {stored.folder} cannot be read, a file is damaged: {why}") from None


def _loaded(content: bytes, name: str, stored: StoredTensors) -> Any:
    try:
        is_common = name.startswith(COMMON_PREFIX)
        found = load_tensors(content, _ALLOWED_IN_COMMON_STATE if is_common else ())
        if is_common:
            _drop_arguments(found)
        if EXTRA_STATE in name:
            _check_extra_states(found)
    except Exception as error:
        raise UserError(
            f"{stored.option}: {name} in {stored.folder} is damaged or holds more than plain data: {error}"
        ) from None
    return found


def _drop_arguments(found: Any) -> None:
    """Remove Megatron-LM's arguments. Megatron-Core would take settings for loading from them."""
    for part in found if isinstance(found, list | tuple) else ():
        if isinstance(part, dict):
            part.pop("args", None)


def _check_extra_states(found: Any) -> None:
    """Refuse pickled bytes that would run code when Transformer Engine unpickles them."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        for part in found:
            _check_extra_states(part)
    elif isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        unpickled(found.contiguous().numpy().tobytes(), is_of_a_recipe)
