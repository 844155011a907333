"""What people see of a shard folder: numbers that add up, and the pictures that belong to the captions."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.inspection import decoded_samples, open_for_inspection, report
from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.io.figures import contact_sheet
from tests.references.token_shards import random_samples, write

CPU = torch.device("cpu")


def test_the_report_counts_what_is_there(tmp_path):
    samples = random_samples(50, captions=9)
    shards = open_for_inspection(write(tmp_path / "shards", samples))
    lines = report(shards).splitlines()
    assert lines[0] == f"{tmp_path / 'shards'}: 50 samples, every file as it was written"
    numbers = {line[:20].strip(): line[20:].split()[0] for line in lines[1:6]}
    assert numbers["visual codes"] == f"{sum(sample.codes.size for sample in samples):,}"
    assert numbers["caption tokens"] == f"{sum(sample.caption.size for sample in samples):,}"
    assert numbers["different captions"] == str(len({sample.caption.tobytes() for sample in samples}))
    start, middle = lines.index("tokens per caption"), lines.index("code grids (height x width)")
    assert sum(int(line.split("#")[0].split()[-1]) for line in lines[start + 1 : middle]) == 50
    grids = {sample.codes.shape[1:] for sample in samples}
    (more,) = [int(line.split()[1]) for line in lines if line.startswith("  and ")] or [0]
    assert len(lines) - middle - 1 - bool(more) + more == len(grids)


def test_a_clip_is_named_by_its_frames(tmp_path):
    shards = open_for_inspection(write(tmp_path / "shards", random_samples(3, clips=True)))
    assert "2 frames of 2 x 3" in report(shards)


def test_damage_anywhere_is_found(tmp_path):
    folder = write(tmp_path / "shards", random_samples(5))
    content = bytearray((folder / "codes.bin").read_bytes())
    content[-1] ^= 1
    (folder / "codes.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"SHARDS: .*codes\.bin is not what it was"):
        open_for_inspection(folder)


def test_samples_come_back_as_pictures_beside_their_own_captions(digit_shards):
    shards = open_for_inspection(digit_shards)
    images, captions = decoded_samples(shards, 7, 3, None, CPU)
    codebook, text = PatchCodebook.load(digit_shards), open_text_tokenizer(digit_shards)
    chosen = np.sort(np.random.default_rng(3).permutation(len(shards))[:7]).tolist()
    for sample, image, caption in zip(chosen, images, captions, strict=True):
        assert (image[..., 0] == codebook.decode(shards.codes(sample))[0]).all()
        assert caption == text.decode(shards.caption(sample).tolist())
    assert len(decoded_samples(shards, 10**6, 0, None, CPU)[0]) == len(shards)


def test_without_its_image_tokenizer_nothing_is_drawn(digit_shards, tmp_path):
    shards = open_for_inspection(write(tmp_path / "shards", random_samples(5)))
    with pytest.raises(UserError, match=r"--image-tokenizer: .* does not say which one it was made with"):
        decoded_samples(shards, 3, 0, None, CPU)


def test_a_sheet_shows_every_image_and_takes_any_caption(tmp_path):
    captions = ["$x^2$ for $5", "一座古寺", "word " * 60, "", "tab\tnew\nline"]
    images = [np.full((8 + index, 12, 3), 40 * index, dtype=np.uint8) for index in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet(tmp_path / "sheet.png", images, captions)
    with Image.open(tmp_path / "sheet.png") as sheet:
        shades = set(np.unique(np.asarray(sheet.convert("L"))).tolist())
    assert {0, 40, 80, 120, 160} <= shades
