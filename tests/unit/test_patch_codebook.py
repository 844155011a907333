"""The digits' image tokenizer, a codebook of grey patches: it sees grey as PIL does, and damage is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.tokenizers import PatchCodebook, open_image_tokenizer
from megatron_cca.errors import UserError
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
        (np.zeros((4, 2, 3), np.float32), "must have the shape [K, P, P], has [4, 2, 3]"),
        (np.zeros((0, 2, 2), np.float32), "must have the shape [K, P, P], has [0, 2, 2]"),
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
