"""Studies: what their files may say, which tasks follow, how settings are chosen, and what tables and plots say."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.layout import sealed
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError
from megatron_cca.lab.studies.checks import check_study
from megatron_cca.lab.studies.plots import plot
from megatron_cca.lab.studies.results import Statistic, as_json, collect, over_seeds, table
from megatron_cca.lab.studies.running import TaskBar, TaskQueue
from megatron_cca.lab.studies.schedule import TaskFactory, best, digest, file_stamp, make_schedule, training_contents
from megatron_cca.lab.studies.study import grid, open_study, passes_of_run
from megatron_cca.lab.studies.tasks import Sampling, Training, write_outcome
from megatron_cca.objectives import OBJECTIVES

GONE = "(gone)"
LR = "optimizer.lr"
BETA, LAMBDA = "objective.beta", "objective.negative_weight"
SCALE = "sampling.guidance_scale"
RUN = {"training": {"train_iters": 3, "micro_batch_size": 8, "global_batch_size": 8}}
CONFIGS = {
    "base": {"objective": {"name": "next_token"}, **RUN},
    "control": {"objective": {"name": "next_token"}, "training": {**RUN["training"], "train_iters": 8}},
    "cca": {"objective": {"name": "cca", "beta": 0.1}, **RUN},
}
STUDY = {
    "name": "small",
    "title": "A small study",
    "seeds": [1, 2, 3],
    "tuning_seed": 7,
    "trials": 2,
    "samples": 100,
    "base": {"config": "base.yaml"},
    "methods": {
        "cfg": {"label": "base + CFG", "tune": {SCALE: [0.5, 1.0]}, "sweep": {SCALE: [0.0, 0.5, 1.0]}},
        "control": {"config": "control.yaml", "tune": {LR: [0.001, 0.002]}},
        "cca": {
            "config": "cca.yaml",
            "label": "CCA",
            "tune": {LR: [0.001, 0.002]},
            "sweep": {BETA: [0.1, 0.3], LAMBDA: [1.0, 1000.0]},
        },
    },
    "plots": [
        {"kind": "frontier"},
        {"kind": "against", "x": SCALE},
        {"kind": "heatmap", "x": LAMBDA, "y": BETA},
        {"kind": "comparison"},
    ],
}


def written(folder, **changes):
    """A study's file with keys such as ``methods/cca/tune`` changed; GONE takes one out."""
    tree = deepcopy(STUDY)
    for path, value in changes.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place[parent]
        if value == GONE:
            del place[name]
        else:
            place[name] = value
    for name, config in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"path": "digits"}, **config}))
    (folder / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "study.yaml"


def opened(folder, **changes):
    study = open_study(written(folder, **changes))
    check_study(study, 1)
    return study


def numbers(fid, score=8.0, accuracy=0.75):
    metrics = {"accuracy": accuracy, "fid": fid, "inception_score": score, "precision": 0.5, "recall": 0.25}
    return {"status": "finished", "title": "", "seconds": 1.0, **metrics}


def settled(folder, outcome_of_sampling, outcome_of_training=None, **changes):
    """A queue on which all tasks have ended as the functions say."""
    queue = TaskQueue(TaskFactory(opened(folder, **changes), folder / "out"))
    trained = outcome_of_training or (lambda task: {"status": "finished", "title": "", "seconds": 1.0})
    while ready := queue.ready():
        for task in ready:
            write_outcome(task, trained(task) if isinstance(task, Training) else outcome_of_sampling(task))
    return queue


def results_of(queue):
    return collect(queue.factory.study, queue.schedule, queue.outcome)


def test_the_file_is_read(tmp_path):
    study = opened(tmp_path)
    assert list(study.methods) == ["base", "cfg", "control", "cca"]
    assert study.methods["cca"].trials == [{LR: 0.001}, {LR: 0.002}]
    assert study.methods["cca"].sweep[:2] == [{BETA: 0.1, LAMBDA: 1.0}, {BETA: 0.1, LAMBDA: 1000.0}]
    run = study.methods["cca"].configured({LR: 0.002, LAMBDA: 10.0, SCALE: 0.5})
    assert (run.config.optimizer.lr, run.config.objective.negative_weight) == (0.002, 10.0)
    assert (run.sampling.guidance_scale, run.sampling.forwards_per_token) == (0.5, 2)
    assert study.methods["cfg"].configured({SCALE: 0.5}).config is None


def test_set_reaches_every_run_and_a_methods_own_comes_last(tmp_path):
    own = {**STUDY["methods"]["cca"], "set": {"optimizer.weight_decay": 0.2, "sampling.top_k": 5}}
    study = opened(tmp_path, **{"set": {"optimizer.weight_decay": 0.1}, "methods/cca": own})
    decays = [one.config.optimizer.weight_decay for one in (study.methods["control"], study.methods["cca"])]
    assert (study.base.optimizer.weight_decay, *decays) == (0.1, 0.1, 0.2)
    assert [study.methods[name].sampling.top_k for name in ("base", "cca")] == [0, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample": 5}, "study.yaml: sample: unknown key; did you mean samples?"),
        ({"methods/cca/tun": {}}, "methods.cca.tun: unknown key; did you mean methods.cca.tune?"),
        ({"methods/Big one": {}}, "methods.Big one: must be of a-z, 0-9, _ and -, found 'Big one'"),
        ({"sampling": {"hight": 4}}, "sampling.hight: unknown key; did you mean sampling.height?"),
        ({"seeds": GONE}, "seeds: is missing"),
        ({"seeds": [1]}, "seeds: must be a list of 2 or more, found [1]"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has one twice"),
        ({"seeds": [1, 7]}, "tuning_seed: 7 is one of seeds"),
        ({"trials": 3}, "methods.cfg.tune: 2 settings, but trials is 3"),
        ({"methods/cca/tune": {}}, "methods.cca.tune: 1 settings, but trials is 2"),
        ({"methods/cca/tune": {LR: [0.001, 0.001]}}, "methods.cca.tune: a value is given twice"),
        ({"methods/cca/sweep": {BETA: []}}, "methods.cca.sweep.objective.beta: must be a list of 1 or more"),
        ({"methods/control": GONE}, "methods.control: every study needs it"),
        ({"metrics": ["fid"]}, "plots.0: kind: frontier draws inception_score; add it to metrics"),
        ({"samples": 64}, "samples: 64 images are too few for FID on 64 features; it wants 65 or more"),
        ({"tuning_samples": 3}, "tuning_samples: 3 images are too few for FID"),
        ({"metrics": ["fid", "kid"]}, "samples: 100 images are too few for KID with kid_subset_size 1000"),
        ({"extractor": "none.py:f"}, "extractor: the file none.py does not exist"),
        ({"classifier": "none.py:f"}, "classifier: the file none.py does not exist"),
        ({"sampling": {"height": 90, "width": 90}}, "sampling: a grid of 90 x 90 takes "),
        ({"methods/control/config": "cca.yaml"}, "methods.control: every study needs it"),
        ({"methods/control/config": None}, "methods.control: every study needs it"),
        ({"methods/cca/config": None}, "methods.cca: optimizer.lr: nothing is trained here"),
        ({"methods/base": {}}, "methods.base: every study has the base"),
        ({"methods/cca/config": "no.yaml"}, "methods.cca.config: --config"),
        ({"methods/cca/set": {"objective.name": "dpo"}}, "methods.cca: objective.negative_weight: dpo has no such key"),
        ({"methods/control/set": {BETA: 0.1}}, "methods.control.set: objective.beta: next_token has no such key"),
        ({"methods/cca/tune": {"optimizer.lrr": [1, 2]}}, "methods.cca: optimizer.lrr: unknown key; did you mean"),
        ({"methods/cca/tune": {LR: [0.1, "much"]}}, "methods.cca: optimizer.lr: input should be a valid number"),
        ({"methods/cca/tune": {"lr": [0.1, 0.2]}}, "methods.cca: lr: expected section.key, such as optimizer.lr"),
        ({"methods/cca/tune": {"training.seed": [5, 6]}}, "methods.cca: training.seed: is the study's own to set"),
        (
            {"methods/cfg/tune": {"sampling.scale": [1, 2]}},
            "methods.cfg: sampling.scale: unknown key; known here: height",
        ),
        ({"methods/cfg/tune": {SCALE: [1, -2]}}, "sampling.guidance_scale: must be 0 or more"),
        (
            {"methods/cfg/set": {"sampling.contrastive_top_k": 5}},
            "sampling.contrastive_top_k: does not go with a guidance",
        ),
        (
            {"methods/cca/set": {"training.train_iters": 4}},
            "methods.cca: costs 4 steps x 8 samples x 8 passes = 256, methods.control 8 steps x 8 samples x 3 passes = "
            "192; all training must cost the same within 5%: 3 steps would",
        ),
        ({"methods/cca/sweep": {"training.train_iters": [3, 6]}}, "methods.cca: costs 6 steps x 8 samples"),
        ({"methods/cca/set": {"training.micro_batch_size": 5}}, "methods.cca: training.global_batch_size: 8 is not a"),
        ({"methods/cca/set": {"model.hidden_size": 96}}, "methods.cca: model: hidden_size is 96, the base's 64"),
        ({"methods/cca/set": {"parallel.context_parallel_size": 2}}, "does not divide the 1 processes of this job"),
        ({"base": {"config": "base.yaml", "checkpoint": "runs/x"}}, "base: needs either a config to pretrain it"),
        ({"base": {"checkpoint": "runs/nothing"}}, "no checkpoint at runs/nothing"),
        ({"base": {"config": "base.yaml", "set": {"trainin.seed": 3}}}, "base.set: trainin: unknown key"),
        ({"metrics": ["precision"]}, "metrics: fid is missing"),
        ({"tune_by": "accuracy", "classifier": None}, "tune_by: accuracy needs a classifier"),
        ({"tune_by": "inception_score", "metrics": ["fid"]}, "tune_by: inception_score is not among metrics"),
        ({"classifier": "someone"}, "classifier: --classifier: 'someone' is neither digits nor FILE.py:FUNCTION"),
        ({"extractor": "inception"}, "extractor: --extractor: inception needs its weights"),
        ({"reference": "no/where"}, "reference: no/where: does not exist"),
        ({"prompts": "no.txt"}, "prompts: no.txt: No such file or directory"),
        ({"plots": []}, "plots: is empty"),
        (
            {"plots": [{"kind": "frontier"}, {"kind": "frontier"}]},
            "plots.1.file: frontier.png is another plot's already",
        ),
        ({"plots": [{"kind": "against"}]}, "plots.0: x: is missing; give a key of a sweep"),
        ({"plots": [{"kind": "against", "x": LR}]}, "plots.0: x: no method sweeps optimizer.lr"),
        (
            {"plots": [{"kind": "against", "x": LR, "methods": ["cfg"]}]},
            "plots.0: methods: cfg does not sweep optimizer.lr",
        ),
        ({"plots": [{"kind": "comparison", "methods": ["dpo"]}]}, "plots.0: methods: dpo is none; there are base, cfg"),
        ({"plots": [{"kind": "comparison", "y": LR}]}, "plots.0: y: is of no use; leave it out"),
        ({"plots": [{"kind": "heatmap", "x": BETA, "y": BETA}]}, "must sweep the two keys x and y and no others"),
        (
            {"plots": [{"kind": "heatmap", "x": SCALE, "y": SCALE, "methods": ["cfg"]}]},
            "must sweep the two keys x and y",
        ),
        ({"plots": [{"kind": "frontier", "methods": ["control"]}]}, "none of them has a sweep"),
    ],
)
def test_refusals_are_one_line(changes, said, tmp_path):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, **changes)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "study.yaml" in message


def test_a_small_or_empty_reference_is_refused_before_anything_runs(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    with pytest.raises(UserError, match=r"study.yaml: reference: .*real: holds no PNG or JPEG files"):
        opened(tmp_path, reference=str(real))
    Image.new("RGB", (8, 8)).save(real / "0.png")
    with pytest.raises(
        UserError, match=r"study.yaml: reference: 1 images are too few for FID on 64 features; it wants"
    ):
        opened(tmp_path, reference=str(real))


def test_an_unreadable_file_is_one_line(tmp_path):
    for text, said in (
        ("[1, 2]", "expected keys name"),
        ("name: a\nname: b", "given twice"),
        (": :\n:", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            open_study(tmp_path / "bad.yaml")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--study .*none.yaml: No such file"):
        open_study(tmp_path / "none.yaml")


def test_compute_is_counted_in_passes():
    pair = config_from_dict({"objective": {"name": "dpo"}, "training": {"train_iters": 60, "global_batch_size": 256}})
    control = config_from_dict({"objective": {"name": "next_token"}, "training": {"train_iters": 160}})
    assert passes_of_run(pair) == 60 * 256 * 8 == 122880
    assert passes_of_run(control) == 160 * 256 * 3 == 122880
    assert passes_of_run(None) == 0


def test_a_grid_changes_its_last_key_fastest():
    assert grid({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert grid({}) == [{}]


def changed(config, section, **values):
    return replace(config, **{section: replace(getattr(config, section), **values)})


def test_another_objective_keeps_the_keys_that_it_has_too(tmp_path):
    own = {"set": {"objective.name": "dpo"}, "sweep": {BETA: [0.2]}}
    study = opened(tmp_path, **{"methods/cca": {**STUDY["methods"]["cca"], **own}, "plots": [{"kind": "comparison"}]})
    objectives = [study.methods["cca"].configured(values).config.objective for values in ({}, {BETA: 0.2})]
    assert objectives == [OBJECTIVES["dpo"](0.1), OBJECTIVES["dpo"](0.2)]


def test_what_determines_a_run_is_in_its_key_and_nothing_else():
    config = config_from_dict(CONFIGS["cca"])

    def key(one, base="base-0"):
        return digest(training_contents(one, base))

    same = [
        changed(config, "training", output_dir="elsewhere", pretrained_checkpoint="x", micro_batch_size=4),
        changed(config, "parallel", tensor_model_parallel_size=2),
        changed(config, "logging", tensorboard=False),
    ]
    assert {key(one) for one in same} == {key(config)}
    others = [
        key(changed(config, "training", seed=5)),
        key(changed(config, "training", train_iters=4)),
        key(changed(config, "objective", beta=0.2)),
        key(changed(config, "optimizer", lr=0.5)),
        key(changed(config, "model", hidden_size=96)),
        key(config, "base-1"),
        key(config, None),
    ]
    assert len({key(config), *others}) == 1 + len(others)


def test_samples_have_the_same_folder_only_if_all_that_determines_them_is_the_same(tmp_path):
    def folder(method="cca", values=None, seed=1, count=100, **changes):
        factory = TaskFactory(opened(tmp_path, **changes), tmp_path / "out")
        return factory.sampling(factory.study.methods[method], values or {LR: 0.001}, seed, count).folder

    first = folder()
    assert folder(**{"title": "Another", "sampling": {"batch_size": 7}, "trials": 2}) == first
    (tmp_path / "own.jsonl").write_text('{"prompt": "the digit one", "label": 1}\n')
    others = [
        folder(seed=2),
        folder(count=50),
        folder(values={LR: 0.002}),
        folder(values={LR: 0.001, SCALE: 0.5}),
        folder(method="control"),
        folder(**{"base/set": {"training.train_iters": 5}}),
        folder(**{"prompts": str(tmp_path / "own.jsonl")}),
        folder(**{"reference": "digits-held-out"}),
        folder(**{"metrics": ["fid", "inception_score"]}),
        folder(**{"sampling": {"height": 5}}),
    ]
    assert len({first, *others}) == 1 + len(others)
    before = folder(prompts=str(tmp_path / "own.jsonl"))
    (tmp_path / "own.jsonl").write_text('{"prompt": "the digit eight", "label": 8}\n')
    assert folder(prompts=str(tmp_path / "own.jsonl")) != before


def checkpoint(folder):
    """What planning reads of a checkpoint: its summary."""
    folder.mkdir()
    (folder / "checkpoint.json").write_text(sealed({"config": CONFIGS["base"], "files": {}, "iteration": 3}))
    return {"base": {"checkpoint": str(folder)}}


def test_a_given_checkpoint_is_the_base_of_every_seed(tmp_path):
    factory = TaskFactory(opened(tmp_path, **checkpoint(tmp_path / "given")), tmp_path / "out")
    base, cca = (factory.study.methods[name] for name in ("base", "cca"))
    first, second = (factory.sampling(base, {}, seed, 100) for seed in (1, 2))
    assert (first.after, first.checkpoint) == (None, str(tmp_path / "given"))
    assert first.folder != second.folder
    run = factory.sampling(cca, {LR: 0.001}, 1, 100).after
    assert (run.after, run.config.training.pretrained_checkpoint) == (None, str(tmp_path / "given"))
    before = run.folder
    (tmp_path / "given" / "checkpoint.json").write_text(sealed({"config": CONFIGS["base"], "files": {}}))
    again = TaskFactory(factory.study, tmp_path / "out").sampling(cca, {LR: 0.001}, 1, 100).after
    assert again.folder != before


def test_a_given_checkpoint_of_another_size_is_refused(tmp_path):
    changes = checkpoint(tmp_path / "given")
    with pytest.raises(UserError, match=r"methods.control: model: num_layers is 2, the base's 4"):
        opened(tmp_path, **changes, set={"model.num_layers": 2})


def test_another_run_in_a_configurations_own_folder_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / config_from_dict(CONFIGS["cca"]).training.output_dir / layout.FOLDER
    partial = layout.partial_folder(root, 3)
    partial.mkdir(parents=True)
    layout.finalize(partial, root, 3, {"config": CONFIGS["base"]})
    opened(tmp_path)


def test_methods_share_what_is_the_same(tmp_path):
    factory = TaskFactory(opened(tmp_path), tmp_path / "out")
    base, cfg = (factory.study.methods[name] for name in ("base", "cfg"))
    assert factory.sampling(base, {}, 1, 100) == factory.sampling(cfg, {SCALE: 0.0}, 1, 100)


def test_a_mark_changes_with_its_file(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("1")
    before = file_stamp(f"{file}:function")
    file.write_text("12")
    assert file_stamp(f"{file}:function") != before
    assert file_stamp("digits") == ["digits"]


def test_every_task_comes_after_what_it_needs(tmp_path):
    queue = TaskQueue(TaskFactory(opened(tmp_path), tmp_path / "out"))
    first = queue.ready()
    assert {task.title for task in first} == {f"pretrain the base, seed {seed}" for seed in (7, 1, 2, 3)}
    tasks = queue.schedule.tasks
    for index, task in enumerate(tasks):
        assert task.after is None or task.after in tasks[:index]
    assert len({task.folder for task in tasks}) == len(tasks)
    write_outcome(first[0], {"status": "finished"})
    ready = queue.ready()
    assert {task.after for task in ready} - {None} == {first[0]}
    assert queue.ready([task.folder for task in ready]) == []
    trained = next(task for task in ready if isinstance(task, Training) and task.after)
    assert trained.config.training.pretrained_checkpoint == first[0].config.training.output_dir == str(first[0].folder)
    assert trained.config.training.seed == 7


def test_nothing_is_reported_before_its_settings_are_chosen(tmp_path):
    queue = TaskQueue(TaskFactory(opened(tmp_path), tmp_path / "out"))
    assert {row.method.name for row in queue.schedule.rows} == {"base"}
    queue = settled(tmp_path, lambda task: numbers(10.0))
    assert [row.method.name for row in queue.schedule.rows] == ["base", *["cfg"] * 4, "control", *["cca"] * 5]


def test_settings_are_chosen_on_the_tuning_seed_alone(tmp_path):
    """The second learning rate is better on the tuning seed, and much worse on all that are reported."""

    def outcome(task):
        rate = task.after.config.optimizer.lr
        return numbers({0.001: 20.0, 0.002: 10.0}[rate] if task.seed == 7 else {0.001: 1.0, 0.002: 500.0}[rate])

    def every(task):
        return numbers(9.0) if task.after.folder.name.startswith("base") else outcome(task)

    queue = settled(tmp_path, every)
    assert queue.schedule.chosen["cca"] == {LR: 0.002} == queue.schedule.chosen["control"]

    def only_tuning(task):
        assert task.seed == 7
        return queue.outcome(task)

    assert make_schedule(queue.factory, only_tuning).chosen == queue.schedule.chosen
    rows = [row for row in queue.schedule.rows if row.method.name == "cca"]
    assert [row.values for row in rows[:2]] == [{LR: 0.002}, {LR: 0.002, BETA: 0.1, LAMBDA: 1.0}]
    assert {sampling.seed for row in queue.schedule.rows for sampling in row.samplings} == {1, 2, 3}


def test_the_best_is_the_lowest_fid_or_the_highest_of_others():
    results = [({"a": 1}, numbers(5.0, 8.0)), ({"a": 2}, numbers(4.0, 7.0)), ({"a": 3}, numbers(4.0, 9.0))]
    assert best(results, "fid") == {"a": 2}
    assert best(results, "inception_score") == {"a": 3}
    assert best([*results, ({"a": 4}, {"status": "failed", "reason": "x"})], "fid") == {"a": 2}
    assert best([({"a": 4}, {"status": "failed", "reason": "x"})], "fid") is None


def test_means_and_spreads_by_hand():
    found = over_seeds([{"fid": 10.0}, {"fid": 12.0}, {"fid": 17.0}])
    assert found["fid"] == Statistic(13.0, math.sqrt((9 + 1 + 16) / 2))
    assert over_seeds([{"fid": 10.0}])["fid"] == Statistic(10.0, None)
    assert over_seeds([]) == {}


def graded(task):
    """FID 10, 12 and 14 on the seeds 1, 2 and 3 for the base; CCA's is 4 lower, and with a lambda of 1000 tenfold."""
    fid = 8.0 + 2 * task.seed
    run = task.after.config.objective
    if run.name == "cca":
        fid = fid * 10 if run.negative_weight > 100 else fid - 4
    return numbers(fid + task.sampling.guidance_scale, score=8 + task.seed / 2)


def logged(task):
    kept = {"last_positive_log_ratio": -1.5} if task.config.objective.name == "cca" else {}
    return {"status": "finished", "title": "", "seconds": 1.0, **kept}


def test_the_table_by_hand(tmp_path):
    text = table(results_of(settled(tmp_path, graded, logged)))
    lines = text.splitlines()
    assert lines[0] == "# A small study"
    rest = "9.00 (0.50) | {} | 0.500 (0.000) | 0.250 (0.000) | {} | {} |"
    wanted = [
        "| base, guidance-free |  | 1 | 0.00 | 0.750 (0.000) | " + rest.format("12.00 (2.00)", "", "0"),
        "| base + CFG | s 0.5 | 2 | 0.00 | 0.750 (0.000) | " + rest.format("12.50 (2.00)", "", "0"),
        "| control | lr 0.001 | 1 | 1.00 | 0.750 (0.000) | " + rest.format("12.00 (2.00)", "", "0"),
        "| CCA | lr 0.001 | 1 | 1.00 | 0.750 (0.000) | " + rest.format("8.00 (2.00)", "-1.50 (0.00)", "0"),
        "| CCA | lr 0.001, β 0.3, λ 1000 | 1 | 1.00 | 0.750 (0.000) | "
        + rest.format("120.00 (20.00)", "-1.50 (0.00)", "3 collapsed"),
    ]
    for line in wanted:
        assert line in lines
    assert "| base + CFG | s 0.5 | 0.750 | 11.50 | 22.50 | 0.500 | 0.250 |  | chosen |" in lines
    assert "control: 8 x 8 x 3; CCA: 3 x 8 x 8." in text


def test_results_are_plain_data(tmp_path):
    plain = json.loads(json.dumps(as_json(results_of(settled(tmp_path, graded, logged)))))
    cca = next(row for row in plain["rows"] if row["method"] == "cca")
    assert (cca["mean"]["fid"], cca["std"]["fid"], cca["seeds"]["3"]["fid"]) == (8.0, 2.0, 10.0)
    assert (cca["chosen"], cca["training_passes"], cca["collapsed"]) == (True, 192, [])
    assert [trial["chosen"] for trial in plain["trials"]["cca"]] == [True, False]


def test_a_collapse_is_told_by_the_base_of_the_same_seed(tmp_path):
    """Bases of 10, 12 and 14: an FID of 31 is a collapse on the first seed alone."""

    def outcome(task):
        is_cca = task.after.config.objective.name == "cca"
        return numbers(31.0 if is_cca and task.seed != 7 else 8.0 + 2 * task.seed)

    results = results_of(settled(tmp_path, outcome))
    assert results.of("cca")[0].collapsed == [1]
    assert not results.of("cca")[0].is_lost
    assert results.of("control")[0].collapsed == []
    assert results_of(settled(tmp_path, outcome, collapse=2.0)).of("cca")[0].collapsed == [1, 2, 3]


def diverging(task):
    """Runs with a lambda of 1000 end in NaN on the first seed."""
    config = task.config
    if getattr(config.objective, "negative_weight", None) == 1000 and config.training.seed == 1:
        return {"status": "failed", "reason": "diverged: NaN in a gradient", "title": "", "seconds": 1.0}
    return logged(task)


def test_a_failed_run_is_shown_and_the_rest_goes_on(tmp_path):
    results = results_of(settled(tmp_path, graded, diverging))
    cell = results.of("cca")[2]
    assert cell.row.values == {LR: 0.001, BETA: 0.1, LAMBDA: 1000.0}
    assert cell.failed == {1: "diverged: NaN in a gradient"}
    assert (sorted(cell.seeds), cell.statistics["fid"].mean, cell.is_lost) == ([2, 3], 130.0, True)
    text = table(results)
    assert "| 2 collapsed, 1 failed |" in text
    assert "- CCA (lr 0.001, β 0.1, λ 1000), seed 1: diverged: NaN in a gradient" in text


def test_a_method_whose_trials_all_fail_is_said_to(tmp_path):
    def trained(task):
        is_lost = task.config.objective.name == "cca"
        return {"status": "failed", "reason": "diverged: loss nan", "seconds": 1.0} if is_lost else logged(task)

    results = results_of(settled(tmp_path, graded, trained))
    assert results.of("cca") == []
    assert "- CCA: none of its trials finished" in table(results)
    assert "diverged: loss nan |" in table(results)
    for one in results.study.settings.plots:
        plot(tmp_path, results, one)
    for kind in ("comparison", "frontier", "against"):
        axis = LAMBDA if kind == "against" else None
        plot(tmp_path, results, replace(one, kind=kind, file=f"lost-{kind}", methods=["cca"], x=axis, y=None))
        assert (tmp_path / f"lost-{kind}.png").is_file()


def pictures(folder, results):
    folder.mkdir()
    for one in results.study.settings.plots:
        plot(folder, results, one)
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())}


def test_plots_open_and_change_with_the_data(tmp_path):
    first = pictures(tmp_path / "first", results_of(settled(tmp_path, graded, logged)))
    assert sorted(first) == ["against", "comparison", "frontier", "heatmap"]
    assert all(min(image.shape[:2]) > 300 for image in first.values())
    (tmp_path / "again").mkdir()
    queue = settled(tmp_path / "again", guided_worse, logged)
    second = pictures(tmp_path / "second", results_of(queue))
    for name, image in first.items():
        assert image.shape != second[name].shape or (image != second[name]).any(), name


def guided_worse(task):
    """As ``graded``, but for what CFG and CCA reach."""
    is_other = task.sampling.guidance_scale > 0 or task.after.config.objective.name == "cca"
    return graded(task) | ({"fid": 2 * graded(task)["fid"]} if is_other else {})


def pixels(image, colour):
    """How many pixels have about a colour, as three numbers from 0 to 255."""
    return int((abs(image.astype(int) - np.array(colour)) < 6).all(-1).sum())


def test_the_heatmap_is_dark_where_fid_is_high(tmp_path):
    image = pictures(tmp_path / "plots", results_of(settled(tmp_path, graded, logged)))["heatmap"]
    assert min(pixels(image, (0, 34, 78)), pixels(image, (254, 232, 56))) > 5000


BORDER = (214, 39, 40)


def test_the_heatmap_outlines_the_collapse_region_only(tmp_path):
    lost = pictures(tmp_path / "lost", results_of(settled(tmp_path, graded, logged)))
    (tmp_path / "well").mkdir()
    queue = settled(tmp_path / "well", lambda task: numbers(10.0 + task.sampling.guidance_scale), logged)
    well = pictures(tmp_path / "plots", results_of(queue))
    assert pixels(lost["heatmap"], BORDER) > 500
    assert pixels(well["heatmap"], BORDER) == 0


def test_progress_counts_what_is_done(tmp_path, capsys):
    queue = TaskQueue(TaskFactory(opened(tmp_path), tmp_path / "out"))
    progress = TaskBar(queue)
    task = queue.ready()[0]
    write_outcome(task, {"status": "finished", "seconds": 2.5})
    progress.ended(task, queue.outcome(task))
    # Bases; trials and reported runs of CCA and the control; and what is drawn.
    runs = 4 + (2 + 3) + (2 + 3 + 9)
    drawn = (2 + 3 + 6) + (2 + 3) + (2 + 3 + 9)
    assert capsys.readouterr().out == f"1/{runs + drawn} pretrain the base, seed 7: 2.5 s\n"
    settled(tmp_path, graded, logged)
    assert len(settled(tmp_path, graded, logged).schedule.tasks) == runs + drawn


def test_half_written_results_do_not_count(tmp_path):
    queue = TaskQueue(TaskFactory(opened(tmp_path), tmp_path / "out"))
    task = queue.ready()[0]
    task.folder.mkdir(parents=True)
    (task.folder / ".result.json").write_text("{")
    assert queue.outcome(task) is None
    assert isinstance(queue.schedule.rows[0].samplings[0], Sampling)
