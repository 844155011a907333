"""Which rank the others wait for, judged from two looks at what each one posted."""

import pytest

from megatron_cca.training.watchdog import _key, ranks_at_fault

POLICY, BATCH = "policy pass", "reading the batch"


def posted(*places, beats=1):
    return {rank: [beats, *place] for rank, place in enumerate(places)}


def test_a_rank_that_no_longer_posts_is_at_fault():
    first = posted((5, POLICY), (5, POLICY), (4, POLICY))
    second = {**posted((5, POLICY), (5, POLICY), beats=4), 2: first[2]}
    at_fault, reason = ranks_at_fault(first, second, rank=0, ranks=3)
    assert at_fault == [2]
    assert reason == "no sign of life from rank 2: stopped or gone; last seen in step 4, policy pass"


@pytest.mark.parametrize("asks", [0, 1, 2])
def test_the_rank_farthest_behind_is_at_fault(asks):
    places = ((5, POLICY), (5, BATCH), (5, POLICY))
    at_fault, reason = ranks_at_fault(posted(*places), posted(*places, beats=4), rank=asks, ranks=3)
    assert (at_fault, reason) == ([1], "waiting for rank 1, still in step 5, reading the batch")


def test_an_earlier_step_is_farther_behind_than_an_earlier_phase():
    places = ((5, BATCH), (4, POLICY))
    assert ranks_at_fault(posted(*places), posted(*places, beats=4), rank=0, ranks=2)[0] == [1]


def test_nobody_is_at_fault_where_all_are_in_one_place():
    places = ((5, POLICY), (5, POLICY))
    at_fault, reason = ranks_at_fault(posted(*places), posted(*places, beats=4), rank=1, ranks=2)
    assert at_fault == [0, 1]
    assert "a communication that does not end" in reason


def test_a_store_that_does_not_answer_is_said():
    assert ranks_at_fault({}, {}, rank=1, ranks=2) == (
        [],
        "the rendezvous store does not answer: its host, or rank 0, is stopped or gone",
    )


def test_many_ranks_are_not_listed_all():
    first = posted(*[(5, POLICY)] * 20)
    second = {**first, 0: [4, 5, POLICY]}
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and others" in ranks_at_fault(first, second, rank=0, ranks=20)[1]


def test_a_rank_that_never_posted_is_at_fault():
    first, second = posted((0, POLICY)), posted((0, POLICY), beats=4)
    assert ranks_at_fault(first, second, rank=0, ranks=2) == (
        [1],
        "no sign of life from rank 1: never seen in this attempt",
    )


def test_ranks_find_each_other_though_their_machines_count_restarts_differently(monkeypatch):
    """torchrun counts only a machine's own failures: after a restart over two machines one says 1, the other 0."""
    keys = set()
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        keys.add(_key(3))
    assert len(keys) == 1
