"""The search for layouts of a model of next-scale prediction."""

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import SearchInputs
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.program import image_shape
from megatron_cca.lab.planner.search import search, usual_alternatives


def node_for(config, vary):
    return SearchInputs(Cluster(GPUS["h100-80gb"], 8, 8), image_shape(config, None, 0), vary)


def test_scales_are_neither_in_a_pipeline_nor_shared_by_context_ranks():
    config = load_config(None, ["model.name=var-d16", "training.global_batch_size=64", "training.micro_batch_size=4"])
    some = node_for(config, vary=())
    plan = search(config, some, 10)
    sizes = [one.config.parallel for one in plan.best]
    # Of 16 heads, a node takes 1, 2, 4 or 8; the rest are replicas.
    assert sorted(one.tensor_model_parallel_size for one in sizes) == [1, 2, 4, 8]
    assert {one.pipeline_model_parallel_size * one.context_parallel_size for one in sizes} == {1}
    names = {one.name: one.verdict for one in usual_alternatives(plan.best[0], some)}
    assert names["PP 8 alone"].startswith("refused: parallel.pipeline_model_parallel_size: 8, but in var-d16 every")
    # The best is that, with more samples in a microbatch.
    assert sizes[0].tensor_model_parallel_size == 1
    assert "data parallelism alone" not in names


def test_what_no_layout_helps_is_refused_as_training_does():
    config = load_config(None, ["model.name=var-d16", "kernels.bias_activation_fusion=true"])
    with pytest.raises(
        UserError, match=r"kernels.bias_activation_fusion: the layers of var-d16 cannot have it; leave it out"
    ):
        search(config, node_for(config, vary=("micro_batch",)), 10)
