"""What the planner says of Emu3.5's 34 billion parameters: against the dry run, and in its examples."""

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.candidates import check_candidate
from megatron_cca.lab.planner.hardware import gpu_named
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.workload import Workload
from tests.distributed.launch import ROOT, run_workers

EXAMPLES = ROOT / "examples"
ROWS = Workload(4352, 4096)
HELD = {"parameters": "weights", "reference": "reference", "gradients": "gradients", "optimizer": "optimizer"}


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 3])
def test_four_nodes_hold_what_is_predicted(stage, tmp_path):
    """The first and the last stage of TP 8 x PP 4, all of their 16 layers: to the byte, and the peak within a tenth."""
    path, overrides = EXAMPLES / "emu3_5_34b_cca.yaml", ["training.global_batch_size=4"]
    overrides.append("training.pretrained_checkpoint=null")
    job = {"config": str(path), "overrides": overrides, "ranks": 32, "rank": 8 * stage, "like_gpu": True}
    job["workload"] = [ROWS.seq_length, ROWS.image_tokens]
    (counted,) = run_workers(1, "timing_workers.dry_runs", {"jobs": [job]}, tmp_path)
    told = predict_memory(load_config(path, overrides), 32, ROWS, pipeline_rank=stage)
    assert {name: counted[name] for name in HELD} == {name: getattr(told, HELD[name]) for name in HELD}
    assert told.total - told.overhead - told.communication == pytest.approx(counted["peak"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"), [("8x_h100", 8, "h100-80gb"), ("64x_h100", 64, "h100-80gb"), ("8x_h200", 8, "h200")]
)
def test_the_planned_examples_are_what_they_say(name, gpus, gpu):
    path = EXAMPLES / f"emu3_5_34b_{name}.yaml"
    config = load_config(path)
    check_candidate(config, gpus)
    memory = predict_memory(config, gpus, ROWS)
    assert memory.total <= 0.92 * gpu_named(gpu).memory_bytes
    told = f"{memory.total / 2**30:.1f}"
    assert f"{told} of " in path.read_text()
    assert f"**{told}**" in (ROOT / "docs" / "scaling.md").read_text()
