"""Token shards, reference caches and codebooks that may hold anything."""

import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cca.data.codebooks import CODEBOOK_FILE as CODEBOOK
from megatron_cca.data.manifest import FILE_NAME, TABLE, TOKEN_FILES, VARIANTS, read_manifest
from megatron_cca.data.reference_cache import ReferenceCache, ReferenceCacheWriter
from megatron_cca.data.shard_writing import Sample, write_manifest
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError
from tests.references import token_shards
from tests.references.fuzzing import changed, fuzzed, names, plain, spoilt


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a small shard folder by name; one of its samples has variants."""
    samples = [*token_shards.random_samples(4), Sample(np.arange(12).reshape(3, 1, 2, 2), np.arange(3))]
    folder = token_shards.write(tmp_path_factory.mktemp("written") / "shards", samples)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill(folder, files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_everything(folder):
    shards = TokenShards(folder, token_shards.VOCABULARY)
    for sample in range(len(shards)):
        shards.caption(sample)
        for variant in range(min(int(shards.variants[sample]), 100)):
            shards.meta_ids(tuple(shards.codes(sample, variant).shape))


def test_whole_shards_are_read(sandbox, written):
    fill(sandbox.inside, written)
    read_everything(sandbox.inside)


@fuzzed("shard manifest")
@given(data=st.data())
def test_no_manifest_gets_through(sandbox, written, data):
    manifest = json.loads(written[FILE_NAME])
    listed = st.dictionaries(names, st.fixed_dictionaries({"bytes": plain, "sha256": plain}), max_size=2)
    forged = changed(manifest) | listed.map(lambda files: manifest | {"files": manifest["files"] | files})
    content = data.draw(spoilt(written[FILE_NAME]) | forged.map(json.dumps).map(str.encode))
    fill(sandbox.inside, written | {FILE_NAME: content})
    sandbox.check(lambda: read_everything(sandbox.inside))


@pytest.mark.parametrize("number", [-1, True, 2**63, 10**30])
def test_a_number_of_samples_is_one(sandbox, written, number):
    manifest = json.loads(written[FILE_NAME]) | {"num_samples": number}
    fill(sandbox.inside, written | {FILE_NAME: json.dumps(manifest).encode()})
    assert sandbox.check(lambda: read_manifest(sandbox.inside)) is None


@pytest.mark.parametrize("name", ["variants." + "n" * 300, "ä" * 130, "\ud800", "a\0b", "a/b", "..", ""])
def test_a_listed_name_is_one_that_a_file_can_have(sandbox, written, name):
    manifest = json.loads(written[FILE_NAME])
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    fill(sandbox.inside, written | {FILE_NAME: json.dumps(manifest).encode()})
    with pytest.raises(UserError, match="is not the name of a file in this folder") as refused:
        read_everything(sandbox.inside)
    assert len(str(refused.value)) < 400 + len(str(sandbox.inside))


# A table whose numbers are forged one by one.
NUMBERS = st.sampled_from([0, -1, 1, 2**31 - 1, -(2**31), 5, 4096]) | st.integers(-(2**31), 2**31 - 1)


@st.composite
def forged_variants(draw, content):
    variants = np.load(io.BytesIO(content)).copy()
    variants[draw(st.integers(0, len(variants) - 1))] = draw(NUMBERS)
    file = io.BytesIO()
    np.save(file, variants)
    return file.getvalue()


@st.composite
def forged_table(draw, content):
    table = np.load(io.BytesIO(content)).copy()
    row, field = draw(st.integers(0, len(table) - 1)), draw(st.sampled_from(table.dtype.names))
    if field == "grid":
        table[row]["grid"] = draw(st.tuples(NUMBERS, NUMBERS, NUMBERS))
    else:
        table[row][field] = draw(NUMBERS) % 2**31
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


@fuzzed("shard files")
@given(data=st.data())
def test_no_shard_file_gets_through(sandbox, written, data):
    """With a manifest that was made for the spoilt file, as a hostile one would be."""
    name = data.draw(st.sampled_from([*TOKEN_FILES, VARIANTS]))
    content = spoilt(written[name])
    if name == TABLE:
        content |= forged_table(written[TABLE])
    if name == VARIANTS:
        content |= forged_variants(written[VARIANTS])
    fill(sandbox.inside, written | {name: data.draw(content)})
    contents = read_manifest(sandbox.inside)
    write_manifest(sandbox.inside, {key: contents[key] for key in ("num_samples", "vocabulary", "meta_words")})
    sandbox.check(lambda: read_everything(sandbox.inside))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The files of a small reference cache by name."""
    folder = tmp_path_factory.mktemp("cache")
    ReferenceCacheWriter(folder, {"weights": "abc"}, {"micro": 2}).write("training", 0, np.zeros((3, 4, 2), np.float32))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_cache(folder):
    cache = ReferenceCache(folder)
    cache.check({"weights": "abc"})
    cache.check_steps("training", 0, 3)
    for step in range(3):
        cache.read("training", step)
    cache.read("training", 3)


@fuzzed("reference cache manifest")
@given(data=st.data())
def test_no_cache_manifest_gets_through(sandbox, cached, data):
    manifest = cached["cache.json"]
    content = data.draw(spoilt(manifest) | changed(json.loads(manifest)).map(json.dumps).map(str.encode))
    fill(sandbox.inside, cached | {"cache.json": content})
    sandbox.check(lambda: read_cache(sandbox.inside))


BLOCKS = ["training_000000000_000000002.npz", "training_x_y.npz", "training_1.npz", "training_0_999999999999.npz"]


@fuzzed("reference cache block")
@given(data=st.data())
def test_no_cache_block_gets_through(sandbox, cached, data):
    block = data.draw(spoilt(cached[BLOCKS[0]]) | st.just(cached[BLOCKS[0]]) | npz)
    fill(sandbox.inside, {"cache.json": cached["cache.json"], data.draw(st.sampled_from(BLOCKS)): block})
    sandbox.check(lambda: read_cache(sandbox.inside))


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(array):
    file = io.BytesIO()
    np.savez(file, logps=array)
    return file.getvalue()


DTYPES = st.sampled_from(["f4", "f8", "u1", "i8", "c8", "S3", "U2", "?", "M8[s]", "f2", ">f4", "f4,i4"])
ARRAYS = st.builds(np.zeros, st.lists(st.integers(0, 4), max_size=4), DTYPES)
npz = ARRAYS.map(zipped)


def claiming(shape, dtype="<f4"):
    """An .npy of a few bytes that claims any shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header


@fuzzed("patch codebook")
@given(spoilt(saved(np.ones((4, 2, 2), np.float32))) | ARRAYS.map(saved))
@example(claiming("(1000000000000, 2, 2)"))
@example(claiming("(-1, 2, 2)"))
@example(claiming("(1, 2, 2)", "|O"))
@example(saved(np.full((1, 2, 2), np.nan, np.float32)))
def test_no_codebook_gets_through(sandbox, content):
    fill(sandbox.inside, {CODEBOOK: content})
    sandbox.check(lambda: open_image_tokenizer(sandbox.inside))
