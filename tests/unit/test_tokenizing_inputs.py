"""What a tokenising job makes of its input: captions, codes and clips come through, all else is said in a line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.inspection import open_for_inspection, report
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_image_tokenizer, open_text_tokenizer
from megatron_cca.errors import UserError
from tests.references.scan_jobs import NUMBER, VOCABULARY, tokenize
from tests.references.scans import bad_images, encoded

CAPTIONS = [
    "sept écrit à la main",
    "手写的七",
    "سبعة",
    "🙂 seven",
    "<|image start|>4*4<|image token|><|visual token 000001|>",
    "<|extra_203|><|endoftext|>",
    "tab\tand\nline",
]


def test_captions_stay_text_in_any_script(scan_folder, scan_job, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, caption in enumerate(CAPTIONS):
        shutil.copy(scan_folder / f"{index:05d}.png", folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    tokenize(replace(scan_job, source=folder))
    shards, text = TokenShards(scan_job.output, VOCABULARY), open_text_tokenizer(scan_job.output)
    for index, caption in enumerate(CAPTIONS):
        ids = shards.caption(index)
        assert (ids < VOCABULARY.text_size).all()
        assert text.decode(ids.tolist()) == caption


def test_emu3s_own_lists_need_no_image_tokenizer(scan_job, digit_shards, tmp_path):
    source = TokenShards(digit_shards, VOCABULARY)
    (tmp_path / "feature").mkdir()
    for index in range(6):
        sample = {"name": str(index), "images": source.codes(index)[0].astype(np.int64), "texts": f"number {index}"}
        torch.save(sample, tmp_path / "feature" / f"{index}.pth")
    torch.save({"images": np.full((2, 2), 128), "texts": "beyond the codebook"}, tmp_path / "feature" / "6.pth")
    listed = {"prefix": str(tmp_path / "feature"), "path_list": [f"{index}.pth" for index in range(7)]}
    (tmp_path / "train.json").write_text(json.dumps(listed))
    scan_job = replace(scan_job, source=tmp_path / "train.json", image_tokenizer=None, max_skipped=0.5)
    result = tokenize(scan_job)
    assert (result.samples, result.skipped) == (6, 1)
    shards = TokenShards(scan_job.output, VOCABULARY)
    assert all((shards.codes(index) == source.codes(index)).all() for index in range(6))


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A small model of Emu3's structure with the tiny vocabulary's codebook."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from tests.references.emu3_vq import SIZES

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vq")
    Emu3VQVAE(Emu3VQVAEConfig(**SIZES | {"codebook_size": 128})).save_pretrained(folder)
    return folder


def test_clips_are_tokenised_in_groups_of_four_frames(scan_job, vq, tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "clips"
    folder.mkdir()
    frames = random.integers(256, size=(8, 16, 12, 3), dtype=np.uint8)
    names = [f"{index}.png" for index in range(8)]
    for name, frame in zip(names, frames, strict=True):
        (folder / name).write_bytes(encoded(Image.fromarray(frame)))
    (folder / "other.png").write_bytes(encoded(Image.new("RGB", (14, 16))))
    lines = [
        {"frames": names, "caption": "eight frames"},
        {"file_name": names[0], "caption": "one frame"},
        {"frames": names[:6], "caption": "six frames"},
        {"frames": [*names[:3], "other.png"], "caption": "of two sizes"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scan_job = replace(scan_job, source=folder, image_tokenizer=vq, area=192, max_skipped=0.5)
    tokenize(replace(scan_job, clip_meta="{frames}*{height}*{width}"))
    shards = TokenShards(scan_job.output, VOCABULARY)
    tokenizer = open_image_tokenizer(vq)
    assert shards.codes(0).shape == (2, 8, 6)
    assert (shards.codes(0) == tokenizer.encode(torch.from_numpy(frames)[None])[0].numpy()).all()
    assert (shards.codes(1)[0] == tokenizer.encode(torch.from_numpy(frames)[:1])[0].numpy()).all()
    text = open_text_tokenizer(scan_job.output)
    assert text.decode(shards.meta_ids((2, 8, 6)).tolist()) == "2*8*6"
    reasons = [json.loads(line)["reason"] for line in (scan_job.output / "skipped.jsonl").read_text().splitlines()]
    assert "a clip of 6 frames; frames are tokenised in groups of 4" in reasons[0]
    assert "its frames differ in size" in reasons[1]


def test_a_codebook_of_patches_takes_no_clips(scan_job, scan_folder, tmp_path):
    folder = shutil.copytree(scan_folder, tmp_path / "images")
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"frames": ["00000.png", "00001.png"], "caption": "two"}) + "\n")
    tokenize(replace(scan_job, source=folder))
    assert "takes single images" in (scan_job.output / "skipped.jsonl").read_text()


def test_what_cannot_be_used_is_listed_with_its_reason(scan_job, scan_folder, digit_shards, tmp_path):
    folder = shutil.copytree(scan_folder, tmp_path / "images")
    captions = {name: f"a {name}" for name in bad_images()} | {"gone.png": "a gap"}
    for name, (content, _) in bad_images().items():
        (folder / name).write_bytes(content)
    good = (folder / "00000.png").read_bytes()
    for name, caption in {"mute.png": None, "blank.png": "  ", "long.png": "word " * 900}.items():
        (folder / name).write_bytes(good)
        captions[name] = caption
    with (folder / "captions.jsonl").open("a") as file:
        for name, caption in captions.items():
            file.write(json.dumps({"file_name": name} | ({"caption": caption} if caption is not None else {})) + "\n")
        file.write("{broken\n")
    scan_job = replace(scan_job, source=folder, max_skipped=0.2)
    result = tokenize(scan_job)
    lines = [json.loads(line) for line in (scan_job.output / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert (result.samples, result.skipped) == (NUMBER, len(captions) + 1)
    assert [line["record"] for line in lines] == list(range(NUMBER, NUMBER + len(captions) + 1))
    for name, (_, word) in bad_images().items():
        assert word in reasons[name]
    assert reasons["mute.png"] == "it has no caption"
    assert "caption" in reasons["blank.png"]
    assert "tokens, more than 1024" in reasons["long.png"]
    assert "gone.png" in reasons
    assert len(TokenShards(scan_job.output, VOCABULARY)) == NUMBER


def test_what_is_not_read_is_said_at_the_start_and_in_the_manifest(scan_job, scan_folder, tmp_path, capsys):
    folder = shutil.copytree(scan_folder, tmp_path / "images")
    (folder / "labels.csv").write_text("x")
    shutil.copy(folder / "00000.png", folder / "more.png")
    with (folder / "captions.jsonl").open("a") as file:
        for name in ("gone.png", "lost.png", "00001.png"):
            file.write(json.dumps({"file_name": name} | ({} if name[0] == "0" else {"caption": "c"})) + "\r\n\r\n")
    result = tokenize(replace(scan_job, source=folder))
    lines = [
        "captions.jsonl names 1 images again that it has named before; each line is a sample",
        "1 of 151 images that lie there are not in captions.jsonl and are not read",
        "not read: 1 .csv (labels.csv)",
    ]
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("--source: ") for line in said if line.startswith("--source: ")] == lines
    assert (result.samples, result.skipped) == (NUMBER, 3)
    assert result.reasons == "2 such as: gone.png is missing; 1: it has no caption"
    shards = open_for_inspection(scan_job.output)
    assert shards.manifest["source"]["notices"] == lines
    text = report(shards)
    assert "skipped             3 (2 such as: gone.png is missing; 1: it has no caption)" in text
    assert "of the source       not read: 1 .csv (labels.csv)" in text


def test_input_that_cannot_work_is_refused_before_anything_is_written(scan_job, tmp_path):
    small_codebook = tmp_path / "codebook"
    small_codebook.mkdir()
    PatchCodebook(np.zeros((7, 2, 2), np.float32)).save(small_codebook)
    before = sorted(tmp_path.rglob("*"))
    for changes, message in (
        ({"source": tmp_path / "nowhere"}, "--source: .*nowhere"),
        ({"image_tokenizer": tmp_path / "nowhere"}, "--image-tokenizer: .*nowhere"),
        ({"text_tokenizer": tmp_path / "nowhere"}, "--text-tokenizer: .*nowhere"),
        ({"model": "emu4"}, "--model: .*unknown preset 'emu4'"),
        ({"model": "emu3-8b"}, "--text-tokenizer: .* has 320 ids, model emu3-8b 151643; give the folder of that"),
        ({"image_tokenizer": small_codebook}, "--image-tokenizer: .* has a codebook of 7, model emu3-tiny one of 128"),
        ({"clip_meta": "{seconds}"}, "the fields of a clip's meta text"),
        ({"output": scan_job.source / "inside"}, "in each other's way"),
    ):
        with pytest.raises(UserError, match=message) as error:
            tokenize(replace(scan_job, **changes))
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_without_an_image_tokenizer_are_told_so(scan_job, tmp_path):
    with pytest.raises(UserError, match="an image tokenizer is needed"):
        tokenize(replace(scan_job, image_tokenizer=None))
    # Nothing was finished, so that nothing stays.
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_wrong_as_a_whole_is_told_once_before_anything_is_kept(scan_job, scan_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(80):
        (folder / f"{index}.png").write_bytes(b"GIF89a" + bytes(99))
        (folder / f"{index}.txt").write_text("a caption")
    said = (
        "--source: none of 32 records from all of 80 can be used, --max-skipped {} allows {} to be skipped; the first, "
    )
    for share, limit in ((0.1, 8), (0.5, 40)):
        with pytest.raises(UserError, match=said.format(share, limit) + "0.png: a GIF image; only JPEG, PNG"):
            tokenize(replace(scan_job, source=folder, max_skipped=share))
    assert list(tmp_path.iterdir()) == [folder]
    for index in range(0, 80, 2):
        shutil.copy(scan_folder / f"{index:05d}.png", folder / f"{index}.png")
        (folder / f"{index + 1}.txt").unlink()
    (folder / "1.txt").write_text("one")
    several = r"41 of 80 records cannot be used|\d+ of 80 records cannot be used, --max-skipped 0.1 allows 8; "
    with pytest.raises(UserError, match=several + r"\d+: it has no caption; 1: a GIF image"):
        tokenize(replace(scan_job, source=folder, block=80))
    # Whoever allows nearly all to be skipped may have a source of which some are good.
    assert tokenize(replace(scan_job, source=folder, max_skipped=0.9)).samples == 40
