"""The bytes that the time model has ranks wait for, beside those that a dry run of the real step sends."""

import pytest

from tests.distributed.launch import run_workers
from tests.selection import mostly_full

TENSOR, PIPELINE, CONTEXT = (
    f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context")
)
SMALL = ["model.num_layers=2", "training.micro_batch_size=2"]
SCALES = ["model.name=var-tiny"]

# Name -> overrides, the part of a step's time, Megatron's groups behind it, and how far they may be apart. Of tensor
# parallelism the model leaves out the embedding's own, and with sequence parallelism what hides behind products.
CASES = {
    "tensor": ([TENSOR], "tensor_parallel", ("tensor",), 0.15),
    "recomputed": ([TENSOR, "training.recompute_granularity=full"], "tensor_parallel", ("tensor",), 0.15),
    "sequence": ([TENSOR, "parallel.sequence_parallel=true"], "tensor_parallel", ("tensor",), 0.25),
    "scales": ([*SCALES, TENSOR], "tensor_parallel", ("tensor",), 0.15),
    "scales, sequence": ([*SCALES, TENSOR, "parallel.sequence_parallel=true"], "tensor_parallel", ("tensor",), 0.25),
    "scales, data": (SCALES, "data_parallel", ("data and context",), 0.01),
    "pipeline": ([PIPELINE], "pipeline", ("pipeline",), 1e-6),
    "context": ([CONTEXT, "model.transformer_impl=local"], "context_parallel", ("context",), 0.01),
    "data": ([], "data_parallel", ("data and context",), 0.01),
    "plain data": (["optimizer.use_distributed_optimizer=false"], "data_parallel", ("data and context",), 0.01),
}


@pytest.fixture(scope="module", params=mostly_full([4, 8], [4]), ids=lambda batch: f"batch {batch}")
def found(request, tmp_path_factory):
    common = [*SMALL, f"training.global_batch_size={request.param}"]
    cases = {name: [[*common, *overrides], part, groups] for name, (overrides, part, groups, _) in CASES.items()}
    return run_workers(1, "timing_workers.planned_and_sent_bytes", {"cases": cases}, tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("name", CASES)
def test_the_model_s_bytes_are_those_of_a_real_step(found, name):
    predicted, sent = found[name]
    assert predicted == pytest.approx(sent, rel=CASES[name][3])
