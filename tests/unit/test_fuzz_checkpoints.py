"""Checkpoints that may hold anything: their summary, latest-file, index and data."""

import copy
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

from megatron_cca.checkpoint.integrity import INDEX, read_index
from megatron_cca.checkpoint.stored_tensors import Piece, StoredTensors, save_pieces
from tests.references.fuzzing import NAMES, NUMBERS, fuzzed, spoilt

KEY = "training.pretrained_checkpoint"
DATA = "__0_0.distcp"


def pieces():
    whole = torch.arange(24.0).reshape(2, 3, 4)
    for layer in range(2):
        yield Piece("stacked", (2, 3, 4), (layer, 0, 0), (1, 3, 4), whole.dtype, lambda at=layer: whole[at : at + 1])
    yield Piece("plain", (5,), (0,), (5,), torch.bfloat16, lambda: torch.ones(5, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a small checkpoint by name."""
    folder = tmp_path_factory.mktemp("written")
    save_pieces(folder, list(pieces()))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(written, tmp_path_factory):
    """Its index."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    folder.mkdir()
    fill(folder, written)
    return read_index(folder, KEY)


def fill(folder, files, **changed_files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in (files | changed_files).items():
        (folder / name).write_bytes(content)


def read_everything(folder):
    stored = StoredTensors(folder, KEY)
    for name in stored.names():
        shape = stored.shape(name)
        if len(shape):
            stored.read_block(name, [0] * len(shape), shape)


# What may be written over any part of an index.
PARTS = (
    st.sampled_from([*NAMES, *NUMBERS, None, [], {}, torch.Size([1]), torch.Size([10**12]), torch.Size([-1])])
    | st.builds(ChunkStorageMetadata, st.just(torch.Size([0])), st.just(torch.Size([10**9])))
    | st.just(TensorProperties(torch.float64))
    | st.sampled_from([MetadataIndex("plain"), MetadataIndex("stacked", [0, 0, 0])])
)


@st.composite
def forged(draw, index):
    """The index with attributes of some of its parts replaced."""
    index = copy.deepcopy(index)
    parts = [index, *index.state_dict_metadata.values(), *index.storage_data.values()]
    parts += [tensor.properties for tensor in index.state_dict_metadata.values() if hasattr(tensor, "properties")]
    parts += [chunk for tensor in index.state_dict_metadata.values() for chunk in getattr(tensor, "chunks", [])]
    for part in draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2)):
        if vars(part):
            setattr(part, draw(st.sampled_from(sorted(vars(part)))), draw(PARTS))
    return pickle.dumps(index)


@fuzzed("checkpoint index")
@given(data=st.data())
def test_no_index_gets_through(sandbox, written, whole, data):
    try:
        index = data.draw(spoilt(written[INDEX]) | forged(whole))
    except (RuntimeError, AttributeError):  # not even pickle writes it
        return
    fill(sandbox.inside, written, **{INDEX: index})
    sandbox.check(lambda: read_everything(sandbox.inside))


CLAIMS = (pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little"))


@pytest.mark.parametrize("code", CLAIMS)
def test_an_index_cannot_claim_memory(sandbox, written, code):
    fill(sandbox.inside, written, **{INDEX: pickle.PROTO + b"\x05N" + code + pickle.STOP})
    assert sandbox.check(lambda: StoredTensors(sandbox.inside, KEY)) is None


def test_an_index_cannot_claim_a_tensor_of_any_size(sandbox, written, whole):
    index = copy.deepcopy(whole)
    index.state_dict_metadata["plain"].size = torch.Size([10**12])
    fill(sandbox.inside, written, **{INDEX: pickle.dumps(index)})
    assert sandbox.check(lambda: read_everything(sandbox.inside)) is None


@fuzzed("checkpoint data")
@given(data=st.data())
def test_no_data_gets_through(sandbox, written, data):
    fill(sandbox.inside, written, **{DATA: data.draw(spoilt(written[DATA]))})
    sandbox.check(lambda: read_everything(sandbox.inside))


def test_data_do_not_lie_behind_a_link(sandbox, written):
    fill(sandbox.inside, written)
    (sandbox.inside / DATA).replace(sandbox.beside / "secret.distcp")
    (sandbox.inside / DATA).symlink_to(sandbox.beside / "secret.distcp")
    assert sandbox.check(lambda: StoredTensors(sandbox.inside, KEY)) is None
