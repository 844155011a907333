"""What every model family passes, through the same code: a new one is one declaration here, and nothing else.

The oracle is transformers, or a plain PyTorch model of ``tests/references``. Everything starts from random public
files, which the family's importer reads. fp32 unless said otherwise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_cca.checkpoint.huggingface import compare_tensors, export_checkpoint, import_checkpoint, open_both
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import FAMILIES as ALL_FAMILIES
from megatron_cca.models.architecture import check_layout
from megatron_cca.objectives import OBJECTIVES
from tests.distributed.launch import run_workers
from tests.references import emu3_5, emu3_files, janus, llamagen, llamagen_files, var_files
from tests.references.family import STEP, Family, answers, answers_to_a_step, shards, step_of, tensors_in
from tests.references.huggingface import assert_same_bits
from tests.selection import Computed, mostly_full

TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
LAYOUTS = {
    "one process": (1, []),
    "TP 2": (2, TP2),
    "TP 2 + SP": (2, [*TP2, "parallel.sequence_parallel=true"]),
    "PP 2": (2, PP2),
    "PP 2 x VPP 2": (2, [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "CP 2": (2, ["parallel.context_parallel_size=2"]),
    "DP 2": (2, []),
    "TP 2 x PP 2": (4, [*TP2, *PP2]),
}


def llamagen_family(sizes, **more):
    return Family(
        preset="llamagen-tiny",
        forms={form: partial(llamagen_files.write, sizes, form) for form in llamagen_files.FORMS},
        oracle=partial(llamagen_files.oracle, sizes),
        not_exported=llamagen_files.NOT_EXPORTED,
        **more,
    )


# A family may stand here several times, with other sizes.
FAMILIES = {
    "emu3": Family(
        preset="emu3-tiny",
        forms={form: partial(emu3_files.write, form) for form in emu3_files.FORMS},
        oracle=emu3_files.oracle,
    ),
    "emu3_5": Family(
        preset="emu3_5-tiny",
        forms={"original": emu3_5.write},
        oracle=emu3_5.oracle,
    ),
    "janus": Family(
        preset="janus-tiny",
        forms={form: partial(janus.write, form) for form in janus.FORMS[:2]},
        oracle=janus.oracle,
    ),
    "llamagen": llamagen_family(llamagen.Sizes(4, 64, 4, grid=4, codebook=128, classes=10, ffn=176)),
    # Heads of 20 channels, five pairs for each axis, as the 3B model has 25.
    "llamagen, odd heads": llamagen_family(
        llamagen.Sizes(4, 80, 4, grid=4, codebook=128, classes=10, ffn=112),
        overrides=("model.hidden_size=80", "model.ffn_hidden_size=112"),
        import_options={"sizes": {"num_attention_heads": 4, "max_position_embeddings": 17}},
    ),
    "var": Family(
        preset="var-tiny",
        forms={form: partial(var_files.write, form) for form in var_files.FORMS},
        oracle=var_files.oracle,
        cannot=frozenset({"PP 2", "PP 2 x VPP 2", "CP 2", "TP 2 x PP 2"}),
    ),
}
# What ``make test`` has: one size of a family, and one of each kind of layout.
OFTEN = [name for name in FAMILIES if name != "llamagen"]
KINDS_OF_LAYOUT = ("one process", "TP 2", "TP 2 + SP", "PP 2", "CP 2")


class Made(NamedTuple):
    """What a family's tests begin with: a folder of imports, data and answers, and two models as public files."""

    folder: Path
    policy: Path
    other: Path


def layouts_of(family):
    return [layout for layout in LAYOUTS if layout not in FAMILIES[family].cannot]


def test_every_family_is_tried():
    assert {family.preset for family in FAMILIES.values()} == {f"{name}-tiny" for name in ALL_FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_a_family_cannot_have_is_refused(family, layout):
    own = FAMILIES[family]
    config = load_config(None, [*own.model_keys, *LAYOUTS[layout][1]])
    try:
        check_layout(own.architecture, config.model, config.parallel)
        is_refused = False
    except UserError:
        is_refused = True
    assert is_refused == (layout in own.cannot)


def make(case, folder):
    """Write a family's random models ``policy`` and ``other`` in a form, their imports, data, what the oracle says."""
    family, form, written = FAMILIES[case[0]], case[1], {}
    for seed, name in enumerate(("policy", "other")):
        written[name] = family.forms[form](folder / f"public {name}", seed, torch.float32)
        import_checkpoint(written[name], folder / name, progress_bar=False, **family.import_options)
    data = shards(family, folder / "shards")
    torch.save(answers(family, written["policy"], data), folder / "answers.pt")
    return {case: Made(folder, **written)}


# Forms differ in their import alone.
FORWARDS = [
    (name, form, layout)
    for name, family in FAMILIES.items()
    for form in family.forms
    for layout in layouts_of(name)
    if form == family.first_form or layout in ("one process", "TP 2 + SP")
]


def is_in_make_test(case):
    """The first form on every kind of layout, and the one that has an oracle of its own."""
    family, form, layout = case
    if form == FAMILIES[family].first_form:
        return family in OFTEN and layout in KINDS_OF_LAYOUT
    return case == ("emu3", "transformers", "one process")


@pytest.fixture(scope="module")
def forwards(made, tmp_path_factory):
    def compute(case):
        family, form, layout = case
        folder, (ranks, split) = made[family, form].folder, LAYOUTS[layout]
        settings = {"answers": str(folder / "answers.pt"), "checkpoint": str(folder / "policy")}
        settings["overrides"] = [*FAMILIES[family].model_keys, *split]
        return {case: run_workers(ranks, "family_workers.forwards", settings, tmp_path_factory.mktemp("forwards"))}

    return Computed(compute)


@pytest.mark.parametrize(("family", "form", "layout"), mostly_full(FORWARDS, is_in_make_test))
def test_logits_are_the_oracles_also_while_drawing(forwards, family, form, layout):
    found = forwards[family, form, layout]
    assert found["largest"] > 0.5
    assert found["logits"] <= 1e-5
    assert found["cached"] <= 1e-5


DRAWN = [case for case in FORWARDS if case[2] != "CP 2"]


@pytest.mark.parametrize(("family", "form", "layout"), mostly_full(DRAWN, is_in_make_test))
def test_the_likeliest_codes_are_the_oracles_without_a_cache(made, forwards, family, form, layout):
    wanted = torch.load(made[family, form].folder / "answers.pt", weights_only=False)["greedy"]
    found = forwards[family, form, layout]["greedy"]
    assert found == {str(scale): codes for scale, codes in wanted.items()}
    plain, guided = wanted.values()
    assert plain != guided
    assert len(set(plain[0])) > 1


@pytest.mark.parametrize(("family", "form", "layout"), mostly_full(DRAWN, is_in_make_test))
def test_the_same_seeds_draw_the_same_codes_on_every_layout(forwards, family, form, layout):
    found = forwards[family, form, layout]
    assert found["drawn"] == forwards[family, form, "one process"]["drawn"]
    drawn, guided, likeliest = found["drawn"]["0.0"], found["drawn"]["1.5"], found["greedy"]["0.0"]
    assert drawn != guided
    # The likeliest ones are of a larger image where a family has any: the first row begins alike.
    assert [codes[:4] for codes in drawn] != [codes[:4] for codes in likeliest]


FULL = ["training.recompute_granularity=full"]
GROUPS = [*FULL, "training.recompute_num_layers=2"]
SELECTIVE = ["training.recompute_granularity=selective", "training.recompute_modules=[core_attn, mlp]"]
FILLED_UP = ["data.pad_to_multiple_of=12"]
# An objective, and how its step is computed.
WAYS = {
    "cca": ("cca", []),
    "cca, full recomputation": ("cca", FULL),
    "cca, in groups": ("cca", GROUPS),
    "cca, of some": ("cca", [*GROUPS, "training.recompute_method=block"]),
    "cca, selective, filled up": ("cca", [*SELECTIVE, *FILLED_UP]),
    **{name: (name, FILLED_UP) for name in OBJECTIVES if name != "cca"},
}
# On the other layouts a step of CCA shows what is a family's own.
EVERY_WAY = ("one process", "TP 2 + SP", "PP 2")
STEPS = [
    (family, layout, way)
    for family in FAMILIES
    for layout in layouts_of(family)
    for way in WAYS
    if way == "cca" or (layout in EVERY_WAY and family in OFTEN)
]


def is_one_of_each_way(case):
    family, layout, way = case
    often = {"one process": WAYS, "TP 2 + SP": ("cca", "cca, selective, filled up", "gft", "ddo")}
    return family in OFTEN and layout in KINDS_OF_LAYOUT and way in often.get(layout, ("cca",))


@pytest.fixture(scope="module")
def steps_of_oracles(made, tmp_path_factory):
    """By family and objective: a step's keys, and the file of what the oracle says of it."""

    def compute(case):
        family, (folder, policy, other) = FAMILIES[case[0]], made[case[0], FAMILIES[case[0]].first_form]
        keys, path = step_of(family, folder / "shards", case[1]), tmp_path_factory.mktemp("oracle") / "step.pt"
        torch.save(answers_to_a_step(family, keys, policy, other), path)
        keys += ["optimizer.clip_grad=1e9", "optimizer.use_distributed_optimizer=false"]
        keys += [f"training.pretrained_checkpoint={folder}/policy", f"training.output_dir={folder}/nowhere"]
        if load_config(None, keys).objective.needs_reference:
            keys.append(f"reference.checkpoint={folder}/other")
        return {case: (keys, path)}

    return Computed(compute)


@pytest.fixture(scope="module")
def steps(steps_of_oracles, tmp_path_factory):
    """By family, layout and way; all ways of a layout that ``make test`` has are computed together."""

    def compute(case):
        family, layout, _ = case
        ranks, split = LAYOUTS[layout]
        together = [one for one in STEPS if one[:2] == case[:2] and is_one_of_each_way(one) == is_one_of_each_way(case)]
        ways = {}
        for *_, way in together:
            objective, more = WAYS[way]
            keys, path = steps_of_oracles[family, objective]
            ways[way] = {"overrides": [*keys, *split, *more], "answers": str(path)}
        found = run_workers(ranks, "family_workers.steps", {"ways": ways}, tmp_path_factory.mktemp("steps"))
        return {(family, layout, way): found[way] for way in ways}

    return Computed(compute)


@pytest.mark.parametrize(("family", "layout", "way"), mostly_full(STEPS, is_one_of_each_way))
def test_a_step_has_the_oracles_loss_and_gradients(steps_of_oracles, steps, family, layout, way):
    objective, _ = WAYS[way]
    wanted = torch.load(steps_of_oracles[family, objective][1], weights_only=False)
    found, alone = steps[family, layout, way], steps[family, "one process", objective]
    assert abs(found.get("margin", 1.0)) > 0.1
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4)
    assert found["gradient"] <= 1e-4, found["where"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


KINDS = {
    "fp32": [],
    "bf16, full recomputation": ["training.precision=bf16", *FULL],
    "offloaded reference": ["reference.strategy=offload"],
    "adapters": ["reference.strategy=shared", "lora.dim=4"],
}


# One of each kind of layout.
RUNS = [
    (family, layout)
    for family in OFTEN
    for layout in ("one process", "TP 2 + SP", "PP 2", "CP 2", "DP 2")
    if layout not in FAMILIES[family].cannot
]
FEW_LAYOUTS = ("one process", "TP 2 + SP")


def is_on_few_layouts(case):
    return case[0] in OFTEN and case[1] in FEW_LAYOUTS


@pytest.mark.parametrize(("family", "layout"), mostly_full(RUNS, is_on_few_layouts))
def test_the_log_ratio_of_step_0_is_exactly_0(made, family, layout, tmp_path):
    folder, (ranks, split) = made[family, FAMILIES[family].first_form].folder, LAYOUTS[layout]
    overrides = [
        *(*FAMILIES[family].model_keys, *STEP, *split, f"data.path={folder}/shards", "optimizer.lr=1e-2"),
        *(f"training.pretrained_checkpoint={folder}/policy", f"training.output_dir={tmp_path}/run"),
    ]
    settings = {"overrides": overrides, "kinds": KINDS}
    for kind, (first, second) in run_workers(ranks, "family_workers.first_log_ratios", settings, tmp_path).items():
        assert first == 0.0 < second, kind


FILES = [
    (name, form, dtype)
    for name, family in FAMILIES.items()
    for form in family.forms
    for dtype in ("float32", "bfloat16")
]


def imported(case, folder):
    name, form, dtype = case
    public = FAMILIES[name].forms[form](folder / "public", 0, getattr(torch, dtype))
    import_checkpoint(public, folder / "imported", progress_bar=False, **FAMILIES[name].import_options)
    return public, folder / "imported"


def assert_exported_as(public, checkpoint, family):
    back = export_checkpoint(checkpoint, checkpoint.parent / f"back{public.suffix}", progress_bar=False)
    assert_same_bits(tensors_in(back), tensors_in(public, family.not_exported))
    for path in public.iterdir() if public.is_dir() else ():
        assert path.suffix == ".safetensors" or (back / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("name", "form", "dtype"), FILES)
def test_there_and_back_is_bit_for_bit(name, form, dtype, tmp_path):
    public, checkpoint = imported((name, form, dtype), tmp_path)
    assert compare_tensors(*open_both(public, checkpoint), progress_bar=False).identical
    assert_exported_as(public, checkpoint, FAMILIES[name])


# From layout to layout, where a family has them.
WAY_ROUND = ("TP 2 x PP 2", "PP 2 x VPP 2", "TP 2", "one process")


FIRST_FORMS = [(name, form, dtype) for name, form, dtype in FILES if form == FAMILIES[name].first_form]


def is_often_in_bfloat16(case):
    return case[0] in OFTEN and case[2] == "bfloat16"


@pytest.mark.parametrize(("name", "form", "dtype"), mostly_full(FIRST_FORMS, is_often_in_bfloat16))
def test_there_through_other_layouts_and_back_is_bit_for_bit(name, form, dtype, tmp_path):
    public, checkpoint = imported((name, form, dtype), tmp_path)
    for layout in WAY_ROUND:
        if layout not in FAMILIES[name].cannot:
            ranks, split = LAYOUTS[layout]
            settings = {"checkpoint": str(checkpoint), "output": str(tmp_path / layout)}
            settings["overrides"] = [*split, f"training.precision={'fp32' if dtype == 'float32' else 'bf16'}"]
            checkpoint = tmp_path / layout
            checkpoint.mkdir()
            run_workers(ranks, "logits_workers.resaved", settings, tmp_path / f"answers {layout}")
    assert_exported_as(public, checkpoint, FAMILIES[name])
