"""Compare decoders with an answer on every rank: logits of whole rows and with a cache, and a CCA step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.config.load import load_config
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.generation.decoder import decoding
from megatron_cca.models import gpt, resolve_architecture
from megatron_cca.training.setup import build_run
from megatron_cca.training.step import train_step
from megatron_cca.training.watchdog import PhaseTracker
from tests.distributed.forwards import scheduled_logits
from tests.distributed.ranks import split_anew
from tests.references.in_megatron import parts_on_this_rank


def differences(settings):
    """By case: the largest difference of the logits, of those with a cache, and of a CCA step."""
    return {name: _differences(**case) for name, case in settings["cases"].items()}


def _differences(checkpoint, reference, overrides, answers):
    wanted = torch.load(answers)
    config = load_config(None, overrides)
    split_anew(config)
    architecture = resolve_architecture(config.model)
    chunks = gpt.build_gpt(architecture, config.model, config.parallel, config.training)
    distributed.load_weights(layout.resolve(checkpoint, "checkpoint"), chunks, "checkpoint")
    chunks = [chunk.eval() for chunk in chunks]
    return {
        "logits": _everyones(_logits(chunks, wanted)),
        "cached": _everyones(0.0 if config.parallel.context_parallel_size > 1 else _cached(chunks, wanted)),
        "step": _everyones(_step(config, architecture, checkpoint, reference, wanted)),
    }


def _everyones(difference):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, difference)
    return max(found)


@torch.no_grad()
def _logits(chunks, wanted):
    tokens, logits = gpt._on_this_context_rank(wanted["tokens"], wanted["logits"])
    found = scheduled_logits(chunks, tokens)
    return 0.0 if found is None else (found[..., : logits.size(-1)] - logits).abs().max().item()


@torch.no_grad()
def _cached(chunks, wanted):
    """Token by token behind prompts of unequal lengths."""
    vocabulary = resolve_architecture(load_config(None, []).model).vocabulary
    tokens, logits = wanted["tokens"], wanted["logits"]
    counts = torch.tensor([3, 5, 2, 4])
    rows, turns = torch.arange(len(tokens)), tokens.size(1) - 5
    with decoding(chunks, vocabulary) as decoder:
        cache = decoder.new_cache(tokens.size(1))
        found = [decoder.feed(cache, tokens[:, :5], counts)]
        found += [decoder.feed(cache, tokens[rows, counts + turn, None]) for turn in range(turns)]
        if not decoder.is_last_stage:
            return 0.0
    expected = torch.stack([logits[rows, counts - 1 + turn] for turn in range(turns + 1)])
    first = vocabulary.visual_start
    return (torch.stack(found) - expected[..., first : first + vocabulary.codebook_size]).abs().max().item()


class _Reader:
    """Stands for the data: the rows of one step, in microbatches of two samples."""

    reads = True
    rows_per_microbatch = 4

    def __init__(self, wanted):
        self._wanted = wanted

    def get(self, _step):
        names = ("tokens", "targets", "mask")
        halves = [[self._wanted[name][part] for name in names] for part in (slice(0, 4), slice(4, 8))]
        microbatches = [
            Microbatch(
                *(torch.cat([own[places] for own in pair]) for pair in zip(*halves, strict=True)),
                self._wanted["flags"][places],
            )
            for places in (slice(0, 2), slice(2, 4))
        ]
        return StepBatch(microbatches, self._wanted["tokens"].size(1), mean_num_tokens=1.0, num_tokens=1)

    def attempt(self, step):
        return self.get(step), None


def _step(config, architecture, checkpoint, reference, wanted):
    """The largest relative error of loss and gradients, with its tensor's name."""
    wanted = {name.removeprefix("step "): value for name, value in wanted.items() if name.startswith("step ")}
    reader = _Reader(wanted)
    run = build_run(config, architecture, reader, reader, None, PhaseTracker(), initialize=None)
    for chunks, path in ((run.policy_chunks, checkpoint), (run.reference.chunks, reference)):
        distributed.load_weights(layout.resolve(path, "checkpoint"), chunks, "checkpoint")
    report = train_step(run)
    assert report.problem is None
    for chunk in run.policy_chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.view_as(parameter)
    errors = {
        name: ((own - part).abs().max() / whole.abs().max()).item()
        for name, own, part, whole in parts_on_this_rank(run.policy_chunks, wanted["gradients"])
    }
    errors["loss"] = abs(report.metrics["loss"] / wanted["loss"] - 1)
    worst = max(errors, key=errors.get)
    return errors[worst], worst
