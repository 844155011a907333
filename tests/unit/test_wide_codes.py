"""Codes of a codebook that 16 bits cannot number, from the writer to the rows of a step."""

import json

import numpy as np
import pytest
import torch

from megatron_cca.data.manifest import token_types
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.pairing import Pairing, training_order
from megatron_cca.data.shard_writing import Sample, TokenWriter, merge_shards, write_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models.emu3_5 import tiny_vocabulary
from tests.references.token_shards import encode_text

CODES = 131_072
WIDE = tiny_vocabulary(codebook_size=CODES)
IMAGES = [
    np.array([[CODES - 1, 0, 2**16]]),
    np.array([[2**16 - 1, 2**16 + 1], [7, CODES - 2]]),
    np.array([[[[1, CODES - 1]]], [[[CODES - 3, 2]]]]),
]


def samples():
    return [Sample(codes, np.array([place + 1])) for place, codes in enumerate(IMAGES)]


def written(folder, of=WIDE, images=IMAGES):
    write_shards(folder, [Sample(codes, np.array([3])) for codes in images], of, encode_text)
    return folder


def in_parts(folder):
    for name, some in (("one", samples()[:1]), ("none", []), ("rest", samples()[1:])):
        (folder / name).mkdir(parents=True)
        with TokenWriter(folder / name, WIDE) as writer:
            for sample in some:
                writer.add(sample)
    parts = [folder / name for name in ("one", "none", "rest")]
    merge_shards(folder / "joined", parts, WIDE, encode_text, lambda _: None, {}, folder / "aside")
    return folder / "joined"


@pytest.mark.parametrize("write", [lambda folder: written(folder / "whole"), in_parts])
def test_the_largest_code_is_read_back(write, tmp_path):
    shards = TokenShards(write(tmp_path), WIDE)
    for place, codes in enumerate(IMAGES):
        for variant, one in enumerate(codes if codes.ndim == 4 else [codes]):
            found = shards.codes(place, variant)
            assert found.dtype == np.int32
            assert found.reshape(one.shape).tolist() == one.tolist()


def test_a_step_has_their_ids(tmp_path):
    data = TokenData([TokenShards(in_parts(tmp_path), WIDE)])
    pairing = Pairing(training_order(data, 1, 0.0, 0), data.rows, 3, 0.0, seed=1)
    builder = BatchBuilder(data, pairing, True, 3, 8, 128)
    plan = builder.plan(0)
    rows = builder.sequences(plan, 0, 1).reshape(2, 3, -1)
    for place, sample in enumerate(plan.batch.sample_ids.tolist()):
        codes = data.codes(sample, int(plan.batch.variants[place]))
        wanted = WIDE.image(codes.astype(np.int64)).tolist()
        start = int(plan.prompt_lengths[0, place])
        assert rows[0, place, start : start + len(wanted)].tolist() == wanted
    assert rows.max() == WIDE.visual_start + CODES - 1 == WIDE.size - 1


def test_the_width_follows_from_the_codebook():
    assert token_types(2**16)["codes"] == np.uint16
    assert token_types(2**16 + 1)["codes"] == np.int32


def test_folders_of_small_codebooks_are_what_they_were(tmp_path):
    folder = written(tmp_path / "narrow", tiny_vocabulary(codebook_size=2**16), [np.array([[2**16 - 1]])])
    assert (folder / "codes.bin").read_bytes() == b"\xff\xff"


def test_codes_of_another_width_are_refused(tmp_path):
    """As of a folder whose index was exchanged: two codes of 16 bits have as many bytes as one of 32."""
    folder = written(tmp_path / "wide", images=[np.array([[5]])])
    narrow = written(tmp_path / "narrow", tiny_vocabulary(codebook_size=2**16), [np.array([[5, 0]])])
    (folder / "codes.idx").write_bytes((narrow / "codes.idx").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["codes.idx"] = json.loads((narrow / "manifest.json").read_text())["files"]["codes.idx"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"codes.idx does not fit samples.npy or codes.bin"):
        TokenShards(folder, WIDE)


def test_a_code_beyond_the_codebook_is_refused(tmp_path):
    with pytest.raises(UserError, match="sample 0: visual code 131072 does not fit a codebook of 131072"):
        written(tmp_path / "wide", images=[np.array([[CODES]])])


def test_torch_takes_them_as_they_are(tmp_path):
    codes = TokenShards(written(tmp_path / "wide"), WIDE).codes(0)
    assert torch.from_numpy(codes).long().max() == CODES - 1
