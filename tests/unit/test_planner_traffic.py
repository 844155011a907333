"""The bytes that the time model has ranks wait for, beside those that a dry run of the real step sends.

python -m tests.unit.test_planner_traffic    prints both; a process of its own, for it plays a rank of a job
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TENSOR, PIPELINE, CONTEXT = (
    f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context")
)
SMALL = ["model.num_layers=2", "training.micro_batch_size=2", "training.global_batch_size=8"]

# Name -> overrides, the part of a step's time, Megatron's groups behind it, and how far they may be apart. Of tensor
# parallelism the model leaves out the embedding's own, and with sequence parallelism what hides behind products.
CASES = {
    "tensor": ([TENSOR], "tensor_parallel", ("tensor",), 0.15),
    "recomputed": ([TENSOR, "training.recompute_granularity=full"], "tensor_parallel", ("tensor",), 0.15),
    "sequence": ([TENSOR, "parallel.sequence_parallel=true"], "tensor_parallel", ("tensor",), 0.25),
    "pipeline": ([PIPELINE], "pipeline", ("pipeline",), 1e-6),
    "context": ([CONTEXT, "model.transformer_impl=local"], "context_parallel", ("context",), 0.01),
    "data": ([], "data_parallel", ("data and context",), 0.01),
    "plain data": (["optimizer.use_distributed_optimizer=false"], "data_parallel", ("data and context",), 0.01),
}


def main():
    """Print, for each case, the model's and the dry run's bytes over a link, as JSON."""
    from megatron_cca import platform

    platform.install("cpu")
    from megatron_cca.config_files import load_config
    from megatron_cca.planner.calibration import DEFAULT
    from megatron_cca.planner.dry_run import dry_run
    from megatron_cca.planner.hardware import GPUS, Cluster
    from megatron_cca.planner.throughput import predict_step
    from megatron_cca.planner.workload import Workload

    # A byte takes a second.
    gpu = replace(GPUS["h100-80gb"], nvlink_bandwidth=1.0, network_bandwidth=1.0)
    exact = replace(DEFAULT, nvlink_efficiency=1.0, network_efficiency=1.0, collective_latency_seconds=0.0)
    workload, found = Workload(128, 96), {}
    for name, (overrides, part, groups, _) in CASES.items():
        config = load_config(None, [*SMALL, *overrides])
        sent = dry_run(config, 2, 1, workload, like_gpu=False).traffic
        step = predict_step(config, Cluster(gpu, 2, 8), workload, exact)
        found[name] = [getattr(step, part), sum(over_a_link(one) for one in sent if one.group in groups)]
    print(json.dumps(found))


def over_a_link(traffic):
    """Bytes in one direction between two ranks: half of a gather or scatter, all of a sum or of what is received."""
    weight = {"all_gather": 0.5, "reduce_scatter": 0.5, "all_reduce": 1.0, "recv": 1.0, "send": 1.0}
    return weight[traffic.operation] * traffic.num_bytes


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.test_planner_traffic"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_model_s_bytes_are_those_of_a_real_step(found, name):
    predicted, sent = found[name]
    assert predicted == pytest.approx(sent, rel=CASES[name][3])


if __name__ == "__main__":
    main()
