"""Emu3.5's image tokenizer against an independent one in float64, and everything that it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.models.emu3_5.image_tokenizer import open_emu3_5_vq
from tests.references import llamagen_vq
from tests.references.emu3_5_vq import (
    RELEASED,
    TABLE,
    TINY,
    decoded,
    encoded,
    flat_config,
    latents,
    random_ibq,
    save_json,
    save_yaml,
    shapes,
)
from tests.references.emu3_vq import save_original, small_vq
from tests.references.image_tokenizers import pixels, refused

IMAGES = (3, 24, 40, 3)


def codes_of(shape, seed=0):
    return torch.randint(0, TINY["codebook"][0], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def state():
    return random_ibq()


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    return save_json(state, tmp_path_factory.mktemp("vq") / "Emu3.5-VisionTokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_image_tokenizer(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_codes_and_pixels_are_the_references(tokenizer, state):
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "emu3_5-ibq",
        4,
        0,
        60,
    )
    codes = tokenizer.encode(pixels(IMAGES))
    assert (codes.dtype, codes.shape) == (torch.int64, (3, 6, 10))
    assert torch.equal(codes, encoded(state, pixels(IMAGES)))
    assert codes.unique().numel() > 10
    exact = latents(state, pixels(IMAGES))
    assert (tokenizer.latents(pixels(IMAGES)).double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_drawn_images_are_the_references(tokenizer, state):
    """Within 1e-5 of the largest in float; in levels, equal but where a fraction was next to a whole level."""
    codes = codes_of((2, 6, 10))
    exact = decoded(state, codes)
    assert exact.std() > 0.2, "too flat to tell anything"
    assert (tokenizer.decode_floats(codes).double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    levels = ((exact + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    differences = (tokenizer.decode(codes).int() - levels.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 1e-3


def test_the_length_of_a_vector_counts_and_of_equals_the_first(state, tmp_path):
    """Not the distance: a vector far away in the right direction is taken."""
    images, longer = pixels(IMAGES), state[TABLE].clone()
    longer[30:] = longer[:30] * 3
    found = open_image_tokenizer(save_json(state | {TABLE: longer}, tmp_path / "longer")).encode(images)
    assert torch.equal(found, encoded(state | {TABLE: longer}, images))
    assert found.min() >= 30
    twice = longer.clone()
    twice[30:] = twice[:30]
    found = open_image_tokenizer(save_json(state | {TABLE: twice}, tmp_path / "twice")).encode(images)
    assert found.max() < 30


def test_parts_of_the_places_are_compared_alike(tokenizer, monkeypatch):
    codes = tokenizer.encode(pixels(IMAGES))
    monkeypatch.setattr("megatron_cca.models.emu3_5.image_tokenizer._PRODUCTS_AT_ONCE", 7 * TINY["codebook"][0])
    assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)
    assert tokenizer.encode(pixels((0, 8, 4, 3))).shape == (0, 2, 1)


@pytest.mark.full
def test_the_released_sizes(tmp_path):
    state = random_ibq(RELEASED)
    tokenizer = open_emu3_5_vq(save_json(state, tmp_path / "vq", RELEASED))
    assert (tokenizer.spatial_factor, tokenizer.codebook_size) == (16, 131_072)
    images = pixels((1, 32, 32, 3))
    assert torch.equal(tokenizer.encode(images), encoded(state, images))


def test_the_authors_two_forms_are_the_same(state, tokenizer, tmp_path):
    other = save_yaml(state, tmp_path / "yaml")
    assert open_image_tokenizer(other).fingerprint() == tokenizer.fingerprint()
    both = save_json(state, other)
    assert open_image_tokenizer(both).fingerprint() == tokenizer.fingerprint()
    (other / "config.json").unlink()
    (other / "model.safetensors").unlink()
    assert torch.equal(open_image_tokenizer(other).encode(pixels(IMAGES)), tokenizer.encode(pixels(IMAGES)))


def test_the_fingerprint_is_of_the_weights(state, tokenizer, tmp_path):
    changed = state | {TABLE: state[TABLE] + 1e-3}
    assert open_image_tokenizer(save_json(changed, tmp_path / "vq")).fingerprint() != tokenizer.fingerprint()


def test_emu3s_is_told_from_it(copy, tmp_path):
    emu3 = save_original(small_vq(), tmp_path / "emu3")
    assert open_image_tokenizer(emu3).kind == "emu3-vq"
    shutil.copyfile(emu3 / "config.json", copy / "config.json")
    assert "tensor" in refused(copy)
    (emu3 / "config.json").write_text(json.dumps(flat_config()))
    assert "model.safetensors: tensor decoder.mid.attn_1.norm.bias is missing" in refused(emu3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ch_mult": [1, 2, 2]}, "config.json: ch_mult: [1, 2, 2], but the tensors beside it have [1, 1, 2]"),
        ({"codebook_size": 61}, "config.json: codebook_size: 61, but the tensors beside it have 60"),
        ({"double_z": True}, "config.json: double_z: True, but the tensors beside it have False"),
        ({"model_type": "Emu3"}, "model_type 'Emu3' is not an Emu3 image tokenizer's"),
    ],
)
def test_a_configuration_of_another_network_is_refused(values, message, copy):
    (copy / "config.json").write_text(json.dumps(flat_config() | values))
    assert message in refused(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("quant_conv.bias"), "tensor quant_conv.bias is missing"),
        (
            lambda state: state.update({"encoder.down.1.attn.0.q.weight": torch.zeros(32, 32, 1, 1)}),
            "tensor encoder.down.1.attn.0.q.weight is not one of Emu3.5's image tokenizer's",
        ),
        (lambda state: state.update({TABLE: torch.zeros(60, 9)}), "has shape"),
        (lambda state: state.update({TABLE: state[TABLE] / 0}), "holds numbers that are not finite"),
    ],
)
def test_other_tensors_are_refused(change, message, state, tmp_path):
    changed = dict(state)
    change(changed)
    assert message in refused(save_json(changed, tmp_path / "vq"))


def test_missing_and_foreign_files_are_named(state, copy, tmp_path):
    (copy / "model.safetensors").unlink()
    assert "model.safetensors: is missing, which belongs to config.json" in refused(copy)
    other = save_yaml(state, tmp_path / "yaml")
    (other / "config.yaml").write_text("a: 1")
    assert "config.yaml: lacks ddconfig or n_embed" in refused(other)
    (other / "config.yaml").write_text("[")
    assert "not valid YAML" in refused(other)
    save_yaml(state, other)
    (other / "model.ckpt").write_bytes(llamagen_vq.saved({"state_dict": llamagen_vq.random_vq()}))
    assert "is not Emu3.5's image tokenizer" in refused(other)


def test_a_device_that_is_not_there_is_named(folder):
    assert refused(folder, device="xpu:7").startswith("device xpu:7: ")


def test_the_released_one_has_the_published_number_of_parameters():
    """455 million, which are 1.8 GB of float32, as the authors' files have."""
    count = sum(torch.Size(shape).numel() for shape in shapes(RELEASED).values())
    assert round(count / 1e6) == 455
