"""The digits' image tokenizers, codebooks of grey patches: they see grey as PIL does, and damage is named.

A pyramid's oracle is the plain quantiser of VAR, with convolutions that copy.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.codebooks import PatchCodebook, PyramidCodebook, frozen_features
from megatron_cca.data.digits import load_scans
from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models.var import PRESETS
from tests.references import var
from tests.references.image_tokenizers import pixels, refused


@pytest.fixture
def codebook(tmp_path):
    centres = np.random.default_rng(0).uniform(0, 255, (16, 2, 2)).astype(np.float32)
    PatchCodebook(centres).save(tmp_path)
    return PatchCodebook(centres), tmp_path


def test_a_patch_codebook_sees_grey_as_pil_does(codebook):
    patches, folder = codebook
    tokenizer = open_image_tokenizer(folder)
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "patch-codebook",
        2,
        0,
        16,
    )
    images = pixels((5, 32, 64, 3))
    grey = np.stack([np.asarray(Image.fromarray(image.numpy()).convert("L")) for image in images])
    codes = tokenizer.encode(images)
    assert torch.equal(codes, torch.from_numpy(patches.encode(grey)))
    back = tokenizer.decode(codes)
    assert back.dtype == torch.uint8
    assert all(np.array_equal(back[..., channel].numpy(), patches.decode(codes.numpy())) for channel in range(3))
    grey_images = torch.from_numpy(grey)[..., None].repeat(1, 1, 1, 3)
    assert torch.equal(tokenizer.encode(grey_images), codes)


def test_grey_is_pils_to_the_last_level(tmp_path):
    PatchCodebook(np.arange(256, dtype=np.float32).reshape(256, 1, 1)).save(tmp_path)
    images = pixels((1, 256, 256, 3))
    grey = np.asarray(Image.fromarray(images[0].numpy()).convert("L"))
    assert np.array_equal(open_image_tokenizer(tmp_path).encode(images)[0].numpy(), grey)


def test_a_patch_codebooks_limits(codebook):
    patches, folder = codebook
    tokenizer = open_image_tokenizer(folder)
    with pytest.raises(UserError, match=r"pixels: must be uint8 \[N, H, W, 3\], found"):
        tokenizer.encode(pixels((1, 4, 4, 4, 3)))
    with pytest.raises(UserError, match="codes: 16 does not fit a codebook of 16"):
        tokenizer.decode(torch.full((1, 2, 2), 16))
    before = tokenizer.fingerprint()
    PatchCodebook(patches.centres + 1).save(folder)
    assert open_image_tokenizer(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2, 3), np.float32), "must have the shape [K, P, P] or [K, P, P, 3], has [4, 2, 3]"),
        (np.zeros((0, 2, 2), np.float32), "must have the shape [K, P, P] or [K, P, P, 3], has [0, 2, 2]"),
        (np.zeros((4, 2, 2, 4), np.float32), "must have the shape [K, P, P] or [K, P, P, 3], has [4, 2, 2, 4]"),
        (np.zeros((4, 2, 2)), "must hold one float32 array"),
        (np.array([{}], dtype=object), "is damaged or not a codebook: "),
        (np.full((4, 2, 2), np.nan, np.float32), "holds numbers that are not finite"),
    ],
)
def test_a_damaged_codebook_is_named(array, message, tmp_path):
    path = tmp_path / "codebook.npy"
    np.save(path, array)
    assert refused(tmp_path).startswith(f"{path}: {message}")


def test_a_codebooks_file_that_is_cut_or_boasts_is_named(codebook):
    _, folder = codebook
    path = folder / "codebook.npy"
    content = path.read_bytes()
    boast = content.replace(b"(16, 2, 2), }      ", b"(16000000, 2, 2), }")
    assert boast != content
    for damaged in (content[:-1], content[:20], b"", b"PK\3\4", boast):
        path.write_bytes(damaged)
        assert refused(folder).startswith(f"{path}: is damaged or not a codebook: ")


def test_a_patch_codebook_in_colour_takes_the_nearest_patch_of_all_three(tmp_path):
    centres = np.random.default_rng(0).uniform(0, 255, (16, 2, 2, 3)).astype(np.float32)
    PatchCodebook(centres).save(tmp_path)
    tokenizer, images = open_image_tokenizer(tmp_path), pixels((5, 8, 6, 3))
    assert (tokenizer.codebook_size, tokenizer.spatial_factor) == (16, 2)
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 4, 3)
    for image, row, column in ((0, 0, 0), (2, 1, 2), (4, 3, 1)):
        patch = images[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].numpy().astype(np.float64)
        nearest = ((centres - patch) ** 2).sum((1, 2, 3)).argmin()
        assert codes[image, row, column] == nearest
        shown = tokenizer.decode(codes)[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].numpy()
        assert np.array_equal(shown, centres[nearest].round().astype(np.uint8))
    grey = PatchCodebook(centres[..., 0])
    grey.save(tmp_path)
    assert open_image_tokenizer(tmp_path).fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize("scales", [(), (1, 2, 4)])
def test_fitted_colours_are_those_of_the_images(scales):
    """Images of red, green or blue squares: a codebook of so many patches shows them without a fault."""
    pytest.importorskip("sklearn")
    squares = np.random.default_rng(0).integers(0, 3, (30, 4, 4))
    images = np.kron(250 * np.eye(3, dtype=np.uint8)[squares], np.ones((1, 2, 2, 1), np.uint8))
    codebook = PyramidCodebook.fit(images, 64, 2, scales) if scales else PatchCodebook.fit(images, 3, 2)
    assert codebook.centres.shape[1:] == (2, 2, 3)
    shown = codebook.decode(codebook.encode(images)).astype(float)
    assert shown.shape == images.shape
    assert np.abs(shown - images).mean() < (25 if scales else 1e-3)


SIZES = var.Sizes(0, 0, 1, scales=(1, 3, 4), codebook=16, channels=4)


@pytest.fixture
def pyramid(tmp_path):
    centres = np.random.default_rng(0).normal(0, 0.5, (SIZES.codebook, 2, 2)).astype(np.float32)
    PyramidCodebook(centres, SIZES.scales).save(tmp_path)
    copying = torch.zeros(4, 4, 3, 3)
    copying[range(4), range(4), 1, 1] = 1
    quantizer = {"quantize.embedding.weight": torch.from_numpy(centres.reshape(-1, 4))}
    for phi in range(SIZES.phis):
        name = f"quantize.quant_resi.qresi_ls.{phi}"
        quantizer |= {f"{name}.weight": copying, f"{name}.bias": torch.zeros(4)}
    return quantizer, tmp_path


def patches_of(images):
    """The patches of 2 x 2 grey levels between -1 and 1, as maps ``[N, 4, 4, 4]``."""
    rows = images.unflatten(1, (4, 2)).unflatten(3, (4, 2))
    return rows.permute(0, 2, 4, 1, 3).flatten(1, 2).float() / 127.5 - 1


def test_a_pyramid_has_the_codes_and_pixels_of_the_plain_quantiser(pyramid):
    quantizer, folder = pyramid
    tokenizer = open_image_tokenizer(folder)
    assert (tokenizer.kind, tokenizer.scales, tokenizer.spatial_factor) == ("patch-pyramid", (1, 3, 4), 2)
    grey = pixels((20, 8, 8))
    codes = tokenizer.encode(grey[..., None].repeat(1, 1, 1, 3))
    expected = var.codes_of(quantizer, patches_of(grey), SIZES)
    assert torch.equal(codes[:, 0], expected)
    assert len(expected.unique()) > 10
    maps = sum(var.residuals(quantizer, expected, SIZES))
    wanted = ((maps.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2).reshape(20, 8, 8) + 1) * 127.5).round().clip(0, 255)
    assert all(torch.equal(tokenizer.decode(codes)[..., channel], wanted.to(torch.uint8)) for channel in range(3))


def test_a_fitted_pyramid_shows_the_digits_it_has_not_seen():
    pytest.importorskip("sklearn")
    train, held_out = load_scans()
    errors = []
    for scales in ((1,), (1, 2, 4)):
        codebook = PyramidCodebook.fit(train.images, 64, 8 // scales[-1], scales)
        shown = codebook.decode(codebook.encode(held_out.images))
        errors.append(np.sqrt(((shown - held_out.images.astype(float)) ** 2).mean()))
    assert errors[1] < min(0.3 * held_out.images.std(), 0.7 * errors[0])


def test_a_pyramids_limits(pyramid):
    quantizer, folder = pyramid
    tokenizer = open_image_tokenizer(folder)
    with pytest.raises(UserError, match="pixels: 16 x 8; this tokenizer takes 8 x 8 alone"):
        tokenizer.encode(pixels((1, 16, 8, 3)))
    with pytest.raises(UserError, match=r"codes: \[1, 25\] for an image; scales of side 1, 3, 4 have \[1, 26\]"):
        tokenizer.decode(torch.zeros(1, 1, 25, dtype=torch.int64))
    with pytest.raises(UserError, match="codes: 16 does not fit a codebook of 16"):
        tokenizer.decode(torch.full((1, 1, 26), 16))
    before = tokenizer.fingerprint()
    PyramidCodebook(quantizer["quantize.embedding.weight"].view(-1, 2, 2).numpy(), (1, 2, 4)).save(folder)
    assert open_image_tokenizer(folder).fingerprint() != before
    assert frozen_features(PRESETS["var-tiny"], [folder / "elsewhere"]) == {}
    with pytest.raises(UserError, match="grids of 1, 2, 4, 16 codes, 4 levels a patch, the model is for grids"):
        frozen_features(PRESETS["var-tiny"], [folder])


CENTRES, SCALES = np.zeros((4, 2, 2), np.float32), np.array([1, 2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"centres": CENTRES}, "must hold centres and scales, holds centres"),
        ({"centres": CENTRES[0], "scales": SCALES}, "must have the shape [K, P, P] or [K, P, P, 3], has [2, 2]"),
        ({"centres": CENTRES, "scales": SCALES * 1.0}, "scales must be 1 to 64 whole numbers, are float64 [2]"),
        ({"centres": CENTRES, "scales": SCALES[:0]}, "scales must be 1 to 64 whole numbers, are int64 [0]"),
        ({"centres": CENTRES, "scales": SCALES[::-1]}, "scales must grow from 1 or more, are 2, 1"),
        ({"centres": CENTRES, "scales": SCALES - 1}, "scales must grow from 1 or more, are 0, 1"),
        ({"centres": np.array([{}], dtype=object), "scales": SCALES}, "cannot be read as .npz"),
    ],
)
def test_a_damaged_pyramid_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "pyramid.npz", **arrays)
    assert refused(tmp_path).startswith(f"{tmp_path / 'pyramid.npz'}: {message}")


def test_a_pyramids_file_that_is_cut_is_named(pyramid):
    _, folder = pyramid
    path = folder / "pyramid.npz"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b""):
        path.write_bytes(damaged)
        assert refused(folder).startswith(f"{path}: cannot be read as .npz")
