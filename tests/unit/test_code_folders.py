"""LlamaGen's own code folders: what lies there comes through, and what is not as it should be is said in one line."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_cca.data.shards import TokenShards
from megatron_cca.data.sources import Unreadable, open_source
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.models.llamagen import IMAGENET_VOCABULARY, class_vocabulary
from tests.references.code_folders import npy, random_codes, write_codes
from tests.references.sources import notices, write_all

TINY = class_vocabulary(codebook_size=128, num_classes=10)
CODES = random_codes(5, 3)
LABELS = [3, 0, 9, 3, 1]


def records(path, layout="auto"):
    source = open_source(path, layout)
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("variants", [1, 2, 10])
def test_codes_and_labels_come_through(variants, tmp_path):
    codes = random_codes(12, variants)
    found = records(write_codes(tmp_path, codes, range(12)))
    assert [record.label for record in found] == list(range(12))
    assert [record.name for record in found] == [f"imagenet384_codes/{index}.npy" for index in range(12)]
    for record, image in zip(found, codes, strict=True):
        assert np.array_equal(record.codes, image[:, None]) and record.codes.dtype == np.int64
        assert (record.caption, record.condition, record.frames) == (None, None, ())


def test_plain_codes_have_one_variant(tmp_path):
    npy(tmp_path / "flowers_codes", 0, CODES[0, :1].reshape(1, -1).astype(np.int32))
    npy(tmp_path / "flowers_labels", 0, np.array(4))
    (record,) = records(tmp_path)
    assert (record.codes.shape, record.label) == ((1, 1, 4, 4), 4)


def test_a_second_extraction_adds_its_variants(tmp_path):
    second = random_codes(5, 3, seed=1)
    write_codes(tmp_path / "c2i_ten_crop", CODES, LABELS)
    write_codes(tmp_path / "c2i_ten_crop_105", second, LABELS)
    (tmp_path / "notes.txt").write_text("mine")
    for index, record in enumerate(records(tmp_path)):
        assert np.array_equal(record.codes[:, 0], np.concatenate([CODES[index], second[index]]))
    npy(tmp_path / "c2i_ten_crop_105/imagenet384_labels", 2, [8])
    with pytest.raises(Unreadable, match="its label is 9 in one extraction and 8 in the other"):
        records(tmp_path)


def test_the_fingerprint_changes_with_codes_labels_and_number(tmp_path):
    prints = {open_source(write_codes(tmp_path / "a", CODES, LABELS)).fingerprint() for _ in range(2)}
    prints.add(open_source(write_codes(tmp_path / "b", CODES, LABELS[::-1])).fingerprint())
    prints.add(open_source(write_codes(tmp_path / "c", random_codes(5, 3, seed=2), LABELS)).fingerprint())
    prints.add(open_source(write_codes(tmp_path / "d", CODES[:4], LABELS[:4])).fingerprint())
    assert len(prints) == 4


def refused(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    root = write_codes(tmp_path / "x", CODES, LABELS)
    (root / "imagenet384_labels/4.npy").unlink()
    found = refused(lambda: open_source(root))
    assert "codes and labels are not of as many images: imagenet384_codes 5, imagenet384_labels 4" in found
    (root / "imagenet384_codes/2.npy").unlink()
    assert "imagenet384_codes: 2.npy is missing, but there is 4.npy" in refused(lambda: open_source(root))
    shutil.rmtree(root / "imagenet384_codes")
    (root / "imagenet384_codes").mkdir()
    assert "holds no 0.npy" in refused(lambda: open_source(root))
    (root / "imagenet384_codes").rmdir()
    assert "holds no NAME_codes beside NAME_labels" in refused(lambda: open_source(root, "llamagen"))


def test_several_extractions_are_refused(tmp_path):
    write_codes(tmp_path, CODES, LABELS)
    write_codes(tmp_path, CODES, LABELS, "imagenet256")
    assert "holds several extractions (imagenet256_codes, imagenet384_codes)" in refused(lambda: open_source(tmp_path))


@pytest.mark.parametrize(
    ("codes", "label", "message"),
    [
        (np.zeros((1, 2, 15), int), [0], r"the shape \[1, 2, 15\], not \[1, variants, codes of a square image\]"),
        (np.zeros((2, 2, 16), int), [0], r"the shape \[2, 2, 16\]"),
        (np.zeros((1, 0, 16), int), [0], r"the shape \[1, 0, 16\]"),
        (np.zeros(16, int), [0], r"the shape \[16\]"),
        (np.full((1, 1, 16), -1), [0], "codes that are negative or too large"),
        (np.zeros((1, 1, 16)), [0], "holds float64 numbers, not whole ones"),
        (np.zeros((1, 1, 16), int), [0, 1], r"holds \[2\] numbers, not one label of 0 or more"),
        (np.zeros((1, 1, 16), int), [-1], "not one label of 0 or more"),
        (np.zeros((1, 1, 16), int), ["a"], "numbers, not whole ones"),
    ],
)
def test_files_that_hold_something_else_are_unreadable(codes, label, message, tmp_path):
    npy(tmp_path / "x_codes", 0, codes)
    npy(tmp_path / "x_labels", 0, label)
    with pytest.raises(Unreadable, match=message):
        records(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    write_codes(tmp_path, CODES[:1], [0])
    np.save(tmp_path / "imagenet384_codes/0.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(Unreadable, match="it holds objects, or is not as long as it says"):
        records(tmp_path)


def job(source, output, **changes):
    settings = TokenizeSettings(**{"source": source, "output": output, "model": "llamagen-tiny", **changes})
    return tokenize(settings, 0, 1, torch.device("cpu"))


def test_shards_hold_every_variant_and_the_class(tmp_path):
    codes = random_codes(40, 10)
    labels = np.random.default_rng(1).integers(10, size=40)
    result = job(write_codes(tmp_path / "x", codes, labels), tmp_path / "shards", block=16)
    assert (result.samples, result.skipped) == (40, 0)
    shards = TokenShards(tmp_path / "shards", TINY)
    assert shards.variants.tolist() == [10] * 40
    for index in range(40):
        assert shards.caption(index).tolist() == [labels[index]]
        for variant in range(10):
            assert np.array_equal(shards.codes(index, variant)[0], codes[index, variant])
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["meta_words"] == {"1x4x4": []}
    assert (manifest["text_tokenizer"], manifest["image_tokenizer"], manifest["grid"]) == (None, None, [4, 4])


def test_real_sizes(tmp_path):
    for side, options in ((24, {}), (16, {"grid": (16, 16)})):
        codes = random_codes(2, 2, side=side, codebook=16_384)
        root = write_codes(tmp_path / str(side), codes, [0, 999], f"imagenet{16 * side}")
        job(root, tmp_path / f"shards{side}", model="llamagen-l", **options)
        shards = TokenShards(tmp_path / f"shards{side}", IMAGENET_VOCABULARY)
        assert np.array_equal(shards.codes(1, 1)[0], codes[1, 1]) and shards.caption(1).tolist() == [999]


@pytest.mark.parametrize(
    ("side", "codebook", "label", "changes", "message"),
    [
        (
            16,
            16_384,
            0,
            {},
            "has 16 x 16 codes (256 x 256 pixels), the model takes 24 x 24 codes (384 x 384 pixels); give codes "
            "of that size, or, for a model of these, --grid 16 16",
        ),
        (24, 16_384, 0, {"grid": (16, 16)}, "has 24 x 24 codes (384 x 384 pixels), the model takes 16 x 16 codes"),
        (24, 16_384, 0, {"grid": (16, 24)}, "--grid: model llamagen-l takes square images alone, found 16 24"),
        (24, 16_384, 0, {"flips": True}, "--flips: imagenet384_codes/0.npy holds codes, which cannot be mirrored"),
        (24, 32_768, 0, {}, "has codes of another codebook: "),
        (24, 16_384, 1000, {}, "imagenet384_codes/1.npy has the label 1000, the model takes 0 to 999"),
        (24, 16_384, 0, {"text_tokenizer": True}, "--text-tokenizer: model llamagen-l takes classes, not texts"),
        (24, 16_384, 0, {"model": "emu3-8b"}, "--text-tokenizer: is missing; model emu3-8b takes texts"),
    ],
)
def test_what_is_another_models_ends_the_job(side, codebook, label, changes, message, tmp_path):
    codes = random_codes(2, 2, side=side, codebook=codebook)
    root = write_codes(tmp_path / "x", codes, [0, label])
    changes = {"model": "llamagen-l", **changes}
    if "text_tokenizer" in changes:
        changes["text_tokenizer"] = tmp_path
    found = refused(lambda: job(root, tmp_path / "shards", **changes))
    assert message in found
    assert not (tmp_path / "shards").exists()


def test_a_grid_is_not_for_models_of_any(digit_shards, tmp_path):
    root = write_codes(tmp_path / "x", CODES, LABELS)
    changes = {"model": "emu3-tiny", "text_tokenizer": digit_shards, "grid": (4, 4)}
    assert "--grid: model emu3-tiny takes any" in refused(lambda: job(root, tmp_path / "shards", **changes))


def test_a_file_that_claims_more_than_it_holds_takes_no_memory(tmp_path):
    write_codes(tmp_path, CODES[:1], [0])
    path = tmp_path / "imagenet384_codes/0.npy"
    forged = path.read_bytes().replace(b"(1, 3, 16)", b"(1,999999)")
    assert forged != path.read_bytes()
    path.write_bytes(forged)
    with pytest.raises(Unreadable, match="not as long as it says"):
        records(tmp_path)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    write_codes(tmp_path / "away", CODES, LABELS)
    (tmp_path / "here").mkdir()
    for name in ("imagenet384_codes", "imagenet384_labels"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "away" / name)
    assert "leaves the folder by a symbolic link" in refused(lambda: open_source(tmp_path / "here", "llamagen"))


def test_llamagens_other_files_are_counted(tmp_path):
    write_all(tmp_path, {f"a_{kind}/0.npy": b"x" for kind in ("codes", "labels")})
    write_all(tmp_path, {"b_codes/0.npy": b"x", "a_codes/00.npy": b"x"})
    assert notices(tmp_path) == [
        "b_codes has no partner (_codes and _labels) and is not read",
        "not read: 1 .npy (a_codes/00.npy)",
    ]
