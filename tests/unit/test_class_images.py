"""Class folders of pictures become shards for a model of classes: label, crop to its one grid, mirror images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.digits import ensure_digit_shards, load_scans
from megatron_cca.data.resizing import centre, covering_size
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.sources import open_source
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.models.llamagen import class_vocabulary

TINY = class_vocabulary(codebook_size=128, num_classes=10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return ensure_digit_shards(TINY, tmp_path_factory.mktemp("data") / "digits_classes")


def test_the_digits_as_classes_are_the_digits(shards, digit_shards):
    ours, theirs = TokenShards(shards, TINY), TokenShards(digit_shards, tiny_vocabulary())
    train, _ = load_scans()
    assert len(ours) == len(theirs) == len(train.labels) == 1437
    assert (ours.table["condition"] == theirs.table["condition"]).all()
    for index in range(0, 1437, 50):
        assert np.array_equal(ours.codes(index), theirs.codes(index))
        assert ours.caption(index).tolist() == [train.labels[index]]
    assert not (shards / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Scans in folders that sort as "10" < "2" < "z", each with a border that a crop takes away."""
    root, train = tmp_path_factory.mktemp("pictures"), load_scans()[0]
    kept = {}
    for place, (folder, border) in enumerate({"2": (0, 0), "10": (0, 4), "z": (4, 0)}.items()):
        (root / folder).mkdir()
        for index in range(3):
            scan = train.images[10 * place + index]
            padded = np.pad(scan, [(border[0] // 2, border[0] // 2), (border[1] // 2, border[1] // 2)])
            Image.fromarray(np.repeat(padded[..., None], 3, 2)).save(root / folder / f"{index}.png")
            kept[f"{folder}/{index}.png"] = scan
    (root / "empty").mkdir()
    return root, kept


def run(pictures, shards, output, **changes):
    settings = {"source": pictures, "output": output, "model": "llamagen-tiny", "image_tokenizer": shards, **changes}
    return tokenize(TokenizeSettings(**settings), 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("flips", [False, True])
def test_pictures_are_cropped_labelled_and_mirrored(pictures, shards, flips, tmp_path):
    root, kept = pictures
    assert run(root, shards, tmp_path / "made", flips=flips).samples == 9
    made, codebook = TokenShards(tmp_path / "made", TINY), PatchCodebook.load(shards)
    source = open_source(root, "classes")
    assert made.variants.tolist() == [1 + flips] * 9
    for index in range(9):
        label, number = divmod(index, 3)
        name = f"{('10', '2', 'z')[label]}/{number}.png"
        assert (source[index].name, source[index].label) == (name, label)
        assert made.caption(index).tolist() == [label]
        wanted = [kept[name], kept[name][:, ::-1]][: 1 + flips]
        for variant, scan in enumerate(wanted):
            assert np.array_equal(made.codes(index, variant)[0], codebook.encode(scan[None])[0])
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    assert (manifest["grid"], manifest.get("flips")) == ([4, 4], flips or None)
    # A model of ten classes; a folder that is missing shifts the labels of those behind it.
    assert manifest["source"]["notices"][0] == (
        "folders of 3 classes, while the model has 10: they are taken for its first 3, in the order of their names"
    )


@pytest.mark.parametrize("flips", [False, True])
def test_random_crops_become_variants(shards, flips, tmp_path):
    """Of pictures of 9 x 9, of which a crop of 8 x 8 can be four: the four at random, the same in every run."""
    scans = [np.pad(scan, [(0, 1), (0, 1)], mode="edge") for scan in load_scans()[0].images[:6]]
    for place, scan in enumerate(scans):
        (tmp_path / "pictures" / str(place % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(scan[..., None], 3, 2)).save(tmp_path / f"pictures/{place % 3}/{place}.png")
    for output in ("made", "again"):
        run(tmp_path / "pictures", shards, tmp_path / output, flips=flips, crops=5, resize="authors")
    made, again = (TokenShards(tmp_path / output, TINY) for output in ("made", "again"))
    codebook, chosen = PatchCodebook.load(shards), set()
    assert made.variants.tolist() == [5 * (1 + flips)] * 6
    for index, place in enumerate((0, 3, 1, 4, 2, 5)):
        windows = {(top, left): scans[place][top : top + 8, left : left + 8] for top in (0, 1) for left in (0, 1)}
        codes = {where: codebook.encode(window[None])[0].tolist() for where, window in windows.items()}
        mirrored = {where: codebook.encode(window[None, :, ::-1])[0].tolist() for where, window in windows.items()}
        for variant in range(5 * (1 + flips)):
            found, of = made.codes(index, variant)[0].tolist(), mirrored if variant >= 5 else codes
            assert found in of.values()
            assert found == again.codes(index, variant)[0].tolist()
            chosen |= {where for where, wanted in of.items() if wanted == found}
    assert len(chosen) == 4
    assert json.loads((tmp_path / "made/manifest.json").read_text())["crops"] == 5


def test_crops_are_for_models_of_one_size(digit_shards, tmp_path, pictures):
    with pytest.raises(UserError, match="--crops: model emu3-tiny takes images of any size, as they are; leave it out"):
        run(pictures[0], digit_shards, tmp_path / "made", model="emu3-tiny", crops=2, text_tokenizer=digit_shards)


def test_sources_without_classes_are_refused(pictures, shards, tmp_path):
    (tmp_path / "flat").mkdir()
    picture = next(pictures[0].rglob("*.png")).read_bytes()
    (tmp_path / "flat/a.png").write_bytes(picture)
    (tmp_path / "flat/a.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"a\.png has no class, and the model takes nothing else"):
        run(tmp_path / "flat", shards, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("size", "crop", "wanted"),
    [
        ((500, 375), (384, 384), (512, 384)),
        ((375, 500), (384, 384), (384, 512)),
        ((384, 384), (384, 384), (384, 384)),
        ((3, 1000), (8, 8), (8, 2667)),
        ((1001, 1000), (256, 256), (256, 256)),
    ],
)
def test_the_covering_size(size, crop, wanted):
    assert covering_size(*size, *crop) == wanted


def test_the_centre():
    pixels = torch.arange(5 * 6 * 3).view(5, 6, 3)
    assert torch.equal(centre(pixels, 3, 2), pixels[1:4, 2:4])
