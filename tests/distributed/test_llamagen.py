"""A step of other objectives than CCA with LlamaGen's model, against a plain one."""

import pytest

from tests.distributed.launch import class_model_answers as answers

TP2 = ["parallel.tensor_model_parallel_size=2"]
TP2_SP = [*TP2, "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
# So that the head's 128 rows lie on both of two ranks, and rows of no word behind them.
TINY = ["model.name=llamagen-tiny", "model.make_vocab_size_divisible_by=8"]
BY_RANKS = {1: {"one process": []}, 2: {"TP 2": TP2, "TP 2 + SP": TP2_SP, "PP 2": PP2}}


STEP = [
    *("optimizer.clip_grad=0", "training.global_batch_size=8", "training.micro_batch_size=2"),
    "optimizer.use_distributed_optimizer=false",
]
OTHERS = {
    # That no gradient flows through the null part, neither to the layers nor to the head, shows in each tensor.
    "gft": ["objective.name=gft", "objective.beta=0.4"],
    "ddo": ["objective.name=ddo", "objective.beta=0.3", "objective.alpha=3.0"],
}


@pytest.mark.parametrize("objective", OTHERS)
def test_a_step_of_other_objectives_has_the_authors_loss_and_gradients(objective, tmp_path_factory):
    cases = {
        ranks: {
            layout: {"overrides": [*TINY, *overrides], "is_filled_up": layout != "PP 2"}
            for layout, overrides in layouts.items()
        }
        for ranks, layouts in BY_RANKS.items()
    }
    common = [*STEP, *OTHERS[objective]]
    for name, (loss, gradient, where, _) in answers("steps", cases, tmp_path_factory, common=common).items():
        assert loss <= 1e-4, name
        assert gradient <= 1e-4, (name, where)
