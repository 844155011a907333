"""Tokenising jobs: the same shards however the job is cut or interrupted, and nothing lost without a line."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data import shard_writing
from megatron_cca.data.image_tokenizers import PatchCodebook, PatchImageTokenizer, open_image_tokenizer
from megatron_cca.data.inspection import open_for_inspection, report
from megatron_cca.data.manifest import TOKEN_FILES
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.text_tokenizers import open_text_tokenizer
from megatron_cca.data.tokenizing import TokenizeSettings, job, parts
from megatron_cca.errors import UserError
from megatron_cca.io import output_folders
from megatron_cca.models.emu3 import tiny_vocabulary
from tests.references.scans import bad_images, encoded, write_scans

CPU = torch.device("cpu")
VOCABULARY = tiny_vocabulary()
NUMBER = 150


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "images", NUMBER)


@pytest.fixture
def settings(scans, digit_shards, tmp_path):
    return TokenizeSettings(
        source=scans,
        output=tmp_path / "shards",
        text_tokenizer=digit_shards,
        image_tokenizer=digit_shards,
        model="emu3-tiny",
        area=64,
        block=40,
        threads=2,
    )


def tokenize(settings, rank=0, world_size=1):
    return job.tokenize(settings, rank, world_size, CPU)


def token_bytes(folder):
    return [(folder / name).read_bytes() for name in TOKEN_FILES]


@pytest.fixture(scope="module")
def expected(scans, digit_shards, tmp_path_factory):
    """The same scans, read by PIL and tokenised one by one."""
    codebook, text = PatchCodebook.load(digit_shards), open_text_tokenizer(digit_shards)
    lines = [json.loads(line) for line in (scans / "captions.jsonl").read_text().splitlines()]
    samples = [
        Sample(
            codebook.encode(np.asarray(Image.open(scans / line["file_name"]))[None])[0],
            np.array(text.encode(line["caption"])),
            line["condition"],
        )
        for line in lines
    ]
    folder = tmp_path_factory.mktemp("expected") / "shards"
    write_shards(folder, samples, VOCABULARY, text.encode)
    return token_bytes(folder)


def test_shards_are_what_a_plain_reader_makes(settings, expected, tmp_path):
    result = tokenize(settings)
    assert (result.samples, result.skipped) == (NUMBER, 0)
    assert token_bytes(settings.output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    manifest = TokenShards(settings.output, VOCABULARY).manifest
    assert manifest["image_tokenizer"]["kind"] == "patch-codebook"
    assert open_text_tokenizer(settings.output).fingerprint() == manifest["text_tokenizer"]["fingerprint"]
    assert open_image_tokenizer(settings.output).fingerprint() == manifest["image_tokenizer"]["fingerprint"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_any_number_of_processes_makes_the_same(settings, expected, world_size, block):
    settings = replace(settings, block=block)
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(lambda rank: tokenize(settings, rank, world_size), range(world_size)))
    assert results[0].samples == NUMBER
    assert results[1:] == [None] * (world_size - 1)
    assert token_bytes(settings.output) == expected


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_process_that_comes_too_late_to_a_finished_job_has_nothing_to_do(settings, is_waiting):
    """With fewer blocks than processes, process 0 may have put everything away before another one has looked."""
    settings = replace(settings, block=1000)
    with ThreadPoolExecutor(1) as pool:
        if is_waiting:
            late = pool.submit(tokenize, settings, 1, 2)
            while not settings.output.with_name("shards.parts").exists():
                time.sleep(0.01)
            settings.output.mkdir()
            assert late.result(timeout=20) is None
            return
        assert tokenize(settings, 0, 2).samples == NUMBER
        before = token_bytes(settings.output)
        assert pool.submit(tokenize, settings, 1, 2).result(timeout=20) is None
        assert token_bytes(settings.output) == before


@pytest.fixture
def interruptible(monkeypatch):
    """Counts the images that are encoded; raises at a chosen call."""
    state = {"images": 0, "calls": 0, "raise_at": None, "error": KeyboardInterrupt}
    original = PatchImageTokenizer.encode

    def encode(self, pixels):
        state["calls"] += 1
        if state["calls"] == state["raise_at"]:
            raise state["error"]
        state["images"] += len(pixels)
        return original(self, pixels)

    monkeypatch.setattr(PatchImageTokenizer, "encode", encode)
    return state


@pytest.mark.parametrize("at", [1, 2, 5, 8, 13, 19])
def test_an_interrupted_job_goes_on_without_repeating(settings, expected, interruptible, at):
    settings = replace(settings, block=1000)  # chunks of 64 images, eight to a call
    interruptible["raise_at"] = at
    with pytest.raises(KeyboardInterrupt):
        tokenize(settings)
    assert not settings.output.exists()
    kept = sum(part.stop for part in parts.PartsFolder(settings.output, NUMBER, 1000).done())
    assert kept == (at - 1) // 8 * 64
    assert tokenize(settings).samples == NUMBER
    # Only what was encoded of the chunk that was cut is encoded twice.
    assert interruptible["images"] == NUMBER + (at - 1) % 8 * 8
    assert token_bytes(settings.output) == expected


def test_an_interruption_between_two_files_keeps_nothing_half(settings, expected, monkeypatch):
    calls, original = [], shard_writing.checksum

    def interrupted(tokens):
        calls.append(1)
        if len(calls) == 201:  # after the codes of a sample went to their file, before its row is known
            raise KeyboardInterrupt
        return original(tokens)

    monkeypatch.setattr(shard_writing, "checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(settings)
    assert [part.stop for part in parts.PartsFolder(settings.output, NUMBER, 40).done()] == [40, 80]
    tokenize(settings)
    assert token_bytes(settings.output) == expected


def test_another_number_of_processes_may_go_on(settings, expected, interruptible):
    interruptible |= {"raise_at": 13, "error": RuntimeError("out of memory")}
    with pytest.raises(RuntimeError):
        tokenize(settings)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: tokenize(settings, rank, 2), range(2)))
    assert results[0].samples == NUMBER
    # Two blocks of 40 were finished, 16 images of the third were lost with it.
    assert interruptible["images"] == NUMBER + 16
    assert token_bytes(settings.output) == expected


def test_what_cannot_be_used_is_listed_with_its_reason(settings, scans, digit_shards, tmp_path):
    folder = shutil.copytree(scans, tmp_path / "images")
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
    settings = replace(settings, source=folder, max_skipped=0.2)
    result = tokenize(settings)
    lines = [json.loads(line) for line in (settings.output / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert (result.samples, result.skipped) == (NUMBER, len(captions) + 1)
    assert [line["record"] for line in lines] == list(range(NUMBER, NUMBER + len(captions) + 1))
    for name, (_, word) in bad_images().items():
        assert word in reasons[name]
    assert reasons["mute.png"] == "it has no caption"
    assert "caption" in reasons["blank.png"]
    assert "tokens, more than 1024" in reasons["long.png"]
    assert "gone.png" in reasons
    assert len(TokenShards(settings.output, VOCABULARY)) == NUMBER


def test_too_many_skipped_end_the_job_and_a_higher_limit_goes_on(settings, scans, tmp_path, interruptible):
    folder = shutil.copytree(scans, tmp_path / "images")
    for index in range(100, 130):
        (folder / f"{index:05d}.png").write_bytes(b"")
    settings = replace(settings, source=folder, max_skipped=0.1, block=10)
    with pytest.raises(UserError) as error:
        tokenize(settings)
    why = "--source: 20 of 150 records cannot be used, --max-skipped 0.1 allows 15; the last, 00119.png: is empty"
    assert str(error.value) == why
    assert not settings.output.exists()
    assert tokenize(replace(settings, max_skipped=0.2)).skipped == 30
    assert interruptible["images"] == NUMBER - 30


CAPTIONS = [
    "sept écrit à la main",
    "手写的七",
    "سبعة",
    "🙂 seven",
    "<|image start|>4*4<|image token|><|visual token 000001|>",
    "<|extra_203|><|endoftext|>",
    "tab\tand\nline",
]


def test_captions_stay_text_in_any_script(scans, settings, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, caption in enumerate(CAPTIONS):
        shutil.copy(scans / f"{index:05d}.png", folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    tokenize(replace(settings, source=folder))
    shards, text = TokenShards(settings.output, VOCABULARY), open_text_tokenizer(settings.output)
    for index, caption in enumerate(CAPTIONS):
        ids = shards.caption(index)
        assert (ids < VOCABULARY.text_size).all()
        assert text.decode(ids.tolist()) == caption


def test_two_jobs_on_one_output_are_kept_apart(settings):
    busy = pytest.raises(UserError, match=r"--output: another process is writing into .*shards\.parts/rank0")
    with output_folders.claimed(parts.PartsFolder(settings.output, NUMBER, 40).scratch(0)), busy:
        tokenize(settings)
    tokenize(settings)
    with pytest.raises(UserError, match=r"--output: .*shards exists already; give another folder, or remove it"):
        tokenize(settings)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"area": 256}, "area"), ({"block": 30}, "block"), ({"max_caption_tokens": 9}, "max_caption_tok")],
)
def test_another_job_does_not_go_on_with_these_parts(settings, interruptible, change, key):
    interruptible["raise_at"] = 10
    with pytest.raises(KeyboardInterrupt):
        tokenize(settings)
    with pytest.raises(
        UserError, match=rf"--output: .*shards\.parts was begun with {key}\w* \d+, not \d+; go on as it"
    ):
        tokenize(replace(settings, **change))


def test_a_changed_source_is_noticed(settings, scans, tmp_path, interruptible):
    folder = shutil.copytree(scans, tmp_path / "images")
    settings = replace(settings, source=folder)
    interruptible["raise_at"] = 10
    with pytest.raises(KeyboardInterrupt):
        tokenize(settings)
    write_scans(folder, 1, first=NUMBER)
    with pytest.raises(UserError, match="was begun with source"):
        tokenize(settings)


def test_a_full_disk_is_one_line_and_leaves_the_finished_parts(settings, small_disk, expected):
    settings = replace(settings, output=small_disk / "shards", block=10)
    (small_disk / "ballast").write_bytes(b"x" * 480_000)
    with pytest.raises(UserError, match=r"--output: the disk of \S+ is full") as error:
        tokenize(settings)
    assert "\n" not in str(error.value)
    assert not settings.output.exists()
    finished = parts.PartsFolder(settings.output, NUMBER, 10).done()
    assert 0 < len(finished) < NUMBER // 10
    (small_disk / "ballast").unlink()
    tokenize(settings)
    assert token_bytes(settings.output) == expected


def test_input_that_cannot_work_is_refused_before_anything_is_written(settings, tmp_path):
    small_codebook = tmp_path / "codebook"
    small_codebook.mkdir()
    PatchCodebook(np.zeros((7, 2, 2), np.float32)).save(small_codebook)
    before = sorted(tmp_path.rglob("*"))
    for changes, message in (
        ({"source": tmp_path / "nowhere"}, "--source: .*nowhere"),
        ({"image_tokenizer": tmp_path / "nowhere"}, "--image-tokenizer: .*nowhere"),
        ({"text_tokenizer": tmp_path / "nowhere"}, "--text-tokenizer: .*nowhere"),
        ({"model": "emu4"}, "--model: .*unknown preset 'emu4'"),
        ({"model": "emu3-8b"}, "--text-tokenizer: .* has 320 words, model emu3-8b 151643; give the folder of that"),
        ({"image_tokenizer": small_codebook}, "--image-tokenizer: .* has a codebook of 7, model emu3-tiny one of 128"),
        ({"clip_meta": "{seconds}"}, "the fields of a clip's meta text"),
        ({"output": settings.source / "inside"}, "in each other's way"),
    ):
        with pytest.raises(UserError, match=message) as error:
            tokenize(replace(settings, **changes))
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_emu3s_own_lists_need_no_image_tokenizer(settings, digit_shards, tmp_path):
    source = TokenShards(digit_shards, VOCABULARY)
    (tmp_path / "feature").mkdir()
    for index in range(6):
        sample = {"name": str(index), "images": source.codes(index)[0].astype(np.int64), "texts": f"number {index}"}
        torch.save(sample, tmp_path / "feature" / f"{index}.pth")
    torch.save({"images": np.full((2, 2), 128), "texts": "beyond the codebook"}, tmp_path / "feature" / "6.pth")
    listed = {"prefix": str(tmp_path / "feature"), "path_list": [f"{index}.pth" for index in range(7)]}
    (tmp_path / "train.json").write_text(json.dumps(listed))
    settings = replace(settings, source=tmp_path / "train.json", image_tokenizer=None, max_skipped=0.5)
    result = tokenize(settings)
    assert (result.samples, result.skipped) == (6, 1)
    shards = TokenShards(settings.output, VOCABULARY)
    assert all((shards.codes(index) == source.codes(index)).all() for index in range(6))


def test_images_without_an_image_tokenizer_are_told_so(settings, tmp_path):
    with pytest.raises(UserError, match="an image tokenizer is needed"):
        tokenize(replace(settings, image_tokenizer=None))
    # Nothing was finished, so that nothing stays.
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A small model of Emu3's structure with the tiny vocabulary's codebook."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from tests.references.emu3_vq import SIZES

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vq")
    Emu3VQVAE(Emu3VQVAEConfig(**SIZES | {"codebook_size": 128})).save_pretrained(folder)
    return folder


def test_clips_are_tokenised_in_groups_of_four_frames(settings, vq, tmp_path):
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
    settings = replace(settings, source=folder, image_tokenizer=vq, area=192, max_skipped=0.5)
    tokenize(replace(settings, clip_meta="{frames}*{height}*{width}"))
    shards = TokenShards(settings.output, VOCABULARY)
    tokenizer = open_image_tokenizer(vq)
    assert shards.codes(0).shape == (2, 8, 6)
    assert (shards.codes(0) == tokenizer.encode(torch.from_numpy(frames)[None])[0].numpy()).all()
    assert (shards.codes(1)[0] == tokenizer.encode(torch.from_numpy(frames)[:1])[0].numpy()).all()
    text = open_text_tokenizer(settings.output)
    assert text.decode(shards.meta_ids((2, 8, 6)).tolist()) == "2*8*6"
    reasons = [json.loads(line)["reason"] for line in (settings.output / "skipped.jsonl").read_text().splitlines()]
    assert "a clip of 6 frames; frames are tokenised in groups of 4" in reasons[0]
    assert "its frames differ in size" in reasons[1]


def test_a_codebook_of_patches_takes_no_clips(settings, scans, tmp_path):
    folder = shutil.copytree(scans, tmp_path / "images")
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"frames": ["00000.png", "00001.png"], "caption": "two"}) + "\n")
    tokenize(replace(settings, source=folder))
    assert "takes single images" in (settings.output / "skipped.jsonl").read_text()


def test_what_is_not_read_is_said_at_the_start_and_in_the_manifest(settings, scans, tmp_path, capsys):
    folder = shutil.copytree(scans, tmp_path / "images")
    (folder / "labels.csv").write_text("x")
    shutil.copy(folder / "00000.png", folder / "more.png")
    with (folder / "captions.jsonl").open("a") as file:
        for name in ("gone.png", "lost.png", "00001.png"):
            file.write(json.dumps({"file_name": name} | ({} if name[0] == "0" else {"caption": "c"})) + "\r\n\r\n")
    result = tokenize(replace(settings, source=folder))
    lines = [
        "captions.jsonl names 1 images again that it has named before; each line is a sample",
        "1 of 151 images that lie there are not in captions.jsonl and are not read",
        "not read: 1 .csv (labels.csv)",
    ]
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("--source: ") for line in said if line.startswith("--source: ")] == lines
    assert (result.samples, result.skipped) == (NUMBER, 3)
    assert result.reasons == "2 such as: gone.png is missing; 1: it has no caption"
    shards = open_for_inspection(settings.output)
    assert shards.manifest["source"]["notices"] == lines
    text = report(shards)
    assert "skipped             3 (2 such as: gone.png is missing; 1: it has no caption)" in text
    assert "of the source       not read: 1 .csv (labels.csv)" in text


def test_a_source_that_is_wrong_as_a_whole_is_told_once_before_anything_is_kept(settings, scans, tmp_path):
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
            tokenize(replace(settings, source=folder, max_skipped=share))
    assert list(tmp_path.iterdir()) == [folder]
    for index in range(0, 80, 2):
        shutil.copy(scans / f"{index:05d}.png", folder / f"{index}.png")
        (folder / f"{index + 1}.txt").unlink()
    (folder / "1.txt").write_text("one")
    several = r"41 of 80 records cannot be used|\d+ of 80 records cannot be used, --max-skipped 0.1 allows 8; "
    with pytest.raises(UserError, match=several + r"\d+: it has no caption; 1: a GIF image"):
        tokenize(replace(settings, source=folder, block=80))
    # Whoever allows nearly all to be skipped may have a source of which some are good.
    assert tokenize(replace(settings, source=folder, max_skipped=0.9)).samples == 40
