"""Training runs of the ranks of distributed tests; each function returns plain data."""

from __future__ import annotations

import gc
import hashlib
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.integrity import newest_whole
from megatron_cca.config_files import load_config
from megatron_cca.data.shards import TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models import gpt, lora
from megatron_cca.platform.transfers import Fetcher
from megatron_cca.training.batches import loader, open_data, training_batches
from megatron_cca.training.caching import cache_reference
from megatron_cca.training.loop import train
from megatron_cca.training.saves import begin_save
from megatron_cca.training.setup import set_up
from megatron_cca.training.step import train_step, validate
from tests.distributed.ranks import split_anew


def _start(overrides):
    config = load_config(None, overrides)
    split_anew(config)
    return set_up(config, open_data(config))


def _steps(run, count):
    reports = [train_step(run) for _ in range(count)]
    return [
        {
            **report.metrics,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "worst": report.log_ratio.worst if report.log_ratio else None,
        }
        for report in reports
    ]


def traces(settings):
    """The metrics of ``settings["steps"]`` steps for each layout, by name."""
    return {
        name: _steps(_start(settings["common"] + overrides), settings["steps"])
        for name, overrides in settings["layouts"].items()
    }


def validations(settings):
    """By layout: the loss of each step, and the validation metrics before the first and after the last."""
    answers = {}
    for name, overrides in settings["layouts"].items():
        run = _start(settings["common"] + overrides)
        before = validate(run) if run.validation else None
        losses = [train_step(run).metrics["loss"] for _ in range(settings["steps"])]
        answers[name] = {"before": before, "losses": losses, "after": validate(run) if run.validation else None}
    return answers


def batch_traces(settings):
    """By layout, for each of ``settings["steps"]``: the global batch as a hash, and which ranks read from disk."""
    return {
        name: [_traced(*_loader(settings["common"] + overrides), step) for step in settings["steps"]]
        for name, overrides in settings["layouts"].items()
    }


def _loader(overrides):
    config = load_config(None, overrides)
    split_anew(config)
    return config, loader(config, training_batches(config, open_data(config), with_pairs=True))


def _traced(config, batches, step):
    """Steps one to three from ``step`` on, so that some of them were read ahead."""
    reads, original = [], TokenShards.codes
    TokenShards.codes = lambda shards, *which: reads.append(which) or original(shards, *which)
    with batches:
        shares = [_share(batches.get(number)) for number in range(step, step + 3)]
    TokenShards.codes = original
    mine = parallel_state.get_data_parallel_rank(), shares, bool(reads)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {"digests": [_digest(everyone, turn) for turn in range(3)], "readers": [reader for *_, reader in everyone]}


def _share(batch):
    """This rank's rows as bytes, sample by sample: tokens of the positive and the negative, targets, mask, flag."""
    flags = torch.cat([microbatch.negative_is_positive for microbatch in batch.microbatches])
    if batch.microbatches[0].tokens is None:
        return None, flags.numpy().tobytes()
    rows = [
        torch.stack([getattr(microbatch, name).long() for name in ("tokens", "targets", "mask")], dim=1)
        for microbatch in batch.microbatches
    ]
    pairs = torch.cat([torch.stack(microbatch.chunk(2), dim=1) for microbatch in rows])
    return pairs.numpy().tobytes(), flags.numpy().tobytes()


def _digest(everyone, turn):
    """Of the whole batch; ranks of one data-parallel rank must agree."""
    shares = {}
    for data_parallel_rank, steps, _ in everyone:
        rows, flags = steps[turn]
        assert shares.setdefault(("flags", data_parallel_rank), flags) == flags
        if rows is not None:
            assert shares.setdefault(("rows", data_parallel_rank), rows) == rows
    return hashlib.sha256(b"".join(shares[key] for key in sorted(shares))).hexdigest()


def head_chunk_sizes(settings):
    """The chunk sizes that the reference's and the policy's pass of one step used, in order."""
    used, original = [], gpt.sequence_logps

    def spy(*arguments, **options):
        used.append(options["chunk_size"])
        return original(*arguments, **options)

    gpt.sequence_logps = spy
    _steps(_start(settings["overrides"]), 1)
    gpt.sequence_logps = original
    return used


def resume(settings):
    """Train for some steps and save, or continue from what is there, then train for more."""
    run = _start(settings["overrides"])
    before = run.iteration
    rows = _steps(run, settings["steps"])
    if settings.get("save"):
        _save(run)
    return {"before": before, "rows": rows, "latest": layout.latest_iteration(run.checkpoints)}


def forgotten_runs(settings):
    """By precision, after a whole run in this process: the models under training that are left, and the threads."""
    answers = {}
    for precision in ("fp32", "bf16"):
        config = load_config(None, [*settings["overrides"], f"training.precision={precision}"])
        split_anew(config)
        threads = _threads()
        train(config, open_data(config))
        gc.collect()
        models = sum(isinstance(found, DistributedDataParallel) for found in gc.get_objects())
        answers[precision] = [models, _threads() - threads]
    return answers


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
        run = _start(own)
        before = _steps(run, 1)
        validation = validate(run)
        groups = [group for chunk in run.policy for group in chunk.bucket_groups]
        late = sum(group.param_gather_handle is not None for group in groups)
        # After a step, not after the validation, whose passes let all weights arrive.
        before += _steps(run, settings["steps"] - 1)
        _save(run)
        stale = _stale(run)
        after = _steps(run, settings["steps"])
        resumed = _start(own)
        assert resumed.iteration == settings["steps"]
        answers[name] = {
            "folder": folder,
            "steps": before + after,
            "validation": validation,
            "late": late,
            "stale": stale,
            "buckets": len(groups),
            "resumed": _steps(resumed, settings["steps"]),
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


def reference_traces(settings):
    """By layout and variant: the metrics of each step, and of a validation after the last.

    A variant whose strategy is ``cached`` reads what the same layout computed, or ``settings["cache"]``.
    """
    answers = {}
    for name, overrides in settings["layouts"].items():
        for variant, more in settings["variants"].items():
            run_overrides = [*settings["common"], *overrides, *more]
            if "reference.strategy=cached" in run_overrides:
                folder = settings["cache"] or f"{settings['folder']}/{name}-{variant}".replace(" ", "-")
                run_overrides.append(f"reference.cache={folder}")
                if settings["cache"] is None or not Path(folder).exists():
                    _fill_cache(run_overrides, folder, settings["steps"])
            run = _start(run_overrides)
            steps = _steps(run, settings["steps"])
            answers[f"{name}, {variant}"] = {"steps": steps, "validation": validate(run) if run.validation else None}
    return answers


def _fill_cache(overrides, folder, steps):
    config = load_config(None, overrides)
    config = replace(config, reference=replace(config.reference, strategy="resident", cache=None))
    split_anew(config)
    cache_reference(config, open_data(config), Path(folder), 0, steps)
    dist.barrier()


def broken_offload(settings):
    """A step, a pass that breaks in the middle of an offloaded model, and three more steps; beside an unbroken run."""
    unbroken = _steps(_start(settings["overrides"]), 4)
    run = _start(settings["overrides"])
    first = _steps(run, 1)
    before = [parameter.clone() for chunk in run.policy for parameter in chunk.parameters()]
    layers = [module for chunk in run.reference.streamed.chunks for module in _offloaded_layers(chunk)]

    def fail(*_unused):
        raise RuntimeError("out of memory")

    hook = layers[len(layers) // 2].mlp.register_forward_pre_hook(fail)
    try:
        train_step(run)
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    hook.remove()
    after = [parameter for chunk in run.policy for parameter in chunk.parameters()]
    return {
        "message": message,
        "untouched": all(torch.equal(*pair) for pair in zip(before, after, strict=True)),
        "iteration": run.iteration,
        "unbroken": unbroken,
        "broken": first + _steps(run, 3),
    }


def _offloaded_layers(chunk):
    return getattr(chunk, "module", chunk).decoder.layers


def offload_occupancy(settings):
    """While an offloaded reference ran: the most of its parts that were on the device at once, and how many it has."""
    run = _start(settings["overrides"])
    parts = [part for ring in run.reference.streamed._rings for part in ring._parts]
    occupancy, original = [], Fetcher.start

    def is_here(part):
        return part._arriving is not None or part._slots[0].data_ptr() != part._host[0].data_ptr()

    def spy(fetcher, host):
        arriving = original(fetcher, host)
        # The one that is being asked for is not marked yet.
        occupancy.append(1 + sum(is_here(part) for part in parts))
        return arriving

    Fetcher.start = spy
    _steps(run, 1)
    Fetcher.start = original
    return {"parts": len(parts), "most": max(occupancy), "copies": len(occupancy), "left": sum(map(is_here, parts))}


def continued_cache(settings):
    """Compute a cache, delete its second block and shorten nothing else, compute it again; both times as hashes."""
    folder = Path(settings["folder"])
    found = []
    for _ in range(2):
        _fill_cache(settings["overrides"], folder, settings["steps"])
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())})
        first = folder / sorted(found[0])[1]
        found.append(first.stat().st_mtime_ns)
        dist.barrier()
        if dist.get_rank() == 0 and len(found) == 2:
            (folder / sorted(found[0])[2]).unlink()
        dist.barrier()
    return found


def pictured_steps(settings):
    """By layout: the codes that a run draws before its first step and after its last, and its losses in between."""
    from megatron_cca.training.pictures import open_pictures

    answers = {}
    for name, overrides in settings["layouts"].items():
        run = _start(settings["common"] + overrides)
        pictures = open_pictures(run)
        before = pictures.paint().codes.tolist() if pictures else None
        losses = [step["loss"] for step in _steps(run, settings["steps"])]
        answers[name] = {
            "before": before,
            "losses": losses,
            "after": pictures.paint().codes.tolist() if pictures else None,
        }
    return answers


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
    run = _start(overrides)
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
    run = _start(settings["overrides"])
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
