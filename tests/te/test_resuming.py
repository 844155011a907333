"""A run goes on with other layers, another precision or another recipe of FP8 than it was saved with.

The oracle is the run that was not interrupted: it saves on its way, and what is resumed there must move away from the
reference as it does, step by step.
"""

from functools import cache

import pytest
import torch

from tests.gpu.test_reference_on_a_gpu import start
from tests.te.runs import COMMON, DELAYED, TENSORWISE

pytestmark = pytest.mark.gpu
SAVED, STEPS = 2, 5
# The log-ratio grows to 7 in these steps, so that a weight or a moment that was lost would show.
FAST = "optimizer.lr=2e-3"
LOCAL, ENGINE = "model.transformer_impl=local", "model.transformer_impl=transformer_engine"
SETTINGS = {
    "local, fp32": [LOCAL],
    "TE, fp32": [ENGINE],
    "local, bf16": [LOCAL, "training.precision=bf16"],
    "TE, bf16": [ENGINE, "training.precision=bf16"],
    "tensorwise": TENSORWISE,
    "delayed": DELAYED,
}
# Float32's products are TF32 in Transformer Engine's layers; FP8's log-ratios are off by some percent.
TF32, FP8 = 1e-3, 0.1


@pytest.fixture(scope="module")
def uninterrupted(digit_shards, tmp_path_factory):
    """Settings -> the folder of a run that has saved, and the log-ratios of the steps after that."""

    @cache
    def trained(name):
        from megatron_cca.training.saving import begin_save

        folder = tmp_path_factory.mktemp("run")
        run = start(digit_shards, folder, *COMMON, FAST, *SETTINGS[name])
        steps(run, SAVED)
        begin_save(run)
        run.saver.finish()
        assert run.saver.last_saved == SAVED
        return folder, steps(run, STEPS - SAVED)

    return trained


def steps(run, count):
    from megatron_cca.training.step import train_step

    return torch.tensor([train_step(run).metrics["positive_log_ratio"] for _ in range(count)])


@pytest.mark.parametrize(
    ("saved", "resumed", "tolerance"),
    [
        ("TE, fp32", "TE, fp32", 0.0),
        ("TE, fp32", "local, fp32", TF32),
        ("local, fp32", "TE, fp32", TF32),
        ("TE, bf16", "tensorwise", FP8),
        ("tensorwise", "tensorwise", 0.0),
        ("tensorwise", "TE, bf16", FP8),
        ("tensorwise", "delayed", FP8),
        ("delayed", "delayed", 0.0),
        ("delayed", "local, bf16", FP8),
    ],
)
def test_it_goes_on_as_the_run_that_was_not_interrupted(saved, resumed, tolerance, uninterrupted, digit_shards):
    folder, expected = uninterrupted(saved)
    run = start(digit_shards, folder, *COMMON, FAST, *SETTINGS[resumed])
    assert run.iteration == SAVED
    torch.testing.assert_close(steps(run, STEPS - SAVED), expected, rtol=tolerance, atol=0)
