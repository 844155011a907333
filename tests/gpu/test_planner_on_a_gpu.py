"""One GPU: what the planner says a run holds and takes, against the allocator and the clock of the device."""

import json

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.memory import predict_memory
from megatron_cca.lab.planner.workload import Workload
from tests.distributed.launch import ROOT
from tests.gpu.memory import bytes_in_use

pytestmark = [pytest.mark.gpu, pytest.mark.needs_hardware("memory and clocks")]

WORKLOAD = Workload(2048, 1800)
# Wide enough that a GPU's own granularity does not matter.
KEYS = [
    "training.pretrained_checkpoint=null",
    "model.num_layers=4",
    "model.hidden_size=2048",
    "model.ffn_hidden_size=7168",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
]


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("recompute", ["null", "full"])
@pytest.mark.parametrize("strategy", ["resident", "offload"])
def test_peak_memory_is_within_a_tenth_of_the_prediction(strategy, recompute, implementation):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    from megatron_cca import platform
    from megatron_cca.lab.planner.dry_run import counted_step
    from megatron_cca.lab.planner.observer import Observer
    from megatron_cca.parallel.ranks import initialize_distributed

    overrides = [
        f"model.transformer_impl={implementation}",
        f"training.recompute_granularity={recompute}",
        f"reference.strategy={strategy}",
    ]
    config = load_config(ROOT / "examples" / "emu3_8b_cca.yaml", [*KEYS, *overrides])
    initialize_distributed(config)
    before = bytes_in_use()
    platform.reset_peak_memory()
    with Observer() as observer:
        counted = counted_step(config, WORKLOAD, observer, 4)
    estimate = predict_memory(config, 1, WORKLOAD)
    assert counted.parameters == estimate.weights
    assert counted.gradients == estimate.gradients
    assert counted.optimizer == estimate.optimizer
    seen_by_the_allocator = platform.peak_memory_bytes() - before
    assert estimate.total - estimate.overhead == pytest.approx(seen_by_the_allocator, rel=0.1)
    # The context is what the driver says is gone beyond what the allocator has reserved.
    free, total = torch.cuda.mem_get_info()
    print(f"context and libraries: {(total - free - torch.cuda.memory_reserved()) / 2**20:.0f} MiB")


def test_a_calibration_finds_plausible_shares_of_the_peaks(tmp_path):
    from megatron_cca.lab.planner import CalibrateSettings
    from megatron_cca.lab.planner.hardware import read_calibration
    from megatron_cca.lab.planner.program import run_calibrate

    file = tmp_path / "calibration.json"
    settings = CalibrateSettings(
        config=ROOT / "examples" / "emu3_8b_cca.yaml",
        overrides=KEYS,
        gpu=None,
        image_grid="40x40",
        caption_tokens=32,
        steps=5,
        device="cuda",
        output=file,
        overwrite=False,
    )
    run_calibrate(settings)
    told = json.loads(file.read_text())
    print(json.dumps(told, indent=1))
    calibration, _ = read_calibration(file, told["calibration"]["gpu"])
    assert 0 < calibration.relative_error < 0.5
    # Of data-sheet peaks; more than all of one would be a wrong peak or a wrong clock.
    assert 0.2 < calibration.matmul_efficiency < 1 and 0.1 < calibration.memory_efficiency < 1
