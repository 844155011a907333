"""One GPU: batches arrive there, and are the builder's, however busy the compute queue is."""

import time

import pytest
import torch

from megatron_cca import platform
from megatron_cca.data.loader import BatchLoader, RankShare, SequenceFeed
from tests.references.token_shards import token_data
from tests.unit.test_loader import TENSORS, builder

pytestmark = pytest.mark.gpu
# Some tenths of a second on any card of today.
LONG = 500_000_000
ROWS, LENGTH = 32, 4096


@pytest.fixture(params=["dali", "torch"])
def kind(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.mark.parametrize("prefetch", [1, 4])
def test_batches_on_the_gpu_are_the_builders(prefetch, kind, tmp_path):
    batches = builder(token_data(tmp_path, 60, 45, captions=12))
    with BatchLoader(batches, RankShare(), platform.device(), prefetch, kind) as loader:
        kept = [loader.get(step) for step in range(8)]
    for step, batch in enumerate(kept):
        for ours, theirs in zip(batch.microbatches, batches.build(step, 0, 1).microbatches, strict=True):
            for name in TENSORS:
                assert getattr(ours, name).device == platform.device()
                assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))


def turns(turn):
    return torch.full((ROWS, LENGTH), turn, dtype=torch.int32).numpy()


@pytest.mark.needs_hardware("streams")
def test_batch_k_is_batch_k_when_it_was_read_behind_a_long_kernel(kind):
    """What is read ahead while the compute queue is busy must neither wait in that queue nor be read over."""
    torch.cuda._sleep(4 * LONG)
    busy = torch.cuda.Event()
    busy.record()
    feed = SequenceFeed(turns, ROWS, platform.device(), 12, kind)
    deadline = time.monotonic() + 30
    while not feed._ready.full() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert feed._ready.full()
    kept = [feed.next() for _ in range(24)]
    feed.close()
    for turn, ids in enumerate(kept):
        assert ids.shape == (ROWS, LENGTH)
        assert bool((ids == turn).all()), f"batch {turn} holds {ids.unique().tolist()}"
    assert busy.query()


@pytest.mark.needs_hardware("streams")
def test_reading_ahead_does_not_wait_for_the_compute_queue(kind):
    feed = SequenceFeed(turns, ROWS, platform.device(), 2, kind)
    feed.next()
    torch.cuda._sleep(20 * LONG)
    busy = torch.cuda.Event()
    busy.record()
    for _ in range(6):
        feed.next()
    assert not busy.query(), "the batches came only after what was queued before them"
    feed.close()
    torch.cuda.synchronize()


@pytest.mark.needs_hardware("streams")
def test_the_memory_of_a_batch_is_not_given_away_before_its_last_use(kind):
    """A batch is dropped by the host long before the kernels that read it have run."""
    feed = SequenceFeed(turns, ROWS, platform.device(), 2, kind)
    torch.cuda._sleep(4 * LONG)
    sums = [feed.next().sum() for _ in range(24)]
    feed.close()
    assert [int(total) for total in sums] == [turn * ROWS * LENGTH for turn in range(24)]
