"""Replace the functions by which Megatron-Core 0.19.2 unpickles parts of a checkpoint.

Megatron-Core uses torch's classes: ``FileSystemReader.read_metadata`` for the index ``.metadata``, and
``DefaultLoadPlanner.load_bytes`` for objects that are not tensors. Both unpickle anything. ``dist_checkpointing.load``
does not accept other classes.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def replaced_reading(folder: Path, index: Metadata, load: Callable[[bytes, str], Any]) -> Iterator[None]:
    """Prevent Megatron-Core from unpickling anything of a checkpoint itself within the block.

    Args:
        folder: folder of the checkpoint. No other checkpoint can be read within the block.
        index: the content of its ``.metadata``.
        load: unpickles an object. It gets the bytes and the unique key of the object.
    """

    def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        assert reader.path == folder, f"{reader.path} is read, not {folder}"
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = reader.load_id
        return index

    def load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = load(value.getvalue(), name)
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], found)
        else:
            planner.state_dict[name] = found

    with (
        _ONE_AT_A_TIME,
        patch.object(FileSystemReader, "read_metadata", read_metadata),
        patch.object(DefaultLoadPlanner, "load_bytes", load_bytes),
    ):
        yield
