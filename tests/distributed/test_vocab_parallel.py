"""Vocab-parallel log-probabilities against a dense float64 log-softmax, targets on shard borders included."""

import itertools

import pytest

from tests.distributed.launch import run_workers

SIZES = {"length": 11, "batch": 3, "width": 16}
CASES = {
    f"{vocabulary} of {padded} words, chunks of {chunk_size}, {mask} mask": {
        **SIZES,
        "vocabulary": vocabulary,
        "padded": padded,
        "chunk_size": chunk_size,
        "mask": mask,
    }
    # Whole, padded, a last rank with padding only, and shards of more than one tile.
    for (vocabulary, padded), chunk_size, mask in itertools.product(
        [(40, 40), (37, 64), (17, 64), (9001, 9216)], [5, 1024], ["full", "ragged", "empty"]
    )
}
CASES["batch 1"] = {**SIZES, "batch": 1, "vocabulary": 37, "padded": 64, "chunk_size": 4, "mask": "full"}
# Supports on the last ranks alone, across borders of shards, on one of several tiles, on the first rank alone.
for vocabulary, padded, support in [
    (37, 64, (20, 37)),
    (64, 64, (15, 40)),
    (9001, 9216, (8000, 9001)),
    (64, 64, (0, 9)),
]:
    CASES[f"words {support} of {padded}"] = {
        **SIZES,
        "vocabulary": vocabulary,
        "padded": padded,
        "chunk_size": 5,
        "mask": "ragged",
        "support": support,
    }
CASES |= {f"{name}, with a bias": {**case, "has_bias": True} for name, case in CASES.items() if case["padded"] < 100}
CASES["logits of 10,000"] = {**CASES["batch 1"], "vocabulary": 37, "scale": 1e3}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_and_gradients_equal_float64(ranks, tmp_path):
    answers = run_workers(ranks, "logits_workers.vocab_parallel_logps", {"cases": CASES}, tmp_path)
    assert len(answers) == len(CASES)
    for name, worst in answers.items():
        assert all(value < 1e-5 for value in worst.values()), (name, worst)


def test_bfloat16_is_as_good_on_two_ranks_as_on_one(tmp_path):
    cases = {"bf16": {**SIZES, "vocabulary": 37, "padded": 64, "chunk_size": 4, "mask": "ragged", "dtype": "bfloat16"}}
    one, two = (
        run_workers(ranks, "logits_workers.vocab_parallel_logps", {"cases": cases}, tmp_path)["bf16"]
        for ranks in (1, 2)
    )
    for name in ("logps", "hidden", "weight"):
        assert two[name] <= max(1.01 * one[name], 1e-6), name
    assert one["logps"] < 1e-5


def test_shards_that_do_not_add_up_are_refused_on_all_ranks(tmp_path):
    settings = {"vocabulary": 20, "rows": [[9, 9], [12, 8], [8, 12], [10, 10]]}
    assert run_workers(2, "logits_workers.refused_shards", settings, tmp_path) == [
        "weight: 9 rows on each of 2 rank(s) are 18 ids, must be at least vocab_size 20",
        "weight: shards of 8 to 12 rows, must be equal on all 2 ranks",
        "weight: shards of 8 to 12 rows, must be equal on all 2 ranks",
        "accepted",
    ]
