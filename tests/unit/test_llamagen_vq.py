"""LlamaGen's image tokenizer against an independent one in float64, and everything that it refuses."""

import argparse
import pickle

import pytest
import torch

from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models.llamagen.image_tokenizer import open_llamagen_vq
from tests.references.bomb import Bomb
from tests.references.image_tokenizers import pixels, refused
from tests.references.llamagen_vq import (
    TINY,
    VQ_8,
    VQ_16,
    decoded,
    encoded,
    latents,
    nearest,
    random_vq,
    save_vq,
    saved,
    shapes,
)

IMAGES = (5, 24, 40, 3)


def codes_of(shape, codebook, seed=0):
    return torch.randint(0, codebook, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def state():
    return random_vq()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    return save_vq(state, tmp_path_factory.mktemp("vq") / "vq_ds16_c2i.pt")


@pytest.fixture(scope="module")
def tokenizer(file):
    return open_image_tokenizer(file)


def assert_decodes_as(tokenizer, state, codes):
    """Within 1e-5 of the largest in float; in levels, equal but where a fraction was next to a whole level."""
    exact = decoded(state, codes)
    assert exact.std() > 0.2, "too flat to tell anything"
    found = tokenizer.decode_floats(codes).double()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    levels = (127.5 * exact + 128).clamp(0, 255).to(torch.uint8)
    differences = (tokenizer.decode(codes).int() - levels.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 1e-3


def test_codes_and_pixels_are_the_references(tokenizer, state):
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "llamagen-vq",
        4,
        0,
        40,
    )
    codes = tokenizer.encode(pixels(IMAGES))
    assert (codes.dtype, codes.shape) == (torch.int64, (5, 6, 10))
    assert torch.equal(codes, encoded(state, pixels(IMAGES)))
    assert codes.unique().numel() > 10
    assert_decodes_as(tokenizer, state, codes_of((3, 6, 10), 40))


@pytest.mark.full
@pytest.mark.parametrize(("sizes", "factor"), [(VQ_16, 16), (VQ_8, 8)])
def test_the_released_sizes(sizes, factor, tmp_path):
    state = random_vq(sizes)
    tokenizer = open_llamagen_vq(save_vq(state, tmp_path / "vq.pt"))
    assert (tokenizer.spatial_factor, tokenizer.codebook_size) == (factor, 16_384)
    side = 64 if factor == 16 else 32
    images = pixels((1, side, side, 3))
    assert torch.equal(tokenizer.encode(images), encoded(state, images))
    assert_decodes_as(tokenizer, state, codes_of((1, 4, 4), 16_384))


def test_the_released_one_has_the_published_number_of_parameters():
    """72 million, as the authors say of VQ-16 (and of VQ-8, 70)."""
    counts = [sum(torch.Size(shape).numel() for shape in shapes(**sizes).values()) for sizes in (VQ_16, VQ_8)]
    assert [round(count / 1e6) for count in counts] == [72, 70]


def test_the_floats_before_the_codebook_are_the_references(tokenizer, state):
    exact = latents(state, pixels(IMAGES))
    found = tokenizer.latents(pixels(IMAGES)).double()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_only_the_direction_of_a_codebooks_vector_counts_and_of_equals_the_first(state, file, tmp_path):
    table = state["quantize.embedding.weight"].clone()
    table[20:] = table[:20] * 4
    doubled = open_image_tokenizer(save_vq(state | {"quantize.embedding.weight": table}, tmp_path / "vq.pt"))
    codes = doubled.encode(pixels(IMAGES))
    assert codes.max() < 20
    assert torch.equal(codes, nearest(state | {"quantize.embedding.weight": table}, latents(state, pixels(IMAGES))))
    one = codes_of((2, 3, 3), 20)
    assert torch.equal(doubled.decode(one), doubled.decode(one + 20))


def test_an_image_does_not_depend_on_its_batch(tokenizer, monkeypatch):
    codes, images = tokenizer.encode(pixels(IMAGES)), tokenizer.decode(codes_of((5, 6, 10), 40))
    singly = torch.cat([tokenizer.encode(image[None]) for image in pixels(IMAGES)])
    assert torch.equal(codes, singly)
    drawn = torch.cat([tokenizer.decode(one[None]) for one in codes_of((5, 6, 10), 40)])
    assert (drawn.int() - images.int()).abs().max() <= 1
    # In parts of two, as a batch that is too large.
    monkeypatch.setattr("megatron_cca.models.vq_network._PIXELS_AT_ONCE", 2 * 24 * 40)
    seen = []
    hook = tokenizer._network.encoder.register_forward_hook(lambda _, given, found: seen.append(len(found)))
    assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)
    assert (tokenizer.decode(codes_of((5, 6, 10), 40)).int() - images.int()).abs().max() <= 1
    hook.remove()
    assert seen == [2, 2, 1]


def test_autocast_does_not_reach_the_codes_nor_do_gradients_leave(tokenizer):
    codes = tokenizer.encode(pixels(IMAGES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)
    assert not tokenizer.decode(codes).requires_grad


def test_an_empty_batch_has_shapes_too(tokenizer):
    assert tokenizer.encode(pixels((0, 8, 4, 3))).shape == (0, 2, 1)
    assert tokenizer.decode(torch.zeros(0, 2, 1, dtype=torch.int64)).shape == (0, 8, 4, 3)


def test_black_and_white_are_reached_but_not_passed(state, tmp_path):
    bias = state["decoder.conv_out.bias"]
    for shift, level in ((9.0, 255), (-9.0, 0), (0.0, 128), (1.0, 255), (-1.0, 0)):
        flat = {"decoder.conv_out.weight": torch.zeros_like(state["decoder.conv_out.weight"])}
        shifted = state | flat | {"decoder.conv_out.bias": torch.full_like(bias, shift)}
        found = open_image_tokenizer(save_vq(shifted, tmp_path / "vq.pt")).decode(codes_of((1, 2, 2), 40))
        assert found.unique().tolist() == [level]  # clamp(127.5 x + 128), the fraction cut off


@pytest.mark.parametrize(
    "found",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"ema": state},
        lambda state: {
            "model": state,
            "ema": random_vq(seed=1),
            "steps": 3,
            "args": argparse.Namespace(seed=0, lr=1.0),
        },
    ],
    ids=["bare", "state_dict", "ema", "a training checkpoint"],
)
def test_other_forms_of_the_file(found, state, tokenizer, tmp_path):
    path = tmp_path / "0050000.pt"
    path.write_bytes(saved(found(state)))
    assert open_image_tokenizer(path).fingerprint() == tokenizer.fingerprint()
    assert open_image_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_the_fingerprint_is_of_the_weights(state, tokenizer, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    rounded = open_image_tokenizer(save_vq(half, tmp_path / "vq.pt"))
    assert rounded.fingerprint() != tokenizer.fingerprint()
    exact = {name: tensor.float() for name, tensor in half.items()}
    assert open_image_tokenizer(save_vq(exact, tmp_path / "vq.pt")).fingerprint() == rounded.fingerprint()


def test_what_lies_in_the_file_may_go(state, tmp_path):
    path = save_vq(state, tmp_path / "vq.pt")
    tokenizer = open_image_tokenizer(path)
    codes = tokenizer.encode(pixels(IMAGES))
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)


@pytest.mark.parametrize(
    ("given_pixels", "message"),
    [
        (torch.zeros(1, 8, 8, 3), "must be uint8 [N, H, W, 3], found torch.float32 [1, 8, 8, 3]"),
        (torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), "must be uint8 [N, H, W, 3], found"),
        (torch.zeros(1, 8, 6, 3, dtype=torch.uint8), "width 6 is not a multiple of 4"),
    ],
)
def test_pixels_that_cannot_be_are_refused(given_pixels, message, tokenizer):
    with pytest.raises(UserError) as error:
        tokenizer.encode(given_pixels)
    assert str(error.value).startswith("pixels: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 40), "codes: 40 does not fit a codebook of 40"),
        (torch.full((1, 2, 2), -1), "codes: -1 does not fit a codebook of 40"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), "codes: must be int64 [N, h, w], found torch.int64 [1, 1, 2, 2]"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, message, tokenizer):
    with pytest.raises(UserError) as error:
        tokenizer.decode(codes)
    assert message in str(error.value)


NAME = "encoder.conv_blocks.1.res.0.conv1.weight"
TABLE = "quantize.embedding.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("decoder.mid.1.q.weight"), "tensor decoder.mid.1.q.weight is missing"),
        (lambda found: found.update(extra=torch.ones(3)), "tensor extra is not one of LlamaGen's image tokenizer's"),
        (
            lambda found: found.update({"decoder.mid.1.q.bias": torch.ones(95)}),
            "tensor decoder.mid.1.q.bias has shape [95], [96] would fit the others",
        ),
        (lambda found: found.update({TABLE: torch.ones(40)}), f"tensor {TABLE} has shape [40], which has not 2 sizes"),
        (
            lambda found: found.update({TABLE: torch.ones(0, 4)}),
            f"tensor {TABLE} has shape [0, 4], which holds nothing",
        ),
        (
            lambda found: found.update({NAME: torch.ones(48, 32, 3, 3)}),
            f"tensor {NAME} has 48 channels, not",
        ),
        (lambda found: found.update({NAME: found[NAME].to(torch.int8)}), f"tensor {NAME} has dtype torch.int8, which"),
        (lambda found: found[NAME].fill_(torch.nan), f"tensor {NAME} holds numbers that are not finite"),
        (lambda found: found.update({NAME: [1.0]}), f"{NAME} is no tensor"),
        (lambda found: found.update({NAME: found[NAME].to_sparse()}), f"tensor {NAME} is not a plain one"),
        (lambda found: found.update({NAME: found[NAME].to("meta")}), f"tensor {NAME} is not a plain one"),
        (lambda found: found.update({3: torch.ones(3)}), "must hold tensors by name, found the key 3"),
        (
            lambda found: found.update({TABLE: torch.ones(1, 4).expand(10**9, 4)}),
            "its tensors claim 16007784348 bytes, more than its own ",
        ),
        (lambda found: found.update({"a\nb": torch.ones(3)}), "tensor a\\nb is not one of"),
        (lambda found: found[TABLE][7].zero_(), f"tensor {TABLE}: vector 7 is zero, which has no direction"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(change, message, state, tmp_path):
    found = {name: tensor.clone() for name, tensor in state.items()}
    change(found)
    path = save_vq(found, tmp_path / "vq.pt")
    assert refused(path).startswith(f"{path}: ")
    assert message in refused(path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"model": {"tok_embeddings.weight": torch.ones(4, 2)}},
            "looks like LlamaGen's decoder (tok_embed",
        ),
        ({"tok_embeddings.weight": torch.ones(4, 2)}, "looks like LlamaGen's decoder"),
        ({"weight": torch.ones(4, 2)}, "is not LlamaGen's image tokenizer: tensor encoder.conv_in.weight is missing"),
        ({"model": {}}, "is not LlamaGen's image tokenizer: tensor encoder.conv_in.weight is missing"),
        ({"model": 3}, "must hold tensors by name, found int"),
        ([torch.ones(3)], "must hold tensors by name, found list"),
    ],
)
def test_files_of_other_models_are_named(found, message, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(saved(found))
    assert message in refused(path)


def test_a_pickle_that_does_something_is_refused_before_it_does(state, tmp_path):
    path, witness = tmp_path / "vq.pt", tmp_path / "it ran"
    path.write_bytes(saved({"model": state, "args": Bomb(witness)}))
    assert f"{path}: holds more than tensors: it asks for " in refused(path)
    path.write_bytes(pickle.dumps(Bomb(witness)))
    assert refused(path).startswith(f"{path}: is truncated or not what torch.save writes")
    assert not witness.exists()


def test_damaged_files_and_folders_are_named(file, tmp_path):
    content = file.read_bytes()
    path = tmp_path / "vq.pt"
    for damaged in (content[:-1], content[: len(content) // 2], content[:20], b"", b"PK\3\4", b"a picture"):
        path.write_bytes(damaged)
        assert refused(path).startswith(f"{path}: is truncated or not what torch.save writes")
    path.rename(tmp_path / "vq.safetensors")
    assert refused(tmp_path / "vq.safetensors").startswith(f"{tmp_path / 'vq.safetensors'} holds no image tokenizer")
    assert refused(tmp_path / "nowhere.pt").startswith(f"no file or folder at {tmp_path / 'nowhere.pt'}")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(content)
    assert refused(tmp_path) == f"{tmp_path} holds 2 .pt files (a.pt, b.pt); name the image tokenizer's itself"
    assert refused(file, device="gpu").startswith("device gpu: ")


def test_the_tiny_one_is_a_file_of_the_same_names():
    released, tiny = shapes(**VQ_16), shapes(**TINY)
    assert {name for name in tiny if "conv_blocks" not in name} == {
        name for name in released if "conv_blocks" not in name
    }
