"""Megatron checkpoints written and read by pieces, without Megatron; and indexes that try to run code."""

import os
import pickle
import re
from functools import partial

import pytest
import torch

from megatron_cca.checkpoint.integrity import INDEX, read_index
from megatron_cca.checkpoint.stored_tensors import Piece, StoredTensors, save_pieces
from megatron_cca.errors import UserError

STACKED = torch.randn(3, 6, 4)
PLAIN = torch.randn(10, 4).bfloat16()


def block(tensor, offsets, sizes):
    return tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()


def piece(key, tensor, offsets, sizes):
    read = partial(block, tensor, offsets, sizes)
    return Piece(key, tuple(tensor.shape), offsets, sizes, tensor.dtype, read)


@pytest.fixture
def folder(tmp_path):
    """Blocks as tensor parallelism cuts them: by columns, by rows, unevenly."""
    pieces = [piece("stacked", STACKED, (layer, 0, column), (1, 6, 2)) for layer in range(3) for column in (0, 2)]
    pieces += [piece("plain", PLAIN, (0, 0), (7, 4)), piece("plain", PLAIN, (7, 0), (3, 4))]
    save_pieces(tmp_path, pieces)
    return tmp_path


def test_any_rows_come_back(folder):
    stored = StoredTensors(folder, "--checkpoint")
    assert (stored.shape("stacked"), stored.dtype("plain")) == ((3, 6, 4), torch.bfloat16)
    for start, stop in ((0, 10), (0, 3), (3, 6), (6, 8), (9, 10)):
        assert torch.equal(stored.read("plain", None, start, stop), PLAIN[start:stop])
    for layer, start, stop in ((0, 0, 6), (2, 1, 4), (1, 5, 6)):
        assert torch.equal(stored.read("stacked", layer, start, stop), STACKED[layer, start:stop])


def test_a_chunk_is_read_once_for_neighbouring_rows(folder, monkeypatch):
    stored = StoredTensors(folder, "--checkpoint")
    loads = []
    original = stored._load
    monkeypatch.setattr(stored, "_load", lambda *arguments: loads.append(1) or original(*arguments))
    for start in range(6):
        stored.read("plain", None, start, start + 1)
    assert len(loads) == 1


def test_rows_that_nobody_wrote_are_not_made_up(tmp_path):
    save_pieces(tmp_path, [piece("plain", PLAIN, (0, 0), (7, 4))])
    stored = StoredTensors(tmp_path, "--checkpoint")
    assert torch.equal(stored.read("plain", None, 2, 7), PLAIN[2:7])
    with pytest.raises(UserError, match="does not hold all of plain; choose another checkpoint"):
        stored.read("plain", None, 5, 8)


@pytest.mark.parametrize("inner", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_torchs_writer_hides_comes_out(inner, tmp_path):
    """Its zip file cannot be closed after an error inside, and says only that."""

    def read():
        try:
            raise inner
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(type(inner)):
        save_pieces(tmp_path, [Piece("plain", (10, 4), (0, 0), (10, 4), PLAIN.dtype, read)])


def refused(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_data_is_named(folder):
    stored = StoredTensors(folder, "--checkpoint")
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = refused(lambda: stored.read("plain", None, 7, 10))
    assert re.search(r"--checkpoint: plain in .* cannot be read, a file is damaged: ", said)
    said = refused(lambda: StoredTensors(folder, "--checkpoint"))
    assert re.search(r"\.metadata: __0_0\.distcp is too short for (plain|stacked); choose another checkpoint", said)
    file.unlink()
    assert "__0_0.distcp is missing" in refused(lambda: StoredTensors(folder, "--checkpoint"))


def test_an_index_that_would_run_code_is_refused(folder, tmp_path):
    witness = tmp_path / "was here"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch '{witness}'",)

    (folder / INDEX).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"it asks for posix\.system"):
        read_index(folder, "--checkpoint")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1})])
def test_other_indexes_are_refused(content, folder):
    (folder / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="index"):
        read_index(folder, "--checkpoint")


@pytest.mark.parametrize("table", ["state_dict_metadata", "storage_data"])
def test_an_index_without_its_tables_is_refused(table, folder):
    index = read_index(folder, "--checkpoint")
    setattr(index, table, None)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="is not a checkpoint's index; choose another checkpoint"):
        read_index(folder, "--checkpoint")


def test_no_index_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"\.metadata is missing: not a Megatron distributed checkpoint"):
        read_index(tmp_path, "--checkpoint")
