"""What runs of every model family pass: references, adapters, weights in FP8, and what the planner says is held.

``tests/families.py`` has the families, and what their models pass.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from megatron_cca.checkpoint.huggingface import export_checkpoint
from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models import family_of
from tests.distributed.launch import run_workers
from tests.distributed.test_dry_run import ALL, BF16, TWO, assert_held
from tests.families import FAMILIES, LAYOUTS, OFTEN, RUNS
from tests.references.family import STEP, in_megatron, tensors_in
from tests.references.merged import merged_by_hand, opened, whole
from tests.selection import Computed, mostly_full

STEPS = 3
SHORT = ["training.global_batch_size=4", "training.micro_batch_size=2"]
VALIDATION = ["validation.interval=9", "validation.fraction=0.3", "validation.iters=2"]
OFFLOAD, CACHED = ["reference.strategy=offload"], ["reference.strategy=cached"]
SHARED = ["reference.strategy=shared"]
LORA = ["lora.dim=4", "optimizer.lr=2e-2"]
FP8 = ["reference.fp8_param=true"]
OTHER = ["reference.precision=bf16"]
VARIANTS = {"resident": [], "offload": OFFLOAD, "cached": CACHED}
ADAPTED = {f"LoRA {name}": [*LORA, *overrides] for name, overrides in {**VARIANTS, "shared": SHARED}.items()}
LOWER = {
    "FP8 resident": FP8,
    "FP8 offload": [*FP8, *OFFLOAD],
    "FP8 cached": [*FP8, *CACHED],
    "bf16 resident": OTHER,
    "bf16 offload": [*OTHER, *OFFLOAD],
    "bf16 cached": [*OTHER, *CACHED],
    "all in bf16 resident": BF16,
    "all in bf16 offload": [*BF16, *OFFLOAD],
}
ALONE = {**VARIANTS, **ADAPTED, **LOWER}
TOGETHER = {**VARIANTS, **{name: ADAPTED[name] for name in ("LoRA resident", "LoRA shared")}}
EXACT = ["resident", "offload", "cached", *ADAPTED, "all in bf16 resident", "all in bf16 offload"]


def start_of(made, family, layout, output):
    """Return the overrides of a run from a family's random weights on its own data."""
    folder = made[family, FAMILIES[family].first_form].folder
    return [
        *(*FAMILIES[family].model_keys, *STEP, *LAYOUTS[layout][1], f"data.path={folder}/shards"),
        *(f"training.pretrained_checkpoint={folder}/policy", f"training.output_dir={output}", "optimizer.lr=1e-2"),
    ]


def variants_of(layout):
    return ALONE if layout == "one process" else TOGETHER


@pytest.fixture(scope="module")
def traces(made, tmp_path_factory):
    """By family and layout: those of a layout are computed together, by variant."""

    def compute(case):
        family, layout = case
        folder = tmp_path_factory.mktemp("traces")
        common = [*start_of(made, family, layout, folder / "run"), *SHORT, *VALIDATION]
        settings = {"common": common, "layouts": {"": []}, "variants": variants_of(layout), "steps": STEPS}
        settings |= {"folder": str(folder), "cache": None}
        found = run_workers(LAYOUTS[layout][0], "reference_traces", settings, folder)
        return {case: {name.removeprefix(", "): answer for name, answer in found.items()}}

    return Computed(compute)


CASES = [(*run, variant) for run in RUNS for variant in variants_of(run[1])]
# What ``make test`` has.
FEW = {(family, "TP 2 + SP") for family in OFTEN} | {("emu3", "one process"), ("var", "one process")}


@pytest.mark.parametrize(("family", "layout", "variant"), mostly_full(CASES, lambda case: case[:2] in FEW))
def test_strategies_agree_to_the_last_bit(traces, family, layout, variant):
    kind = variant.removesuffix("offload").removesuffix("cached").removesuffix("shared").removesuffix("resident")
    found = traces[family, layout]
    assert found[variant] == found[f"{kind}resident"]


@pytest.mark.parametrize(("family", "layout", "variant"), mostly_full(CASES, lambda case: case[:2] in FEW))
def test_the_log_ratio_of_step_0_is_0_where_weights_and_precision_are_the_same(traces, family, layout, variant):
    steps = traces[family, layout][variant]["steps"]
    assert (steps[0]["worst"] == 0.0) == (variant in EXACT)
    # Weights in FP8 or bf16 are near, not equal.
    assert steps[0]["worst"] < 5.0
    assert steps[1]["worst"] > 0.0


@pytest.mark.parametrize(("family", "layout"), mostly_full(RUNS, FEW))
def test_the_log_ratio_of_a_validation_after_training_is_not_0(traces, family, layout):
    assert traces[family, layout]["cached"]["validation"]["positive_log_ratio"] != 0.0


ADAPTED_RUNS = [(family, layout) for family, layout in RUNS if layout in ("one process", "TP 2 + SP", "PP 2", "DP 2")]
PROJECTIONS = {"linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"}


@pytest.mark.parametrize(
    ("family", "layout"), mostly_full(ADAPTED_RUNS, lambda case: case[0] in OFTEN and case[1] == "TP 2 + SP")
)
def test_adapters_start_as_nothing_and_are_merged_on_export(made, family, layout, tmp_path):
    run, start = tmp_path / "run", made[family, FAMILIES[family].first_form].folder / "policy"
    overrides = [*start_of(made, family, layout, run), "lora.dim=4", "lora.alpha=8", *SHARED]
    settings = {"overrides": overrides, "steps": 2, "save": True}
    rows = run_workers(LAYOUTS[layout][0], "checkpoint_workers.resume", settings, tmp_path / "job")["rows"]
    assert rows[0]["worst"] == 0.0 < rows[1]["worst"]
    merged, before = merged_by_hand(start, run, scale=2), opened(start)
    changed = {name for name, value in merged.items() if not same_words(value, whole(before, name))}
    assert {name.partition("layers.")[2].partition(".")[2] for name in changed} == PROJECTIONS
    suffix = "" if is_folder(family) else ".pt"
    back = export_checkpoint(run, tmp_path / f"back{suffix}", progress_bar=False)
    for name, value in in_megatron(FAMILIES[family], tensors_in(back)).items():
        layer = re.search(r"layers\.(\d+)\.", name)
        expected = merged[name] if layer is None else merged[name.replace(layer[0], "layers.")][int(layer[1])]
        assert torch.equal(value.float(), expected), name


def same_words(one, other):
    """Whether tensors are the same but for the number of rows that pad the vocabulary."""
    rows = min(len(one), len(other))
    return torch.equal(one[:rows], other[:rows])


def is_folder(family):
    return family_of(load_config(None, FAMILIES[family].model_keys).model).huggingface is not None


@pytest.mark.parametrize("family", mostly_full(FAMILIES, OFTEN))
def test_weights_in_fp8_give_what_they_round_to(made, family, tmp_path):
    folder = made[family, FAMILIES[family].first_form].folder
    settings = {"answers": str(folder / "answers.pt"), "checkpoint": str(folder / "policy")}
    settings["overrides"] = [*FAMILIES[family].model_keys, *BF16]
    found = run_workers(1, "family_workers.fp8_weights", settings, tmp_path)
    assert found["fp8"] == found["rounded"] != found["bf16"]
    near = torch.tensor(found["fp8"]) - torch.tensor(found["bf16"])
    assert near.abs().max() < 0.5
    # One byte instead of two, and a scale of four for each row.
    assert found["bytes"] == found["expected_bytes"]
    assert found["bytes"] < 0.7 * found["bytes_before"]


HELD_BY = {
    "one process": ("one process", []),
    "TP 2 + SP": ("TP 2 + SP", []),
    "PP 2": ("PP 2", []),
    "fp8 weights": ("one process", [*BF16, *FP8]),
}
PLANNED = [
    (family, case, microbatches)
    for family, case, microbatches in itertools.product(OFTEN, HELD_BY, (TWO, ALL))
    if HELD_BY[case][0] not in FAMILIES[family].cannot
]


def is_planned_often(case):
    which = {("emu3", "TP 2 + SP"), ("llamagen, odd heads", "PP 2"), ("var", "TP 2 + SP")}
    return case[:2] in which and case[2] is TWO


@pytest.mark.parametrize(("family", "case", "microbatches"), mostly_full(PLANNED, is_planned_often))
def test_real_ranks_hold_what_is_predicted_and_what_the_dry_run_counts(family, case, microbatches, tmp_path):
    layout, more = HELD_BY[case]
    ranks, split = LAYOUTS[layout]
    height, width = FAMILIES[family].grid
    assert_held(
        [*FAMILIES[family].model_keys, *split, *more], ranks, Workload(24, height * width), microbatches, tmp_path
    )
