"""Runs that continue with a key changed; each function returns plain data."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import chdir
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state

from megatron_cca.checkpoint import layout
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.training import loop, pictures, run_log
from megatron_cca.training.batches import open_data
from megatron_cca.training.run_log import read_events, read_metrics
from tests.distributed.ranks import split_anew
from tests.distributed.workers import start, take_steps


def resumed_steps(settings):
    """By case: where a run continues, the next steps, and how it is set up; a case may set the optimizer by hand."""
    answers = {}
    for name, (overrides, by_hand) in settings["cases"].items():
        run = start([*settings["common"], *overrides])
        for key, value in by_hand.items():
            _BY_HAND[key](run, value)
        answers[name] = {
            "before": run.iteration,
            "rows": take_steps(run, settings["steps"]),
            "in background": run.saver._in_background,
            "minutes": _timeout(parallel_state.get_tensor_model_parallel_group()) / timedelta(minutes=1),
        }
    return answers


def _timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def _groups(key, value_of):
    def of(run, value):
        for group in run.optimizer.param_groups:
            group[key] = value_of(group, value)

    return of


def _weight_decay(run, value):
    run.scheduler.start_wd = run.scheduler.end_wd = value
    run.scheduler.step(increment=0)


def _clip_grad(run, value):
    for one in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        one.config.clip_grad = value


# The oracle: what is changed in an optimizer that is there already.
_BY_HAND = {
    "optimizer.adam_beta1": _groups("betas", lambda group, value: (value, group["betas"][1])),
    "optimizer.adam_beta2": _groups("betas", lambda group, value: (group["betas"][0], value)),
    "optimizer.adam_eps": _groups("eps", lambda group, value: value),
    "optimizer.weight_decay": _weight_decay,
    "optimizer.clip_grad": _clip_grad,
}


def resumed_runs(settings):
    """By case: what the whole of a run that continues leaves behind, the faults injected that the case names."""
    return {name: _resumed_run(settings, name, *case) for name, case in settings["cases"].items()}


def _resumed_run(settings, name, overrides, faults):
    folder = Path(settings["folder"]) / name.replace(" ", "-")
    shutil.copytree(settings["base"], folder)
    config = load_config(None, [*settings["common"], *overrides, f"training.output_dir={folder}"])
    split_anew(config)
    ended, seen, ids = "finished", {"watchdog": False}, folder / "trackers.json"
    offline = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/m.db", "DO_NOT_TRACK": "true"}
    with (
        mock.patch.dict(os.environ, offline),
        # MLflow's artifacts beside a database lie in the current folder.
        chdir(folder),
        _watched(seen, faults),
        mock.patch.object(run_log, "tqdm", wraps=run_log.tqdm) as bar,
        mock.patch.object(pictures, "open_tokenizers", wraps=pictures.open_tokenizers) as tokenizers,
    ):
        try:
            loop.train(config, open_data(config))
        except UserError as error:
            ended = str(error)
    return {
        **seen,
        "ended": ended,
        "rows": read_metrics(folder),
        "events": [event["event"] for event in read_events(folder)],
        "saved": layout.iterations(folder / layout.FOLDER),
        "tensorboard": (folder / "tensorboard").is_dir(),
        "trackers": sorted(json.loads(ids.read_text())) if ids.exists() else [],
        "no bar": [call.kwargs["disable"] for call in bar.call_args_list],
        "pictures": {path.name: path.stat().st_size for path in sorted(folder.glob("samples/*.png"))},
        "tokenizers": [[str(call.kwargs["text"]), str(call.kwargs["images"])] for call in tokenizers.call_args_list],
    }


def _watched(seen, faults):
    take = loop.train_step

    def step(run):
        seen["watchdog"] |= any(thread.name == "watchdog" for thread in threading.enumerate())
        if run.iteration in faults:
            hooks = [
                parameter.register_hook(lambda gradient: gradient * float("nan"))
                for chunk in run.policy_chunks
                for parameter in chunk.decoder.layers[0].mlp.linear_fc1.parameters()
            ]
        report = take(run)
        if report.problem is not None:
            for hook in hooks:
                hook.remove()
        return report

    return mock.patch.object(loop, "train_step", step)
