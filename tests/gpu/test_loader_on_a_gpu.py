"""One GPU: batches arrive there, and are the builder's."""

import pytest
import torch

from megatron_cca import platform
from megatron_cca.data.loader import BatchLoader, Place
from tests.references.token_shards import token_data
from tests.unit.test_loader import TENSORS, builder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("prefetch", [1, 4])
def test_batches_on_the_gpu_are_the_builders(prefetch, tmp_path):
    batches = builder(token_data(tmp_path, 60, 45, captions=12))
    with BatchLoader(batches, Place(), platform.device(), prefetch) as loader:
        kept = [loader.get(step) for step in range(8)]
    for step, batch in enumerate(kept):
        for ours, theirs in zip(batch.microbatches, batches.build(step, 0, 1).microbatches, strict=True):
            for name in TENSORS:
                assert getattr(ours, name).device == platform.device()
                assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
