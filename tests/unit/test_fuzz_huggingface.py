"""Folders from Hugging Face whose configuration, index and safetensors may hold anything."""

import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import HuggingFaceCheckpoint, read_config, recognise
from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq
from megatron_cca.models.emu3.weights import Emu3HuggingFace
from megatron_cca.models.weight_files import CONFIG, INDEX, SINGLE
from megatron_cca.models.weights_folder import SafetensorsFolder
from tests.references.fuzzing import NAMES, NUMBERS, changed, fuzzed, names, plain, spoilt

OPTION = "--hf"


def fill(folder, files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def safetensors(header, data=bytes(64)):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [20], "data_offsets": [24, 64]},
}
SIZES = st.sampled_from([*NUMBERS, *NAMES[:4], "F8_E4M3", [], [10**12, 10**12], [2**63, 2], [0, 10**12], [[1]]])
FORGED = changed(HEADER, SIZES | plain).map(safetensors)


def read_everything(folder):
    files = SafetensorsFolder(folder, OPTION)
    for name in files.tensors:
        for piece in files.pieces(name):
            piece.sum()


def test_whole_tensors_are_read(sandbox):
    fill(sandbox.inside, {SINGLE: safetensors(HEADER)})
    read_everything(sandbox.inside)


@fuzzed("safetensors file")
@given(spoilt(safetensors(HEADER)) | FORGED)
@example((2**63).to_bytes(8, "little") + b"{}")
@example((10**12).to_bytes(8, "little") + b"{}")
@example(safetensors({"a\nb": HEADER["a"], "b": HEADER["b"]}))
@example(safetensors({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, b""))
@example(safetensors({"a": {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}}, b""))
def test_no_safetensors_get_through(sandbox, content):
    fill(sandbox.inside, {SINGLE: content})
    sandbox.check(lambda: read_everything(sandbox.inside))


PARTS = {
    "one.safetensors": safetensors({"a": HEADER["a"]}, bytes(24)),
    "two.safetensors": safetensors({"b": HEADER["b"] | {"data_offsets": [0, 40]}}, bytes(40)),
}
PLACES = {"metadata": {"total_size": 64}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
POINTING = names.map(lambda name: PLACES | {"weight_map": PLACES["weight_map"] | {"b": name}})


@fuzzed("safetensors index")
@given(spoilt(json.dumps(PLACES).encode()) | (changed(PLACES) | POINTING).map(json.dumps).map(str.encode))
@example(json.dumps(PLACES | {"weight_map": {"a": "../beside/secret.safetensors"}}).encode())
def test_no_index_gets_through(sandbox, content):
    fill(sandbox.inside, PARTS | {INDEX: content})
    sandbox.check(lambda: read_everything(sandbox.inside))


@pytest.fixture(scope="module")
def folders(hub):
    """The files of a decoder alone and of one with its image tokenizer."""
    forms = ("original repository", "Emu3ForCausalLM", "transformers")
    return [{path.name: path.read_bytes() for path in hub(form).iterdir() if path.is_file()} for form in forms]


@fuzzed("huggingface config")
@given(data=st.data())
def test_no_config_gets_through(sandbox, folders, data):
    files = data.draw(st.sampled_from(folders))
    content = data.draw(spoilt(files[CONFIG]) | changed(json.loads(files[CONFIG])).map(json.dumps).map(str.encode))
    fill(sandbox.inside, files | {CONFIG: content})
    sandbox.check(lambda: sizes_of(sandbox.inside))
    sandbox.check(lambda: HuggingFaceCheckpoint(sandbox.inside, OPTION))


def sizes_of(folder):
    config = read_config(folder, OPTION)
    return resolve_architecture(recognise(config, folder, OPTION).read_model_config(config))


def deep(depth):
    return {"model_type": "emu3", "text_config": {}, "vq_config": {"num_res_blocks": depth, "channel_multiplier": [1]}}


@pytest.mark.parametrize("config", [deep(10**9), deep(10**4), {"vq_config": 3}, {"vq_config": {"base_channels": "a"}}])
def test_an_image_tokenizer_of_any_depth_is_refused(sandbox, config):
    assert sandbox.check(lambda: Emu3HuggingFace().companion_shapes(deep(3) | config, {})) is None


@pytest.fixture(scope="module")
def vq(vq_folder):
    """The files of a small image tokenizer."""
    return {path.name: path.read_bytes() for path in vq_folder.iterdir()}


@fuzzed("image tokenizer config")
@given(data=st.data())
def test_no_image_tokenizer_gets_through(sandbox, vq, data):
    name = data.draw(st.sampled_from(sorted(name for name in vq if name.endswith(".json"))))
    content = data.draw(spoilt(vq[name]) | changed(json.loads(vq[name])).map(json.dumps).map(str.encode))
    fill(sandbox.inside, vq | {name: content})
    sandbox.check(lambda: open_emu3_vq(sandbox.inside))
