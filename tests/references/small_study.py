"""A study as small as it can be, and outcomes for its tasks that were never run."""

from copy import deepcopy

import yaml

from megatron_cca.checkpoint.layout import sealed
from megatron_cca.lab.studies.checks import check_study
from megatron_cca.lab.studies.results import collect
from megatron_cca.lab.studies.running import TaskQueue
from megatron_cca.lab.studies.schedule import TaskFactory
from megatron_cca.lab.studies.study import open_study
from megatron_cca.lab.studies.tasks import Training, write_outcome

GONE = "(gone)"
LR = "optimizer.lr"
BETA, LAMBDA = "objective.beta", "objective.negative_weight"
SCALE, DRAWN_SCALE = "sampling.guidance_scale", "drawing.guidance_scale"
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
    """Write a study's file with keys such as ``methods/cca/tune`` changed; GONE takes one out."""
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
    """Return the study, read and checked."""
    study = open_study(written(folder, **changes))
    check_study(study, 1)
    return study


def numbers(fid, score=8.0, accuracy=0.75):
    """Return the outcome of a sampling task."""
    metrics = {"accuracy": accuracy, "fid": fid, "inception_score": score, "precision": 0.5, "recall": 0.25}
    return {"status": "finished", "title": "", "seconds": 1.0, **metrics}


def settled(folder, outcome_of_sampling, outcome_of_training=None, **changes):
    """Return a queue on which all tasks have ended as the functions say."""
    queue = TaskQueue(TaskFactory(opened(folder, **changes), folder / "out"))
    trained = outcome_of_training or (lambda task: {"status": "finished", "title": "", "seconds": 1.0})
    while ready := queue.ready():
        for task in ready:
            write_outcome(task, trained(task) if isinstance(task, Training) else outcome_of_sampling(task))
    return queue


def results_of(queue):
    """Return what a report is made of."""
    return collect(queue.factory.study, queue.schedule, queue.outcome)


def graded(task):
    """Return an FID of 10, 12 or 14 by the seed for the base, 4 less for CCA, tenfold with a lambda of 1000."""
    fid = 8.0 + 2 * task.seed
    run = task.after.config.objective
    if run.name == "cca":
        fid = fid * 10 if run.negative_weight > 100 else fid - 4
    return numbers(fid + task.sampling.guidance_scale, score=8 + task.seed / 2)


def logged(task):
    """Return the outcome of a training task; CCA's has a log-ratio."""
    kept = {"last_positive_log_ratio": -1.5} if task.config.objective.name == "cca" else {}
    return {"status": "finished", "title": "", "seconds": 1.0, **kept}


def checkpoint(folder):
    """Write what planning reads of a checkpoint, its summary; return the study's key for it."""
    folder.mkdir()
    (folder / "checkpoint.json").write_text(sealed({"config": CONFIGS["base"], "files": {}, "iteration": 3}))
    return {"base": {"checkpoint": str(folder)}}


def with_drawing():
    """Return changes of the study: DDO in two rounds, DPO on the images of the first, and distillation of guidance."""
    pairs = {"config": "cca.yaml", "drawing": {}, "tune": {LR: [0.001, 0.002]}}
    half, distilled = {"training.train_iters": 3}, {"role": "data", "guidance_scale": 1.0}
    return {
        "set": {"training.global_batch_size": 2048},
        "methods/control/set": {"training.train_iters": 16},
        "methods/cca/set": {"training.train_iters": 6},
        "methods/ddo": {**pairs, "drawing": {"rounds": 2}, "set": {"objective.name": "ddo", **half}},
        "methods/dpo": {
            **pairs,
            "set": {"objective.name": "dpo", "data.pairs": "images", "training.train_iters": 6},
        },
        "methods/distilled": {
            "config": "control.yaml",
            "drawing": distilled,
            "set": {"training.train_iters": 16},
            "tune": {LR: [0.001, 0.002]},
            "sweep": {DRAWN_SCALE: [0.5, 1.0]},
        },
    }
