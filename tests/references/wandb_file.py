"""Read the .wandb file of a run of Weights & Biases, by the format of LevelDB's log, which it is.

A head of 7 bytes, blocks of 32 KiB. A record, or a part of one, has a checksum (4 bytes), a length (2), a kind (1).
"""

import json
import struct

BLOCK = 2**15
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """The messages of a file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            yield Record.FromString(whole)


def history(path):
    """What was logged: one dictionary a call."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
