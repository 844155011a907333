"""Plans of studies: which tasks follow from the file, what is shared, and how settings are chosen."""

from dataclasses import replace

from megatron_cca.checkpoint.layout import sealed
from megatron_cca.config.load import config_from_dict
from megatron_cca.lab.studies.running import TaskBar, TaskQueue
from megatron_cca.lab.studies.schedule import TaskFactory, best, digest, file_stamp, make_schedule, training_contents
from megatron_cca.lab.studies.tasks import Drawing, Sampling, Training, write_outcome
from megatron_cca.models.architecture import ATTENTION_OPTIONS
from tests.references.small_study import (
    BETA,
    CONFIGS,
    DRAWN_SCALE,
    LAMBDA,
    LR,
    SCALE,
    checkpoint,
    graded,
    logged,
    numbers,
    opened,
    settled,
    with_drawing,
)


def changed(config, section, **values):
    return replace(config, **{section: replace(getattr(config, section), **values)})


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
        key(changed(config, "model", kv_channels=8)),
        key(changed(config, "model", qk_layernorm=True)),
        key(config, "base-1"),
        key(config, None),
    ]
    assert len({key(config), *others}) == 1 + len(others)
    # Keys that came later are not among what former versions' keys were made of.
    assert training_contents(config, None)["config"]["model"].keys().isdisjoint(ATTENTION_OPTIONS)


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
    (file.parent / "hps.pt").write_bytes(b"one")
    before = file_stamp(f"hpsv2:{file.parent / 'hps.pt'}")
    (file.parent / "hps.pt").write_bytes(b"another")
    assert file_stamp(f"hpsv2:{file.parent / 'hps.pt'}") != before
    assert file_stamp("hpsv2:none") == ["hpsv2:none"]


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


def test_a_base_begins_with_random_weights(tmp_path):
    changes = {"base/set": {"training.train_iters": 5}}
    study = opened(tmp_path, **changes)
    own = changed(study.base, "training", pretrained_checkpoint="runs/elsewhere")
    base = TaskFactory(replace(study, base=own), tmp_path / "out").training(study.methods["base"], {}, 1)
    assert base.config.training.pretrained_checkpoint is None
    assert base == TaskFactory(study, tmp_path / "out").training(study.methods["base"], {}, 1)


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


def test_a_round_draws_then_trains_and_the_next_begins_with_its_result(tmp_path):
    factory = TaskFactory(opened(tmp_path, **with_drawing()), tmp_path / "out")
    ddo, dpo, distilled = (factory.study.methods[name] for name in ("ddo", "dpo", "distilled"))
    second = factory.training(ddo, {LR: 0.001}, 1)
    drawn = [second.after, second.after.after.after]
    first, base = second.after.after, second.after.after.after.after
    assert base == factory.training(factory.study.methods["base"], {}, 1)
    assert [one.checkpoint for one in drawn] == [str(first.folder), str(base.folder)]
    for run, source, start in ((second, drawn[0], first), (first, drawn[1], base)):
        assert run.config.data.partner_path == str(source.shards)
        assert (run.config.data.path, run.config.training.pretrained_checkpoint) == ("digits", str(start.folder))
    assert [one.title for one in (base, drawn[1], first, drawn[0], second)] == [
        "pretrain the base, seed 1",
        "draw ddo to train on, seed 1, round 1",
        "train ddo lr=0.001, seed 1, round 1",
        "draw ddo to train on, seed 1, round 2",
        "train ddo lr=0.001, seed 1, round 2",
    ]
    other = factory.training(dpo, {LR: 0.001}, 1)
    assert other.after.folder == drawn[1].folder != drawn[0].folder
    trained = factory.training(distilled, {LR: 0.001}, 1)
    assert trained.config.data.path == str(trained.after.shards)
    assert trained.config.data.partner_path is None
    cooler = factory.training(distilled, {LR: 0.001, DRAWN_SCALE: 0.5}, 1)
    folders = [trained.after.folder, cooler.after.folder, drawn[0].folder, drawn[1].folder]
    assert len(set(folders)) == 4
    assert len({trained.folder, cooler.folder, factory.training(distilled, {LR: 0.002}, 1).folder}) == 3


def test_all_draw_with_one_base_when_it_is_given(tmp_path):
    changes = {**with_drawing(), **checkpoint(tmp_path / "given")}
    factory = TaskFactory(opened(tmp_path, **changes), tmp_path / "out")
    runs = [factory.training(factory.study.methods["dpo"], {LR: 0.001}, seed) for seed in (1, 2)]
    assert [run.after.after for run in runs] == [None, None]
    assert {run.after.checkpoint for run in runs} == {str(tmp_path / "given")}
    assert runs[0].after.folder != runs[1].after.folder


def test_what_cannot_be_drawn_is_not_trained_on(tmp_path):
    def outcome(task):
        if isinstance(task, Training) and task.folder.name.startswith("ddo"):
            return {"status": "failed", "reason": "diverged: lost", "title": "", "seconds": 1.0}
        return {"status": "finished", "title": "", "seconds": 1.0}

    queue = settled(tmp_path, lambda task: numbers(10.0), outcome, **with_drawing())
    second = queue.factory.training(queue.factory.study.methods["ddo"], {LR: 0.001}, 7)
    assert queue.outcome(second)["reason"] == "diverged: lost"
    assert not second.folder.exists()
    assert queue.schedule.chosen["ddo"] is None
    tasks = queue.schedule.tasks
    assert all(task.after is None or task.after in tasks[:index] for index, task in enumerate(tasks))
    assert sum(isinstance(task, Drawing) for task in tasks) == 1 + 2 + 3 + 3 + 3 + 1
