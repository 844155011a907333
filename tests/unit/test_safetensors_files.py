"""Safetensors in and out: what the library itself writes and reads, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.errors import UserError, shortened
from megatron_cca.models.weight_files import row_ranges
from megatron_cca.models.weights_folder import SafetensorsFolder

TENSORS = {
    "a": torch.randn(7, 5),
    "b.half": torch.randn(9, 3).bfloat16(),
    "count": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "vector": torch.randn(11),
    "flags": torch.tensor([True, False, True]),
    "wide": torch.randn(3, dtype=torch.float64),
}


def outgoing(tensors, piece_bytes):
    for name, tensor in tensors.items():
        ranges = row_ranges(tensor.shape, tensor.dtype, piece_bytes)
        pieces = [tensor[a:b] for a, b in ranges] if tensor.dim() else [tensor]
        yield OutgoingTensor(name, tuple(tensor.shape), tensor.dtype, pieces)


@pytest.mark.parametrize("piece_bytes", [1, 40, 10**6])
def test_one_file_is_what_the_library_reads(piece_bytes, tmp_path):
    write_safetensors(tmp_path, outgoing(TENSORS, piece_bytes))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_every_tensor_begins_on_a_multiple_of_its_width(tmp_path):
    for extra in ("", "x", "xy", "xyz"):  # whatever the header's length
        write_safetensors(tmp_path, outgoing({f"flags{extra}": TENSORS["flags"], **TENSORS}, 40))
        data = (tmp_path / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        for name, tensor in TENSORS.items():
            assert (begin + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0, name


def test_shards_are_what_the_index_says(tmp_path):
    write_safetensors(tmp_path, outgoing(TENSORS, 40), max_shard_bytes=150)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    folder = SafetensorsFolder(tmp_path, "--hf")
    for name, tensor in TENSORS.items():
        pieces = [piece.reshape(-1) for piece in folder.pieces(name)]
        assert torch.equal(torch.cat(pieces) if pieces else tensor.new_empty(0), tensor.reshape(-1))


def test_rows_are_read_without_the_rest(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path, "--hf")
    assert torch.equal(folder.read("a", 2, 5), TENSORS["a"][2:5])
    assert torch.equal(folder.read("count", 0, 1), TENSORS["count"])
    assert folder.tensors["b.half"].num_bytes == 54


def refused(folder):
    with pytest.raises(UserError) as error:
        SafetensorsFolder(folder, "--hf")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sharded(tmp_path):
    write_safetensors(tmp_path, outgoing(TENSORS, 40), max_shard_bytes=150)
    return tmp_path


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    shard = next(sharded.glob("model-00002*"))
    shard.unlink()
    assert refused(sharded) == f"--hf: {shard} is missing, but model.safetensors.index.json names it"


def test_a_truncated_shard_is_named(sharded):
    shard = next(sharded.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(sharded).startswith(f"--hf: {shard} is truncated or not a safetensors file: ")


def test_a_shard_that_is_only_its_first_bytes_is_named(sharded):
    shard = next(sharded.glob("model-00001*"))
    for size in (0, 5, 20):
        shard.write_bytes(shard.read_bytes()[:size])
        assert refused(sharded).startswith(f"--hf: {shard} is truncated")


def test_a_tensor_that_is_elsewhere_is_named(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": index["weight_map"]["a"]}))
    assert "tensor ghost is not in" in refused(sharded)


def test_a_tensor_in_two_files_is_named(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: TENSORS[name]}, second)
    assert refused(sharded) == f"--hf: tensor {name} is in {first.name} and in {second.name}"


@pytest.mark.parametrize("name", ["../secret.safetensors", "n" * 300])
def test_an_index_cannot_lead_out_of_the_folder(name, sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"a": name}))
    assert f"{shortened(repr(name), 80)}, which is not a file of the same folder" in refused(sharded)


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json is damaged" in refused(sharded)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    assert "has neither model.safetensors nor" in refused(tmp_path)
    assert "(model.pt is a pickle, which is not read; save it as safetensors)" in refused(tmp_path)
