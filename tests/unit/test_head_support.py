"""Which words log-probabilities are normalised over, and what that leaves of the head for each rank."""

import pytest

from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.sizes import sizes_of
from megatron_cca.lab.planner.workload import Workload, head_forward, model_flops
from megatron_cca.models import resolve_architecture
from megatron_cca.training import head_support

IMAGE = "objective.normalization=image"
WORKLOAD = Workload(seq_length=8400, image_tokens=8100)


def support(*overrides):
    config = load_config(None, list(overrides))
    return head_support(config, resolve_architecture(config.model).vocabulary)


def test_all_words_or_the_visual_ones():
    assert support("model.name=emu3-8b") == range(184_622)
    assert support("model.name=emu3-8b", IMAGE) == range(151_854, 184_622)


def test_a_model_that_predicts_codes_alone_has_no_other_words():
    assert support("model.name=llamagen-l") == support("model.name=llamagen-l", IMAGE) == range(16_384)


def words(tensor, *overrides):
    size = f"parallel.tensor_model_parallel_size={tensor}"
    return sizes_of(load_config(None, ["model.name=emu3-8b", size, *overrides]), 8, WORKLOAD).words


# The visual words are the last ones: on two and four ranks the last has them all, on eight the last two share them.
@pytest.mark.parametrize(("tensor", "most"), [(1, 32_768), (2, 32_768), (4, 32_768), (8, 22_446)])
def test_the_planner_counts_the_rank_that_has_most(tensor, most):
    assert words(tensor, IMAGE) == most
    assert words(tensor) == 184_622 / tensor


def test_flops_are_of_the_words_that_are_computed():
    whole, image = (load_config(None, ["model.name=emu3-8b", *more]) for more in ([], [IMAGE]))
    architecture = resolve_architecture(whole.model)
    heads = [head_forward(architecture, WORKLOAD.image_tokens, count) for count in (184_622, 32_768)]
    # Two rows of policy (three passes) and reference (one).
    assert model_flops(whole, architecture, WORKLOAD) - model_flops(image, architecture, WORKLOAD) == pytest.approx(
        2 * 4 * (heads[0] - heads[1])
    )
