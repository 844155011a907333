"""Pairs of images in training: the same trace on every layout, after a resume, and with a cached reference."""

import numpy as np
import pytest
import torch

from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.models.emu3 import tiny_vocabulary
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CP2, LOSS_RTOL, NORM_RTOL, PP2, TP2, VPP2, column, under

BY_RANKS = {
    1: {"one process": [], "micro batch 1 x 8": ["training.micro_batch_size=1"]},
    2: {
        "TP 2 + SP": [*TP2, "parallel.sequence_parallel=true"],
        "PP 2 x VPP 2": VPP2,
        "PP 2": PP2,
        "CP 2": CP2,
        "DP 2": [],
    },
}
LAYOUTS = [name for layouts in BY_RANKS.values() for name in layouts]
STEPS = 3


@pytest.fixture(scope="module")
def partners(digit_shards, tmp_path_factory):
    """Random images of other grids, two for each caption of the digits."""
    shards, text = TokenShards(digit_shards, tiny_vocabulary()), open_text_tokenizer(digit_shards)
    _, first = np.unique(shards.table["caption"], return_index=True)
    random = np.random.default_rng(0)
    captions = [shards.caption(int(index)) for index in first.repeat(2)]
    samples = (Sample(random.integers(128, size=random.integers(2, 6, 2)), caption) for caption in captions)
    folder = tmp_path_factory.mktemp("partners") / "shards"
    write_shards(folder, samples, tiny_vocabulary(), text.encode)
    return folder


@pytest.fixture(scope="module")
def common(digit_shards, partners):
    return [*under("dpo"), f"data.path={digit_shards}", "data.pairs=images", f"data.partner_path={partners}"]


@pytest.fixture(scope="module")
def traces(common, tmp_path_factory):
    found = {}
    for ranks, layouts in BY_RANKS.items():
        settings = {"common": common, "layouts": layouts, "steps": STEPS}
        found |= run_workers(ranks, "traces", settings, tmp_path_factory.mktemp(f"ranks{ranks}"))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_trace(traces, layout):
    expected, found = traces["one process"], traces[layout]
    assert found[0]["worst"] == 0.0 < found[1]["worst"]
    assert all(row["positive_as_negative"] == 0.0 for row in found)
    torch.testing.assert_close(column(found, "loss"), column(expected, "loss"), rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(column(found, "grad_norm"), column(expected, "grad_norm"), rtol=NORM_RTOL, atol=0)


def test_a_resumed_run_and_a_cached_reference_equal_the_whole_run(common, traces, tmp_path):
    short = [*common, "training.train_iters=3", f"training.output_dir={tmp_path}/run"]
    for steps, more in ((1, []), (STEPS - 1, ["training.micro_batch_size=2"])):
        settings = {"overrides": [*short, *more], "steps": steps, "save": steps == 1}
        rows = run_workers(steps, "checkpoint_workers.resume", settings, tmp_path)["rows"]
    expected = column(traces["one process"][1:], "loss")
    torch.testing.assert_close(column(rows, "loss"), expected, rtol=LOSS_RTOL, atol=0)
    variants = {"resident": [], "cached": ["reference.strategy=cached"]}
    settings = {"common": common, "layouts": {"alone": []}, "variants": variants, "steps": STEPS}
    found = run_workers(1, "reference_traces", {**settings, "folder": str(tmp_path), "cache": None}, tmp_path)
    assert found["alone, cached"] == found["alone, resident"]
    torch.testing.assert_close(
        column(found["alone, cached"]["steps"], "loss"), column(traces["one process"], "loss"), rtol=LOSS_RTOL, atol=0
    )
