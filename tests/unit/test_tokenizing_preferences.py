"""Tokenising jobs on preferences: samples and pairs as a plain reader makes them, however the job is cut.

The oracle reads the same scans by PIL, tokenises them one by one and numbers the pairs by hand.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data import parts
from megatron_cca.data.codebooks import PatchCodebook, PatchImageTokenizer
from megatron_cca.data.digits import ensure_digit_shards
from megatron_cca.data.inspection import decoded_samples, open_for_inspection, report
from megatron_cca.data.partners import PAIRS, read_pairs
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models.llamagen import class_vocabulary
from tests.references.scan_jobs import VOCABULARY, tokenize
from tests.references.sources import lines
from tests.unit.test_tokenizing import token_bytes

# Images of one record by the numbers of their scans, and their scores.
SCORED = [([0, 1], [1, 0]), ([2, 3, 4], [1, 3, 1]), ([5, 6], [2, 2]), ([7], [1]), ([8, 9, 10], [3, 2, 1])]
REPEATS = 12
CLASSES = class_vocabulary(codebook_size=128, num_classes=10)
TIES = ("a tie: none of its images is better than another", "it has one image; a pair takes two images, of which one")


def number(record, scan):
    """The scan that an image of the n-th record shows, so that no two records have the same."""
    return (record // len(SCORED) * 11 + scan) % 150


@pytest.fixture(scope="module")
def preferences(scan_folder, tmp_path_factory):
    """Scans, and records of them that are in order: two of five are no pairs."""
    folder = tmp_path_factory.mktemp("preferences") / "images"
    folder.mkdir()
    for path in scan_folder.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    rows = [
        {
            "prompt": f"record {record}",
            "images": [f"{number(record, scan):05d}.png" for scan in SCORED[record % len(SCORED)][0]],
            "scores": SCORED[record % len(SCORED)][1],
        }
        for record in range(REPEATS * len(SCORED))
    ]
    (folder / "preferences.jsonl").write_text(lines(*rows))
    return folder


@pytest.fixture
def job(preferences, scan_job):
    return replace(scan_job, source=preferences, block=7)


@pytest.fixture(scope="module")
def expected(preferences, digit_shards, tmp_path_factory):
    """Token files and pairs."""
    codebook, text = PatchCodebook.load(digit_shards), open_text_tokenizer(digit_shards)
    samples, pairs = [], []
    for record in range(REPEATS * len(SCORED)):
        scans, scores = SCORED[record % len(SCORED)]
        if len(set(scores)) < 2:
            continue
        every = range(len(scans))
        pairs += [
            (len(samples) + one, len(samples) + other)
            for one in every
            for other in every
            if scores[one] > scores[other]
        ]
        for scan in scans:
            grey = np.asarray(Image.open(preferences / f"{number(record, scan):05d}.png"))
            samples.append(Sample(codebook.encode(grey[None])[0], np.array(text.encode(f"record {record}"))))
    folder = tmp_path_factory.mktemp("expected") / "shards"
    write_shards(folder, samples, VOCABULARY, text.encode)
    return token_bytes(folder), pairs


def found(folder):
    return token_bytes(folder), np.load(folder / PAIRS).tolist()


def as_lists(expected):
    return expected[0], [list(pair) for pair in expected[1]]


def test_shards_and_pairs_are_what_a_plain_reader_makes(job, expected):
    result = tokenize(job)
    assert found(job.output) == as_lists(expected)
    shards = TokenShards(job.output, VOCABULARY)
    assert (result.samples, result.pairs, result.skipped) == (len(shards), len(expected[1]), 2 * REPEATS)
    assert PAIRS in shards.manifest["files"]
    assert read_pairs(job.output / PAIRS, shards.table).tolist() == as_lists(expected)[1]
    skipped = [json.loads(line) for line in (job.output / "skipped.jsonl").read_text().splitlines()]
    assert [line["record"] for line in skipped[:4]] == [2, 3, 7, 8]
    assert all(line["reason"].startswith(TIES) for line in skipped)
    assert f"{REPEATS}: {TIES[0]}" in result.reasons


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_makes_the_same(job, expected, world_size):
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(lambda rank: tokenize(job, rank, world_size), range(world_size)))
    assert results[0].pairs == len(expected[1])
    assert found(job.output) == as_lists(expected)


def test_an_interrupted_job_goes_on(job, expected, monkeypatch):
    job = replace(job, block=1000)
    monkeypatch.setattr("megatron_cca.data.tokenizing.job._CHUNK", 8)
    original, calls = PatchImageTokenizer.encode, []

    def interrupted(self, pixels):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(PatchImageTokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(job)
    (part,) = parts.PartsFolder(job.output, REPEATS * len(SCORED), 1000).done()
    assert 0 < part.stop < REPEATS * len(SCORED)
    assert part.without_pair == part.skipped > 0
    tokenize(job)
    assert found(job.output) == as_lists(expected)


@pytest.fixture
def broken(preferences, tmp_path):
    """Three records: a loser of two is broken, one of three is missing, and the third is whole."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for scan in range(8):
        (folder / f"{scan}.png").write_bytes((preferences / f"{scan:05d}.png").read_bytes())
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-40])
    rows = [
        {"prompt": "one", "winner": "0.png", "loser": "1.png"},
        {"prompt": "two", "images": ["2.png", "gone.png", "3.png", "4.png"], "scores": [2, 3, 1, 1]},
        {"prompt": "three", "winner": "5.png", "loser": ["6.png", "7.png"]},
    ]
    (folder / "preferences.jsonl").write_text(lines(*rows))
    return folder


def test_a_broken_image_takes_its_pairs_along_and_is_listed(job, broken):
    job = replace(job, source=broken, max_skipped=0.7)
    result = tokenize(job)
    assert (result.samples, result.pairs, result.skipped) == (6, 4, 2)
    assert np.load(job.output / PAIRS).tolist() == [[0, 1], [0, 2], [3, 4], [3, 5]]
    listed = [json.loads(line) for line in (job.output / "skipped.jsonl").read_text().splitlines()]
    assert [(line["record"], line["name"]) for line in listed] == [
        (0, "preferences.jsonl:1, image 2"),
        (1, "preferences.jsonl:2, image 2"),
    ]
    assert "cut short" in listed[0]["reason"]
    assert listed[1]["reason"] == "gone.png is missing"
    text = open_text_tokenizer(job.output)
    shards = TokenShards(job.output, VOCABULARY)
    assert [text.decode(shards.caption(sample).tolist()) for sample in range(6)] == ["two"] * 3 + ["three"] * 3
    with pytest.raises(UserError, match=r"2 of 3 records cannot be used, --max-skipped 0\.3 allows 0"):
        tokenize(replace(job, max_skipped=0.3, output=job.output.with_name("other")))


def test_ties_alone_are_no_fault_and_no_shards(job, tmp_path):
    (tmp_path / "ties").mkdir()
    row = {"prompt": "p", "images": ["a.png", "b.png"], "scores": [1, 1]}
    (tmp_path / "ties/preferences.jsonl").write_text(lines(row, row))
    with pytest.raises(UserError, match="--source: none of the 2 records can be used; see"):
        tokenize(replace(job, source=tmp_path / "ties"))


def test_a_model_of_classes_takes_numbers_and_refuses_texts(job, broken, tmp_path):
    shards = ensure_digit_shards(CLASSES, tmp_path / "digits")
    job = replace(job, source=broken, model="llamagen-tiny", text_tokenizer=None, image_tokenizer=shards)
    message = (
        r'--source: preferences\.jsonl:1 has no class, and the model takes nothing else; write its number as "label"'
    )
    with pytest.raises(UserError, match=message):
        tokenize(job)
    (broken / "preferences.jsonl").write_text(lines({"label": 7, "winner": "3.png", "loser": ["4.png", "5.png"]}))
    assert tokenize(job).pairs == 2
    made = TokenShards(job.output, CLASSES)
    assert [made.caption(sample).tolist() for sample in range(3)] == [[7]] * 3


def test_inspect_counts_pairs_and_shows_the_better_image_beside_the_worse(job, expected):
    tokenize(job)
    shards = open_for_inspection(job.output)
    assert f"pairs of images     {len(expected[1])} of {4 * REPEATS} better ones" in report(shards).splitlines()
    images, captions = decoded_samples(shards, 7, 1, None, torch.device("cpu"))
    assert len(images) == 6
    codebook = PatchCodebook.load(job.output)
    pictures = [codebook.decode(shards.codes(sample))[0] for sample in range(len(shards))]
    for place in range(0, 6, 2):
        shown = [images[place][..., 0], images[place + 1][..., 0]]
        (prompt,) = {caption.partition(": ")[2] for caption in captions[place : place + 2]}
        assert [caption.partition(": ")[0] for caption in captions[place : place + 2]] == ["better", "worse"]
        assert prompt.startswith("record ")
        assert any(
            (pictures[one] == shown[0]).all() and (pictures[other] == shown[1]).all() for one, other in expected[1]
        )
