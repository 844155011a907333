"""The model that LlamaGen's weights are for, against a plain one: logits, logits while drawing, a CCA step."""

import pytest

from tests.distributed.launch import class_model_answers as answers
from tests.selection import Computed, mostly_full

TP2 = ["parallel.tensor_model_parallel_size=2"]
TP2_SP = [*TP2, "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
FULL = ["training.recompute_granularity=full"]
SELECTIVE = ["training.recompute_granularity=selective", "training.recompute_modules=[core_attn, mlp]"]
# So that the head's 128 rows lie on both of two ranks, and rows of no word behind them.
TINY = ["model.name=llamagen-tiny", "model.make_vocab_size_divisible_by=8"]
# Heads of 20 channels, five pairs for each axis, as the 3B model has 25.
ODD = [*TINY, "model.hidden_size=80", "model.ffn_hidden_size=112"]
BY_RANKS = {1: {"one process": []}, 2: {"TP 2": TP2, "TP 2 + SP": TP2_SP, "PP 2": PP2, "CP 2": CP2}}
MODELS = {"tiny": TINY, "odd": ODD}


def by_model(worker, cases, tmp_path_factory, **common):
    """Return answers by case; those of a model are computed together."""

    def compute(case):
        own = {
            ranks: {name: it for name, it in them.items() if same_model(name, case)} for ranks, them in cases.items()
        }
        return answers(worker, own, tmp_path_factory, **common)

    return Computed(compute)


def same_model(case, other):
    return case.partition(",")[0] == other.partition(",")[0]


def names(cases):
    """Return all cases as parameters; ``make test`` has those of the model with odd heads."""
    return mostly_full([name for own in cases.values() for name in own], lambda case: same_model(case, "odd"))


LOGITS = {
    ranks: {
        f"{model}, {layout}{', filled up' * is_filled_up}": {
            "overrides": [*keys, *overrides],
            "is_filled_up": is_filled_up,
        }
        for model, keys in MODELS.items()
        for layout, overrides in layouts.items()
        for is_filled_up in (False, True)
    }
    for ranks, layouts in BY_RANKS.items()
}


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    return by_model("whole_logits", LOGITS, tmp_path_factory)


@pytest.mark.parametrize("case", names(LOGITS))
def test_logits_are_the_plain_models(logits, case):
    difference, largest = logits[case]
    assert largest > 0.5
    assert difference <= 1e-5


CACHED = {
    ranks: {
        f"{model}, {layout}, {name}": {"overrides": [*keys, *overrides], "prompts": prompts}
        for model, keys in MODELS.items()
        for layout, overrides in layouts.items()
        if layout != "CP 2"
        for name, prompts in {"class alone": [1] * 4, "some codes, too": [3, 1, 2]}.items()
    }
    for ranks, layouts in BY_RANKS.items()
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return by_model("cached_logits", CACHED, tmp_path_factory)


@pytest.mark.parametrize("case", names(CACHED))
def test_logits_while_drawing_are_the_plain_models(cached, case):
    difference, largest = cached[case]
    assert largest > 0.5
    assert difference <= 1e-5


STEP = [
    *("objective.beta=0.1", "objective.negative_weight=30", "optimizer.clip_grad=0"),
    *("training.global_batch_size=8", "training.micro_batch_size=2", "optimizer.use_distributed_optimizer=false"),
]
STEPS = {
    ranks: {
        f"{model}, {layout}{how}": {
            "overrides": [*keys, *overrides, *more],
            "is_filled_up": is_filled_up,
        }
        for model, keys in MODELS.items()
        for layout, overrides in layouts.items()
        for how, more, is_filled_up in (
            ("", [], False),
            (", full recomputation", FULL, False),
            (", selective recomputation, filled up", SELECTIVE, True),
        )
    }
    for ranks, layouts in BY_RANKS.items()
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return by_model("steps", STEPS, tmp_path_factory, common=STEP)


@pytest.mark.parametrize("case", names(STEPS))
def test_a_cca_step_has_the_authors_loss_and_gradients(steps, case):
    loss, gradient, where, margin = steps[case]
    assert abs(margin) > 0.1
    assert loss <= 1e-4
    assert gradient <= 1e-4, where


WITHOUT_OBJECTIVE = [key for key in STEP if not key.startswith("objective.")]
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
            if layout != "CP 2"
        }
        for ranks, layouts in BY_RANKS.items()
    }
    common = [*WITHOUT_OBJECTIVE, *OTHERS[objective]]
    for name, (loss, gradient, where, _) in answers("steps", cases, tmp_path_factory, common=common).items():
        assert loss <= 1e-4, name
        assert gradient <= 1e-4, (name, where)


def test_the_log_ratio_of_step_0_is_exactly_0(tmp_path_factory):
    large = ["model.init_method_std=0.2", "optimizer.lr=1e-2"]
    kinds = {"fp32": [], "bf16, full recomputation": ["training.precision=bf16", *FULL]}
    cases = {
        ranks: {
            f"{layout}, {kind}": [*ODD, *large, *overrides, *more]
            for layout, overrides in own.items()
            for kind, more in kinds.items()
        }
        for ranks, own in BY_RANKS.items()
    }
    for name, (first, second) in answers("first_log_ratios", cases, tmp_path_factory, common=STEP).items():
        assert first == 0.0 < second, name
