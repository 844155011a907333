"""Two objectives that only this file knows, one on pairs and one of plain likelihood, with no other change anywhere.

Each is chosen from YAML, trained in ranks of their own, resumed, cached, gated, planned, studied and documented.
"""

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import megatron_cca
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.keys import PositiveFloat
from megatron_cca.lab.planner.candidates import SearchInputs
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.report import Report, yaml_of
from megatron_cca.lab.planner.search import search
from megatron_cca.lab.planner.workload import ImageShape, image_workload
from megatron_cca.lab.studies.checks import check_study
from megatron_cca.lab.studies.schedule import TaskFactory, make_schedule
from megatron_cca.lab.studies.study import open_study
from megatron_cca.objectives import OBJECTIVES, Objective, objective, register
from megatron_cca.training.checks import check_run
from megatron_cca.training.faults import Alarms
from megatron_cca.training.log_ratio_gate import LogRatioSpread, check_log_ratio
from megatron_cca.training.run_log import read_events, read_metrics
from tests.distributed.launch import run_workers, typed
from tests.distributed.test_layout_parity import LOSS_RTOL, NORM_RTOL, PP2, TP2, column, under
from tests.unit.test_docs import hook
from tests.unit.test_objectives import columns_of, random_pairs

PACKAGE = Path(megatron_cca.__file__).parent


@objective("squared_gap")
class SquaredGap(Objective):
    """The gap of the two log-ratios, drawn to a number, as in arXiv 2310.12036."""

    tau: PositiveFloat = 0.1
    """Draws the difference of the two log-ratios to 1 / (2 tau)."""

    contrasts = ("conditions",)
    reward_scale = "tau"
    against_collapse = "raise objective.tau ({tau:g})"
    without_contrast = "asks for a difference that there cannot be"

    def loss(self, pairs):
        positive, negative = pairs.log_ratios()
        return (positive - negative - 1 / (2 * self.tau)).square().mean()


@objective("row_likelihood")
class RowLikelihood(Objective):
    """Mean negative log-likelihood of a row."""

    is_plain_likelihood = True

    def loss(self, sequences):
        return -sequences.policy.mean()


@contextlib.contextmanager
def both_known():
    with mock.patch.dict(OBJECTIVES):
        for kind in (SquaredGap, RowLikelihood):
            register(kind)
        yield


@pytest.fixture(scope="module", autouse=True)
def known():
    with both_known():
        yield


def in_ranks(settings):
    """Call a worker of another file, in a rank that knows both objectives."""
    from tests.distributed import ranks

    with both_known():
        return ranks._function(settings["worker"])(settings)


def trained(settings):
    """Train as the program does, once for each list of overrides of one YAML file."""
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.loop import train
    from tests.distributed.ranks import split_anew

    with both_known():
        for overrides in settings["runs"]:
            config = load_config(settings["file"], overrides)
            check_run(config, torch.distributed.get_world_size())
            split_anew(config)
            train(config, open_data(config))


def worked(ranks, worker, folder, /, **settings):
    return run_workers(ranks, "test_new_objectives.in_ranks", {"worker": worker, **settings}, folder)


def configured(folder, data, name, **keys):
    """A YAML file of a run, whose objective is called ``name``."""
    common = [one.partition("=") for one in under(name) if not one.startswith("objective.")]
    tree = {"objective": {"name": name, **keys}, "data": {"path": str(data)}}
    for key, _, value in common:
        section, _, option = key.partition(".")
        tree.setdefault(section, {})[option] = yaml.safe_load(value)
    tree["optimizer"]["lr"] = 2e-4
    tree["logging"] = {"tensorboard": False}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / f"{name}.yaml")


def test_the_squared_gap_equals_its_formula_in_float64():
    pairs = random_pairs()
    columns = columns_of(pairs)
    rows = [
        ((policy_pos - reference_pos) - (policy_neg - reference_neg) - 1 / (2 * 0.3)) ** 2
        for policy_pos, policy_neg, reference_pos, reference_neg, _ in zip(*columns, strict=True)
    ]
    result = SquaredGap(tau=0.3)(pairs)
    assert result.loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-6)
    assert result.metrics.keys() == OBJECTIVES["cca"]()(pairs).metrics.keys()
    with pytest.raises(UserError, match=r"objective\.tau: must be greater than 0, found 0"):
        SquaredGap(tau=0)


NEW_FILE = """
from megatron_cca.objectives.base import objective
from megatron_cca.objectives.cca import CCA

@objective("heavier_cca")
class HeavierCCA(CCA):
    extra: float = 2.0
"""


def test_a_file_in_the_folder_is_all_that_it_takes(tmp_path):
    shutil.copytree(PACKAGE / "objectives", tmp_path / "megatron_cca" / "objectives")
    for name in ("__init__", "errors", "keys"):
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "megatron_cca")
    (tmp_path / "megatron_cca" / "objectives" / "heavier.py").write_text(NEW_FILE)
    script = "from megatron_cca.objectives import OBJECTIVES as o; print(*o, o['heavier_cca'](0.1, extra=3.0).extra)"
    done = typed(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    names = ["cca", "ddo", "dpo", "gft", "heavier_cca", "ipo", "kto", "nca", "next_token"]
    assert done.stdout.split() == [*names, "unlearning", "3.0"], done.stderr


def test_yaml_chooses_it_and_knows_its_keys(tmp_path, digit_shards):
    file = configured(tmp_path, digit_shards, "squared_gap", tau=0.2)
    assert load_config(file).objective == SquaredGap(tau=0.2)
    assert load_config(file, ["objective.tau=0.5", "objective.normalization=image"]).objective == SquaredGap(
        tau=0.5, normalization="image"
    )
    for override, message in (
        ("objective.beta=1", "objective.beta: squared_gap has no such key; it has tau, normalization"),
        ("objective.taw=1", "objective.taw: squared_gap has no such key; did you mean objective.tau?"),
        ("objective.tau=-1", "objective.tau: must be greater than 0, found -1"),
        ("objective.name=squared", "objective.name: must be gft, next_token, row_likelihood, cca, ddo, dpo, "),
    ):
        with pytest.raises(UserError) as error:
            load_config(file, [override])
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "keys"), [("squared_gap", {"tau": 0.2}), ("row_likelihood", {}), ("gft", {"beta": 0.4})]
)
def test_it_trains_and_a_resumed_run_equals_an_uninterrupted_one(name, keys, tmp_path, digit_shards):
    file = configured(tmp_path, digit_shards, name, **keys)
    whole, cut = (f"training.output_dir={tmp_path}/{run}" for run in ("whole", "cut"))
    runs = [[*PP2, whole, "training.train_iters=4"]]
    runs += [[*PP2, cut, f"training.train_iters={steps}"] for steps in (2, 4)]
    run_workers(2, "test_new_objectives.trained", {"file": file, "runs": runs}, tmp_path)
    expected, found = (read_metrics(tmp_path / run) for run in ("whole", "cut"))
    assert [event["event"] for event in read_events(tmp_path / "cut")].count("resumed") == 1
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert ("positive_log_ratio" in found[0]) == (name == "squared_gap")
    if name == "squared_gap":
        # Policy and reference are one model.
        assert found[0]["loss"] == pytest.approx((1 / (2 * 0.2)) ** 2, rel=1e-6)
    assert found[-1]["loss"] < found[0]["loss"]
    # Another objective in the same folder is another run.
    with pytest.raises(UserError, match=f"^objective.name: 'cca', but the run in .* was started with '{name}'"):
        check_run(load_config(file, [*PP2, cut, "objective.name=cca"]), 2)


@pytest.mark.parametrize("name", ["squared_gap", "row_likelihood"])
def test_every_layout_gives_the_same_numbers(name, tmp_path, digit_shards):
    # A square has twice the rounding of what is squared.
    common = [*under(name), f"data.path={digit_shards}", "optimizer.lr=2e-4"]
    one = worked(1, "traces", tmp_path, common=common, layouts={"one": []}, steps=3)["one"]
    for trace in worked(2, "traces", tmp_path, common=common, layouts={"TP 2": TP2, "PP 2": PP2}, steps=3).values():
        torch.testing.assert_close(column(trace, "loss"), column(one, "loss"), rtol=LOSS_RTOL, atol=0)
        torch.testing.assert_close(column(trace, "grad_norm"), column(one, "grad_norm"), rtol=NORM_RTOL, atol=0)


def test_its_reference_can_be_cached(tmp_path, digit_shards):
    common = [*under("squared_gap"), f"data.path={digit_shards}", "training.train_iters=3"]
    variants = {"resident": [], "cached": ["reference.strategy=cached"]}
    settings = {"common": common, "layouts": {"one": []}, "variants": variants, "cache": None, "steps": 3}
    found = worked(1, "reference_traces", tmp_path, folder=str(tmp_path), **settings)
    assert found["one, resident"] == found["one, cached"]
    assert found["one, resident"]["steps"][0]["worst"] == 0.0


def test_the_gate_of_step_0_and_the_alarm_name_its_scale():
    config = load_config(None, ["objective.name=squared_gap", "objective.tau=0.2", "reference.precision=bf16"])
    spread = LogRatioSpread(0.3, 0.4, 1.5, 512)
    with pytest.raises(UserError) as error:
        check_log_ratio(config, spread)
    assert "; tau x mean 0.06, tau x root mean square 0.1, only 0.05 allowed" in str(error.value)
    assert "closer, lower objective.tau, or, to go on all the same" in str(error.value)
    assert check_log_ratio(replace(config, objective=SquaredGap(tau=0.02)), spread).endswith(
        "tau x root mean square 0.01, 0.05 allowed"
    )
    alarms = Alarms(config)
    (line,) = (line for _ in range(10) for line in alarms.after({"loss": 1.0, "positive_log_ratio": -99.0}, 16.0))
    assert line.endswith("the road to collapse; raise objective.tau (0.2) or lower optimizer.lr (1e-05)")


@pytest.mark.parametrize(("name", "like"), [("squared_gap", "cca"), ("row_likelihood", "next_token")])
def test_it_is_planned_like_what_costs_the_same(name, like, tmp_path):
    images, cluster = ImageShape(8, 8, 8), Cluster(GPUS["h100-80gb"], 2, 8)
    keys = ["training.global_batch_size=8", "training.micro_batch_size=4"]
    mine, other = (load_config(None, [f"objective.name={one}", *keys]) for one in (name, like))
    if name == "squared_gap":
        mine = replace(mine, objective=SquaredGap(tau=0.7))
    inputs = SearchInputs(cluster, images, vary=("micro_batch", "reference"))
    plan, expected = search(mine, inputs, 5), search(other, inputs, 5)
    assert [one.step.total for one in plan.best] == [one.step.total for one in expected.best]
    assert [one.memory for one in plan.best] == [one.memory for one in expected.best]
    assert (plan.cached is None) == (name == "row_likelihood")
    report = Report(plan, mine, [])
    assert report.best.workload == image_workload(mine, images)
    (tmp_path / "plan.yaml").write_text(yaml_of(report))
    assert load_config(tmp_path / "plan.yaml").objective == mine.objective


STUDY = {
    "name": "new",
    "seeds": [1, 2],
    "tuning_seed": 7,
    "trials": 2,
    "samples": 100,
    "base": {"config": "row_likelihood.yaml"},
    "methods": {
        "control": {
            "config": "row_likelihood.yaml",
            "set": {"training.train_iters": 8},
            "tune": {"optimizer.lr": [0.001, 0.002]},
        },
        "squared_gap": {
            "config": "squared_gap.yaml",
            "set": {"training.train_iters": 3},
            "tune": {"objective.tau": [0.1, 0.2]},
            "sweep": {"objective.tau": [0.3, 0.4]},
        },
    },
    "plots": [{"kind": "comparison"}, {"kind": "against", "x": "objective.tau"}],
}


def studied(folder, digit_shards, **changes):
    for name in ("squared_gap", "row_likelihood"):
        configured(folder, digit_shards, name)
    methods = {name: {**method, **changes.get(name, {})} for name, method in STUDY["methods"].items()}
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "methods": methods}))
    study = open_study(folder / "study.yaml")
    check_study(study, 1)
    return study


def test_a_study_has_one_for_its_method_and_one_for_its_control(tmp_path, digit_shards):
    factory = TaskFactory(studied(tmp_path, digit_shards), tmp_path / "out")
    plan = make_schedule(factory, lambda task: {"status": "finished", "fid": 1.0})
    assert plan.chosen["squared_gap"] == {"objective.tau": 0.1}
    names = {task.folder.name.rpartition("-")[0] for task in plan.tasks}
    assert {"squared_gap", "row_likelihood"} <= names
    swept = [row.run.config.objective for row in plan.rows if row.method.name == "squared_gap"]
    assert swept == [SquaredGap(tau=0.1), SquaredGap(tau=0.3), SquaredGap(tau=0.4)]


def test_a_study_refuses_a_key_that_the_method_has_not_and_a_control_that_contrasts(tmp_path, digit_shards):
    with pytest.raises(
        UserError, match=r"methods\.squared_gap: objective\.beta: squared_gap has no such key; it has tau"
    ):
        studied(tmp_path, digit_shards, squared_gap={"sweep": {"objective.beta": [0.1]}})
    with pytest.raises(UserError, match="with objective next_token or row_likelihood, on its own"):
        studied(tmp_path, digit_shards, control={"config": "squared_gap.yaml"})


def test_the_configuration_reference_has_it():
    page = hook("configuration").page()
    assert "### squared_gap\n\nTwo objectives that only this file knows" in page
    about = "Draws the difference of the two log-ratios to 1 / (2 tau)."
    assert f"| `tau` | number > 0 | `0.1` | numbers | refused | {about} |" in page
