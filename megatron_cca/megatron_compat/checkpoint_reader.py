"""Stands between Megatron-Core 0.19.2 and the pickles of a checkpoint that it reads.

It reads them through torch's own classes: the index ``.metadata`` by ``FileSystemReader.read_metadata``, and what is no
tensor by ``DefaultLoadPlanner.load_bytes``. Both unpickle whatever they are given. ``dist_checkpointing.load`` takes no
others.
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
    """Within the block, Megatron-Core unpickles nothing of a checkpoint itself.

    Args:
        folder: of the checkpoint; no other one may be read within the block.
        index: stands for its ``.metadata``.
        load: returns what the bytes of an item hold that is no tensor; it is given the item's unique key, too.
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
