"""Tokenising jobs: the same shards however the job is cut or interrupted."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_cca.data import parts, shard_writing
from megatron_cca.data.codebooks import PatchCodebook, PatchImageTokenizer
from megatron_cca.data.manifest import TOKEN_FILES
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_image_tokenizer, open_text_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.io import output_folders
from tests.references.scan_jobs import NUMBER, VOCABULARY, tokenize
from tests.references.scans import write_scans


def token_bytes(folder):
    return [(folder / name).read_bytes() for name in TOKEN_FILES]


@pytest.fixture(scope="module")
def expected(scan_folder, digit_shards, tmp_path_factory):
    """The same scans, read by PIL and tokenised one by one."""
    codebook, text = PatchCodebook.load(digit_shards), open_text_tokenizer(digit_shards)
    lines = [json.loads(line) for line in (scan_folder / "captions.jsonl").read_text().splitlines()]
    samples = [
        Sample(
            codebook.encode(np.asarray(Image.open(scan_folder / line["file_name"]))[None])[0],
            np.array(text.encode(line["caption"])),
            line["condition"],
        )
        for line in lines
    ]
    folder = tmp_path_factory.mktemp("expected") / "shards"
    write_shards(folder, samples, VOCABULARY, text.encode)
    return token_bytes(folder)


def test_shards_are_what_a_plain_reader_makes(scan_job, expected, tmp_path):
    result = tokenize(scan_job)
    assert (result.samples, result.skipped) == (NUMBER, 0)
    assert token_bytes(scan_job.output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    manifest = TokenShards(scan_job.output, VOCABULARY).manifest
    assert manifest["image_tokenizer"]["kind"] == "patch-codebook"
    assert open_text_tokenizer(scan_job.output).fingerprint() == manifest["text_tokenizer"]["fingerprint"]
    assert open_image_tokenizer(scan_job.output).fingerprint() == manifest["image_tokenizer"]["fingerprint"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_any_number_of_processes_makes_the_same(scan_job, expected, world_size, block):
    scan_job = replace(scan_job, block=block)
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(lambda rank: tokenize(scan_job, rank, world_size), range(world_size)))
    assert results[0].samples == NUMBER
    assert results[1:] == [None] * (world_size - 1)
    assert token_bytes(scan_job.output) == expected


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_process_that_comes_too_late_to_a_finished_job_has_nothing_to_do(scan_job, is_waiting):
    """With fewer blocks than processes, process 0 may have put everything away before another one has looked."""
    scan_job = replace(scan_job, block=1000)
    with ThreadPoolExecutor(1) as pool:
        if is_waiting:
            late = pool.submit(tokenize, scan_job, 1, 2)
            while not scan_job.output.with_name("shards.parts").exists():
                time.sleep(0.01)
            scan_job.output.mkdir()
            assert late.result(timeout=20) is None
            return
        assert tokenize(scan_job, 0, 2).samples == NUMBER
        before = token_bytes(scan_job.output)
        assert pool.submit(tokenize, scan_job, 1, 2).result(timeout=20) is None
        assert token_bytes(scan_job.output) == before


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
def test_an_interrupted_job_goes_on_without_repeating(scan_job, expected, interruptible, at):
    scan_job = replace(scan_job, block=1000)  # chunks of 64 images, eight to a call
    interruptible["raise_at"] = at
    with pytest.raises(KeyboardInterrupt):
        tokenize(scan_job)
    assert not scan_job.output.exists()
    kept = sum(part.stop for part in parts.PartsFolder(scan_job.output, NUMBER, 1000).done())
    assert kept == (at - 1) // 8 * 64
    assert tokenize(scan_job).samples == NUMBER
    # Only what was encoded of the chunk that was cut is encoded twice.
    assert interruptible["images"] == NUMBER + (at - 1) % 8 * 8
    assert token_bytes(scan_job.output) == expected


def test_an_interruption_between_two_files_keeps_nothing_half(scan_job, expected, monkeypatch):
    calls, original = [], shard_writing.checksum

    def interrupted(tokens):
        calls.append(1)
        if len(calls) == 201:  # after the codes of a sample went to their file, before its row is known
            raise KeyboardInterrupt
        return original(tokens)

    monkeypatch.setattr(shard_writing, "checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(scan_job)
    assert [part.stop for part in parts.PartsFolder(scan_job.output, NUMBER, 40).done()] == [40, 80]
    tokenize(scan_job)
    assert token_bytes(scan_job.output) == expected


def test_another_number_of_processes_may_go_on(scan_job, expected, interruptible):
    interruptible |= {"raise_at": 13, "error": RuntimeError("out of memory")}
    with pytest.raises(RuntimeError):
        tokenize(scan_job)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: tokenize(scan_job, rank, 2), range(2)))
    assert results[0].samples == NUMBER
    # Two blocks of 40 were finished, 16 images of the third were lost with it.
    assert interruptible["images"] == NUMBER + 16
    assert token_bytes(scan_job.output) == expected


def test_too_many_skipped_end_the_job_and_a_higher_limit_goes_on(scan_job, scan_folder, tmp_path, interruptible):
    folder = shutil.copytree(scan_folder, tmp_path / "images")
    for index in range(100, 130):
        (folder / f"{index:05d}.png").write_bytes(b"")
    scan_job = replace(scan_job, source=folder, max_skipped=0.1, block=10)
    with pytest.raises(UserError) as error:
        tokenize(scan_job)
    why = "--source: 20 of 150 records cannot be used, --max-skipped 0.1 allows 15; the last, 00119.png: is empty"
    assert str(error.value) == why
    assert not scan_job.output.exists()
    assert tokenize(replace(scan_job, max_skipped=0.2)).skipped == 30
    assert interruptible["images"] == NUMBER - 30


def test_two_jobs_on_one_output_are_kept_apart(scan_job):
    busy = pytest.raises(UserError, match=r"--output: another process is writing into .*shards\.parts/rank0")
    with output_folders.claimed(parts.PartsFolder(scan_job.output, NUMBER, 40).scratch(0)), busy:
        tokenize(scan_job)
    tokenize(scan_job)
    with pytest.raises(UserError, match=r"--output: .*shards exists already; give another folder, or remove it"):
        tokenize(scan_job)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"area": 256}, "area"), ({"block": 30}, "block"), ({"max_caption_tokens": 9}, "max_caption_tok")],
)
def test_another_job_does_not_go_on_with_these_parts(scan_job, interruptible, change, key):
    interruptible["raise_at"] = 10
    with pytest.raises(KeyboardInterrupt):
        tokenize(scan_job)
    with pytest.raises(
        UserError, match=rf"--output: .*shards\.parts was begun with {key}\w* \d+, not \d+; go on as it"
    ):
        tokenize(replace(scan_job, **change))


def test_a_changed_source_is_noticed(scan_job, scan_folder, tmp_path, interruptible):
    folder = shutil.copytree(scan_folder, tmp_path / "images")
    scan_job = replace(scan_job, source=folder)
    interruptible["raise_at"] = 10
    with pytest.raises(KeyboardInterrupt):
        tokenize(scan_job)
    write_scans(folder, 1, first=NUMBER)
    with pytest.raises(UserError, match="was begun with source"):
        tokenize(scan_job)


def test_a_full_disk_is_one_line_and_leaves_the_finished_parts(scan_job, small_disk, expected):
    scan_job = replace(scan_job, output=small_disk / "shards", block=10)
    (small_disk / "ballast").write_bytes(b"x" * 480_000)
    with pytest.raises(UserError, match=r"--output: the disk of \S+ is full") as error:
        tokenize(scan_job)
    assert "\n" not in str(error.value)
    assert not scan_job.output.exists()
    finished = parts.PartsFolder(scan_job.output, NUMBER, 10).done()
    assert 0 < len(finished) < NUMBER // 10
    (small_disk / "ballast").unlink()
    tokenize(scan_job)
    assert token_bytes(scan_job.output) == expected
