"""Vocab-parallel log-probabilities against a dense float64 log-softmax, targets on shard borders included."""

import pytest

from tests.distributed.launch import run_workers


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("vocabulary", "padded"), [(40, 40), (37, 64)])
def test_values_and_gradients_equal_float64(ranks, vocabulary, padded, tmp_path):
    settings = {"S": 11, "B": 3, "H": 16, "V": vocabulary, "padded": padded}
    worst = run_workers(ranks, "vocab_parallel_logps", settings, tmp_path, timeout=120)
    assert all(value < 1e-5 for value in worst.values()), worst
