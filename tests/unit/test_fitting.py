"""A codebook that is fitted to the source itself, and a tiny model that takes its sizes from the data."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.config import Config, DataConfig, ModelConfig
from megatron_cca.config.load import config_from_dict, config_to_dict
from megatron_cca.data import with_sizes_of_data
from megatron_cca.data.codebooks import PatchCodebook, PyramidCodebook, grey_levels
from megatron_cca.data.inspection import decoded_samples, open_for_inspection, report
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_image_tokenizer, open_text_tokenizer
from megatron_cca.data.tokenizing import TokenizeSettings, fitting
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.models import explicit, resolve_architecture
from tests.distributed.launch import ROOT
from tests.references.idx_files import clothes, write_idx

pytest.importorskip("sklearn")

CPU = torch.device("cpu")
NUMBER = 48


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    """Grey images of 12 x 8 pixels of three classes."""
    return write_idx(tmp_path_factory.mktemp("idx"), *clothes(NUMBER, 12, 8), packed=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Coloured images of 12 x 12 pixels in folders of two classes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for place in range(20):
        (folder / f"kind{place % 2}").mkdir(exist_ok=True)
        pixels = random.integers(256, size=(12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"kind{place % 2}" / f"{place}.png")
    return folder


def settings_of(source, output, **changes):
    given = {"model": "llamagen-tiny", "fit_codebook": 16, "patch": 4, "resize": "authors", "block": 13}
    return TokenizeSettings(source=source, output=output, **{**given, **changes})


def run(source, output, rank=0, world_size=1, **changes):
    return tokenize(settings_of(source, output, **changes), rank, world_size, CPU)


def refusal(*arguments, **changes):
    with pytest.raises(UserError) as error:
        run(*arguments, **changes)
    assert str(error.value).isprintable()
    return str(error.value)


def config_for(folder, **model):
    return Config(model=ModelConfig(**{"name": "llamagen-tiny", **model}), data=DataConfig(path=str(folder)))


def test_a_grey_source_gets_grey_patches_and_a_model_of_its_sizes(idx_folder, tmp_path, capsys):
    """The shorter side of 8 pixels is two patches of 4: the middle 8 x 8 of each image, 2 x 2 codes."""
    output = tmp_path / "shards"
    assert run(idx_folder, output).samples == NUMBER
    assert f"fitted 16 grey patches of 4 x 4 pixels to {NUMBER} images" in capsys.readouterr().out
    codebook, manifest = PatchCodebook.load(output), read_manifest(output)
    assert codebook.centres.shape == (16, 4, 4)
    assert manifest["fitted"] == {"codes": 16, "patch": 4, "images": NUMBER, "seed": 0}
    assert manifest["model"] == {"name": "llamagen-tiny", "codebook_size": 16, "num_classes": 3}
    assert manifest["image_tokenizer"]["fingerprint"] == open_image_tokenizer(output).fingerprint()
    assert manifest["image_tokenizer"]["folder"] == str(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]

    config = with_sizes_of_data(config_for(output))
    assert (config.model.codebook_size, config.model.num_classes, config.model.max_position_embeddings) == (16, 3, 5)
    sizes = "model.codebook_size 16, model.num_classes 3, model.max_position_embeddings 5"
    said = f"{sizes}: taken from {output}, since the configuration leaves them out\n"
    assert capsys.readouterr().out == said
    shards = TokenShards(output, resolve_architecture(config.model).vocabulary)
    images, labels = clothes(NUMBER, 12, 8)
    for index in range(NUMBER):
        assert np.array_equal(shards.codes(index)[0], codebook.encode(images[index : index + 1, 2:10])[0])
        assert shards.caption(index).tolist() == [labels[index]]
    error = np.abs(codebook.decode(codebook.encode(images[:, 2:10])).astype(float) - images[:, 2:10]).mean()
    assert error < 20


def test_inspection_knows_the_sizes(idx_folder, tmp_path):
    run(idx_folder, tmp_path / "shards")
    shards = open_for_inspection(tmp_path / "shards")
    assert "2 x 2" in report(shards)
    pictures, captions = decoded_samples(shards, 4, 0, None, CPU)
    assert pictures[0].shape == (8, 8, 3)
    assert set(captions) <= {"class 0", "class 1", "class 2"}


def test_coloured_pictures_get_coloured_patches(pictures, tmp_path):
    run(pictures, tmp_path / "shards")
    assert PatchCodebook.load(tmp_path / "shards").centres.shape == (16, 4, 4, 3)
    model = with_sizes_of_data(config_for(tmp_path / "shards")).model
    assert (model.num_classes, model.max_position_embeddings) == (2, 10)


def test_any_number_of_processes_and_an_interruption_make_the_same(idx_folder, tmp_path, monkeypatch):
    run(idx_folder, tmp_path / "whole")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda rank: run(idx_folder, tmp_path / "three", rank, 3), range(3)))
    assert (results[0].samples, results[1:]) == (NUMBER, [None, None])

    def no_merge(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_cca.data.tokenizing.job._merge", no_merge)
        run(idx_folder, tmp_path / "again")
    with monkeypatch.context() as patch:
        # What was fitted is kept with the parts.
        patch.setattr(fitting, "_fit", None)
        run(idx_folder, tmp_path / "again")
    for name in ("codes.bin", "captions.bin", "samples.npy", "codebook.npy"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("whole", "three", "again")}) == 1


def test_a_failure_leaves_nothing_behind(idx_folder, tmp_path):
    assert refusal(idx_folder, tmp_path / "shards", fit_codebook=200) == (
        "--fit-codebook: 200 codes, but the images have only 192 different patches of 4 x 4 pixels; give at most so "
        "many"
    )
    assert not list(tmp_path.iterdir())


def test_a_model_of_texts_gets_a_text_tokenizer_of_its_captions(idx_folder, tmp_path, capsys):
    output = tmp_path / "shards"
    run(idx_folder, output, model="emu3-tiny")
    text = open_text_tokenizer(output)
    config = with_sizes_of_data(config_for(output, name="emu3-tiny"))
    assert (config.model.codebook_size, config.model.vocab_size) == (16, None)
    # The longest row fits the preset's positions, which stay.
    assert config.model.max_position_embeddings is None
    architecture = resolve_architecture(config.model)
    assert (architecture.vocabulary.text_size, architecture.vocabulary.codebook_size) == (320, 16)
    shards = TokenShards(output, architecture.vocabulary)
    assert [text.decode(shards.caption(index).tolist()) for index in range(4)] == ["0", "1", "2", "0"]
    # Images keep their aspect ratio: the area is the first image's.
    assert shards.table["grid"].tolist() == [[1, 3, 2]] * NUMBER
    saved = config_from_dict(config_to_dict(explicit(config)))
    assert resolve_architecture(saved.model) == architecture


def test_long_rows_raise_the_positions(pictures, tmp_path):
    output = tmp_path / "shards"
    run(pictures, output, model="emu3-tiny", patch=1, fit_codebook=32)
    config = with_sizes_of_data(
        replace(config_for(output, name="emu3-tiny"), data=DataConfig(str(output), pad_to_multiple_of=64))
    )
    architecture = resolve_architecture(config.model)
    shards = TokenShards(output, architecture.vocabulary)
    longest = max(len(shards.caption(index)) for index in range(20)) + len("12*12") + 3 + 12 * 13 + 3
    assert architecture.max_position_embeddings == -(-longest // 64) * 64 == 192


def test_a_pyramid_is_fitted_for_a_model_of_scales(pictures, tmp_path):
    """Three colours of one pixel are not the four levels that a patch of var-tiny has."""
    message = "--patch: 1 pixels, while a patch of model var-tiny has 4 levels, grey or of three colours"
    assert refusal(pictures, tmp_path / "no", model="var-tiny", patch=1) == message
    run(pictures, tmp_path / "shards", model="var-tiny", patch=2)
    codebook = PyramidCodebook.load(tmp_path / "shards")
    assert (codebook.centres.shape, codebook.scales) == ((16, 2, 2), (1, 2, 4))
    model = with_sizes_of_data(config_for(tmp_path / "shards", name="var-tiny")).model
    assert (model.codebook_size, model.num_classes, model.max_position_embeddings) == (16, 2, None)


def test_a_grid_may_be_chosen(pictures, tmp_path):
    run(pictures, tmp_path / "shards", patch=5, grid=(2, 2))
    assert json.loads((tmp_path / "shards/manifest.json").read_text())["grid"] == [2, 2]
    assert with_sizes_of_data(config_for(tmp_path / "shards")).model.max_position_embeddings == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": None}, "--patch: missing; give the side of a patch in pixels, such as 4"),
        ({"fit_codebook": None}, "--patch: of no use without --fit-codebook; leave it out"),
        ({"image_tokenizer": "x"}, "--fit-codebook: of no use beside --image-tokenizer; leave one of them out"),
        (
            {"patch": 5},
            "--patch: 5 does not divide the 12 pixels of the first image's shorter side; possible: 1, 2, 3,",
        ),
        ({"model": "llamagen-b"}, "--fit-codebook: 16 codes, model llamagen-b has 16384; give that number"),
        ({"model": "emu3-8b"}, "--fit-codebook: 16 codes, model emu3-8b has 32768; give that number"),
        (
            {"sizes": ModelConfig("llamagen-tiny", codebook_size=8)},
            "--fit-codebook: 16 codes, model llamagen-tiny has 8",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(pictures, changes, message, tmp_path):
    assert refusal(pictures, tmp_path / "shards", **changes).startswith(message)


def test_a_grid_too_large_for_a_tiny_model_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_LARGEST_SIDE", 3)
    assert refusal(pictures, tmp_path / "shards", patch=2).startswith("--patch: 2 makes 6 x 6 codes of an image of 12")


def test_sizes_of_the_configuration_count_before_those_of_the_data(idx_folder, tmp_path):
    run(idx_folder, tmp_path / "shards")
    config = with_sizes_of_data(config_for(tmp_path / "shards", num_classes=7, max_position_embeddings=10))
    assert (config.model.codebook_size, config.model.num_classes, config.model.max_position_embeddings) == (16, 7, 10)


def test_shards_of_another_preset_or_that_differ_are_refused(idx_folder, tmp_path):
    run(idx_folder, tmp_path / "one")
    run(idx_folder, tmp_path / "two", fit_codebook=8)
    with pytest.raises(UserError, match=r"^data\.path: .*one is for llamagen-tiny, model\.name is var-tiny; set that"):
        with_sizes_of_data(config_for(tmp_path / "one", name="var-tiny"))
    both = replace(config_for("x"), data=DataConfig(path={str(tmp_path / name): 1.0 for name in ("one", "two")}))
    with pytest.raises(UserError, match=r"^data\.path: .*two is for codebook_size 8, .*one for 16; give shards of one"):
        with_sizes_of_data(both)


@pytest.mark.parametrize(
    "entry", [[], {"name": 3}, {"name": "llamagen-tiny", "codebook_size": -1}, {"name": "a", "x": 1}]
)
def test_a_damaged_entry_is_named(entry, idx_folder, tmp_path):
    run(idx_folder, tmp_path / "shards")
    path = tmp_path / "shards/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": entry}))
    with pytest.raises(UserError, match=r"manifest\.json: model must hold a name and sizes; tokenize the data again"):
        with_sizes_of_data(config_for(tmp_path / "shards"))


@pytest.mark.parametrize("path", ["digits", "missing", None])
def test_other_data_leaves_the_configuration_as_it_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(config_for("x"), data=DataConfig(path=path))
    assert with_sizes_of_data(config) is config


def test_a_model_that_is_not_tiny_takes_nothing(idx_folder, tmp_path):
    run(idx_folder, tmp_path / "shards")
    config = config_for(tmp_path / "shards", name="llamagen-b")
    assert with_sizes_of_data(config) is config


def test_grey_levels_are_those_of_the_tokenizer(pictures):
    image = np.asarray(Image.open(next(pictures.rglob("*.png"))))
    assert np.array_equal(grey_levels(image), np.asarray(Image.fromarray(image).convert("L")))


def test_more_images_of_a_data_set_get_the_same_codebook_and_sizes(idx_folder, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run(idx_folder, first)
    images, labels = clothes(NUMBER, 12, 8)
    # Its classes are two of the three.
    other = write_idx(tmp_path / "other", images[labels < 2], labels[labels < 2])
    reused = {"fit_codebook": None, "patch": None}
    run(other, second, image_tokenizer=first, **reused)
    run(other, third, image_tokenizer=second, **reused)
    manifests = [read_manifest(folder) for folder in (first, second, third)]
    for key in ("model", "fitted", "area", "vocabulary"):
        assert manifests[0][key] == manifests[1][key] == manifests[2][key]
    codebook = PatchCodebook.load(first)
    assert np.array_equal(codebook.centres, PatchCodebook.load(third).centres)
    shards = TokenShards(third, resolve_architecture(with_sizes_of_data(config_for(third)).model).vocabulary)
    wanted = codebook.encode(images[labels < 2][:, 2:10])
    assert all(np.array_equal(shards.codes(index)[0], codes) for index, codes in enumerate(wanted))


def test_a_limit_takes_records_at_equal_distances(idx_folder, pictures, tmp_path, capsys):
    run(idx_folder, tmp_path / "all")
    run(idx_folder, tmp_path / "more", limit=NUMBER + 1)
    assert read_manifest(tmp_path / "more")["source"] == read_manifest(tmp_path / "all")["source"]
    run(idx_folder, tmp_path / "some", limit=7)
    assert f"7 of {NUMBER} records are taken (--limit)" in capsys.readouterr().err
    model = with_sizes_of_data(config_for(tmp_path / "some")).model
    shards = TokenShards(tmp_path / "some", resolve_architecture(model).vocabulary)
    _, labels = clothes(NUMBER, 12, 8)
    places = [0, 6, 13, 20, 27, 34, 41]
    assert [int(shards.caption(index)[0]) for index in range(len(shards))] == labels[places].tolist()
    assert model.num_classes == 3
    # Folders of classes are sorted: the first records alone would be of one class.
    run(pictures, tmp_path / "few", limit=2)
    model = with_sizes_of_data(config_for(tmp_path / "few")).model
    shards = TokenShards(tmp_path / "few", resolve_architecture(model).vocabulary)
    assert [int(shards.caption(index)[0]) for index in range(2)] == [0, 1]


def test_sizes_are_read_before_megatron_is_imported(idx_folder, tmp_path):
    """It looks for GPUs when it is imported, which the platform must have decided before."""
    run(idx_folder, tmp_path / "shards")
    (tmp_path / "config.yaml").write_text(f"model: {{name: llamagen-tiny}}\ndata: {{path: {tmp_path / 'shards'}}}\n")
    program = (
        "import sys; from pathlib import Path; from megatron_cca.config.load import load_config; "
        "from megatron_cca.data import with_sizes_of_data; "
        f"with_sizes_of_data(load_config(Path({str(tmp_path / 'config.yaml')!r}), [])); "
        "assert 'megatron.core' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
