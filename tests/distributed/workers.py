"""Training runs of the ranks of distributed tests; each function returns plain data."""

from __future__ import annotations

import hashlib
import types
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cca.config.load import load_config
from megatron_cca.data.shards import TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models import gpt
from megatron_cca.platform.host_weights import Fetcher
from megatron_cca.training.batches import loader, open_data, training_batches
from megatron_cca.training.caching import cache_reference
from megatron_cca.training.loop import _check_first_step
from megatron_cca.training.reference import ResidentReference
from megatron_cca.training.setup import set_up
from megatron_cca.training.step import train_step, validate
from tests.distributed.ranks import split_anew


def start(overrides):
    config = load_config(None, overrides)
    split_anew(config)
    return set_up(config, open_data(config))


def take_steps(run, count):
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
        name: take_steps(start(settings["common"] + overrides), settings["steps"])
        for name, overrides in settings["layouts"].items()
    }


def validations(settings):
    """By layout: the loss of each step, and the validation metrics before the first and after the last."""
    answers = {}
    for name, overrides in settings["layouts"].items():
        run = start(settings["common"] + overrides)
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
    """The chunk sizes of the passes of step 0, in order: reference, policy, and the reference after the update."""
    used, original = [], gpt.sequence_logps

    def spy(*arguments, **options):
        used.append(options["chunk_size"])
        return original(*arguments, **options)

    gpt.sequence_logps = spy
    take_steps(start(settings["overrides"]), 1)
    gpt.sequence_logps = original
    return used


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
            run = start(run_overrides)
            steps = take_steps(run, settings["steps"])
            answers[f"{name}, {variant}"] = {"steps": steps, "validation": validate(run) if run.validation else None}
    return answers


def _fill_cache(overrides, folder, steps):
    config = load_config(None, overrides)
    config = replace(config, reference=replace(config.reference, strategy="resident", cache=None))
    split_anew(config)
    cache_reference(config, open_data(config), Path(folder), 0, steps)
    dist.barrier()


def references_after_an_update(settings):
    """Whether the reference of step 0 is the same after the update: as it is, and if it were the policy itself."""
    honest = start(settings["overrides"])
    first, later = (train_step(honest).reference_is_frozen for _ in range(2))
    moving = start(settings["overrides"])
    moving.reference = ResidentReference(moving.forward, moving.policy)
    report = train_step(moving)
    try:
        _check_first_step(moving, report, types.SimpleNamespace(info=lambda line: None))
        message = "no error"
    except UserError as error:
        message = str(error)
    return {"honest": first, "moving": report.reference_is_frozen, "later": later, "message": message}


def broken_offload(settings):
    """A step, a pass that breaks in the middle of an offloaded model, and three more steps; beside an unbroken run."""
    unbroken = take_steps(start(settings["overrides"]), 4)
    run = start(settings["overrides"])
    first = take_steps(run, 1)
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
        "broken": first + take_steps(run, 3),
    }


def _offloaded_layers(chunk):
    return getattr(chunk, "module", chunk).decoder.layers


def offload_occupancy(settings):
    """While an offloaded reference ran: the most of its parts that were on the device at once, and how many it has."""
    run = start(settings["overrides"])
    parts = [part for chunk in run.reference.streamed._streamed for part in chunk._parts]
    occupancy, original = [], Fetcher.start

    def is_here(part):
        return part._arriving is not None or part._slots[0].data_ptr() != part._host[0].data_ptr()

    def spy(fetcher, host):
        arriving = original(fetcher, host)
        # The one that is being asked for is not marked yet.
        occupancy.append(1 + sum(is_here(part) for part in parts))
        return arriving

    Fetcher.start = spy
    take_steps(run, 1)
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
        run = start(settings["common"] + overrides)
        pictures = open_pictures(run)
        before = pictures.generate().codes.tolist() if pictures else None
        losses = [step["loss"] for step in take_steps(run, settings["steps"])]
        answers[name] = {
            "before": before,
            "losses": losses,
            "after": pictures.generate().codes.tolist() if pictures else None,
        }
    return answers
