"""Runs that save, continue, fail and end; each function returns plain data."""

from __future__ import annotations

import gc
import hashlib
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.integrity import newest_whole
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import gpt, lora
from megatron_cca.training.batches import open_data
from megatron_cca.training.loop import train
from megatron_cca.training.saving import begin_save
from megatron_cca.training.step import train_step, validate
from tests.distributed.ranks import split_anew
from tests.distributed.workers import start, take_steps


def resume(settings):
    """Train for some steps and save, or continue from what is there, then train for more."""
    run = start(settings["overrides"])
    before = run.iteration
    rows = take_steps(run, settings["steps"])
    if settings.get("save"):
        _save(run)
    return {"before": before, "rows": rows, "latest": layout.latest_iteration(run.checkpoints)}


def saved_remainders(settings):
    """Save what Megatron-Core does of remainders of master weights; what a resume and a new start make of it."""
    run = start(settings["overrides"])
    take_steps(run, 2)
    look_up = DistributedOptimizer._get_main_param_and_optimizer_states

    def remainders(optimizer, parameter):
        tensors = look_up(optimizer, parameter)
        return {**tensors, "param": (tensors["param"].view(torch.int32) & 0xFFFF).to(torch.int16)}

    with mock.patch.object(DistributedOptimizer, "_get_main_param_and_optimizer_states", remainders):
        _save(run)
    weights = [weight.clone() for chunk in run.policy_chunks for weight in chunk.parameters()]
    try:
        start(settings["overrides"])
        refusal = None
    except UserError as error:
        refusal = str(error)
    folder = layout.iteration_folder(run.checkpoints, 2)
    again = start([*settings["overrides"], f"training.pretrained_checkpoint={folder}", *settings["elsewhere"]])
    began = [weight for chunk in again.policy_chunks for weight in chunk.parameters()]
    same = all(torch.equal(*pair) for pair in zip(weights, began, strict=True))
    return {"folder": str(folder), "refusal": refusal, "same weights": same, "rows": take_steps(again, 1)}


def forgotten_runs(settings):
    """By kind of run, after the whole of it in this process: the models under training that are left, and threads."""
    return {name: _forgotten([*settings["overrides"], *more]) for name, more in settings["runs"].items()}


def _forgotten(overrides):
    config = load_config(None, overrides)
    split_anew(config)
    threads, ended = _threads(), "finished"
    try:
        train(config, open_data(config))
    except UserError as error:
        ended = str(error)
    gc.collect()
    models = sum(isinstance(found, DistributedDataParallel) for found in gc.get_objects())
    return {"models": models, "threads": _threads() - threads, "ended": ended}


def _threads():
    return len(list(Path("/proc/self/task").iterdir()))


def _save(run):
    if dist.get_rank() == 0:
        Path(run.config.training.output_dir).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    begin_save(run)
    assert [saved.problem for saved in run.saver.finish()] in ([], [None])
    assert run.saver.last_saved == run.iteration


def interrupted(settings):
    """By layout: steps with a validation and a save between them, and what a run that continues from the save gives.

    ``late`` counts gatherings of weights that nobody has waited for although the validation has used the weights, and
    ``stale`` weights on disk that are not the last update's.
    """
    answers = {}
    for name, overrides in settings["layouts"].items():
        folder = f"{settings['folder']}/{name}".replace(" ", "-").replace(",", "")
        own = [*settings["common"], *overrides, f"training.output_dir={folder}"]
        run = start(own)
        before = take_steps(run, 1)
        validation = validate(run)
        groups = [group for chunk in run.policy for group in chunk.bucket_groups]
        late = sum(group.param_gather_handle is not None for group in groups)
        # After a step, not after the validation, whose passes let all weights arrive.
        before += take_steps(run, settings["steps"] - 1)
        _save(run)
        stale = _stale(run)
        after = take_steps(run, settings["steps"])
        resumed = start(own)
        assert resumed.iteration == settings["steps"]
        answers[name] = {
            "folder": folder,
            "steps": before + after,
            "validation": validation,
            "late": late,
            "stale": stale,
            "buckets": len(groups),
            "resumed": take_steps(resumed, settings["steps"]),
        }
    return answers


def _stale(run):
    run.gather_parameters()
    config = run.config
    read = gpt.build_gpt(run.architecture, config.model, config.parallel, config.training)
    if config.lora.dim is not None:
        lora.attach(read, config.lora, seed=None)
    distributed.load_weights(layout.resolve(config.training.output_dir, "checkpoint"), read, "checkpoint")
    pairs = zip(run.policy_chunks, read, strict=True)
    return sum(
        not torch.equal(*weights)
        for chunks in pairs
        for weights in zip(*(chunk.parameters() for chunk in chunks), strict=True)
    )


def newest_checkpoints(settings):
    """For each folder of checkpoints: what a run there would continue from, or why it would not."""
    answers = {}
    for root in settings["roots"]:
        try:
            found = newest_whole(Path(root), "training.output_dir")
            answers[root] = None if found is None else [found.iteration, list(found.passed_over)]
        except UserError as error:
            answers[root] = str(error)
    return answers


def bad_numbers(settings):
    """By layout: what is said of a step whose gradients, then whose weights, hold a NaN, and whether weights moved."""
    return {name: _bad_numbers(settings["common"] + overrides) for name, overrides in settings["layouts"].items()}


def _bad_numbers(overrides):
    run = start(overrides)
    train_step(run)
    weights = {
        f"decoder.layers.{layer.layer_number - 1}": layer.mlp.linear_fc1.weight
        for chunk in run.policy_chunks
        for layer in chunk.decoder.layers
    }
    before = _digest_of_state(run)
    hooks = [w.register_hook(lambda g: g * float("nan")) for name, w in weights.items() if name == "decoder.layers.1"]
    gradients = train_step(run)
    for hook in hooks:
        hook.remove()
    unmoved = _digest_of_state(run) == before
    after = train_step(run)
    moved = _digest_of_state(run) != before
    for name, weight in weights.items():
        if name == "decoder.layers.1":
            weight.data[0, 0] = float("inf")
    loss = train_step(run)
    saved = [found.problem for found in [*begin_save(run), *run.saver.finish()]]
    return {
        "gradients": gradients.problem,
        "grad_norm_is_nan": gradients.grad_norm != gradients.grad_norm,
        "unmoved": unmoved,
        "after": after.problem,
        "moved": moved,
        "loss": loss.problem,
        "saved": saved,
        "files": sorted(path.name for path in run.checkpoints.glob("*")),
    }


def _digest_of_state(run):
    """Weights and optimizer state of all ranks, hashed."""
    digest = hashlib.sha256()
    state = distributed.state_dict(run.policy_chunks, run.optimizer, is_loading=False)
    for item in nested_values(state):
        if torch.is_tensor(getattr(item, "data", None)):
            digest.update(item.data.detach().numpy().tobytes())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest.hexdigest())
    return everyone


def saved_while_training(settings):
    """Begin to save at step 2 onto a disk that writes only once all other steps are taken; what became of the save."""
    write, may_write = filesystem_async.FileSystemWriterAsync.write_preloaded_data, Path(settings["may_write"])

    def once_it_may(*arguments, **options):
        while not may_write.exists():
            time.sleep(0.01)
        return write(*arguments, **options)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(once_it_may)
    run = start(settings["overrides"])
    for _ in range(2):
        train_step(run)
    ended = begin_save(run)
    polled = []
    while run.iteration < settings["steps"]:
        train_step(run)
        polled += run.saver.poll()
    writing = run.saver.is_writing
    dist.barrier()
    may_write.touch()
    ended += polled + run.saver.finish()
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    return {"writing": writing, "problems": [saved.problem for saved in ended], "iteration": run.iteration}
