"""What ranks do with VAR's tiny model alone: its first values, its frozen tensors, and how often codes are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_cca.checkpoint import distributed, layout, saver
from megatron_cca.checkpoint.summary import summarize
from megatron_cca.config.load import load_config
from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes
from megatron_cca.models import gpt, resolve_architecture
from megatron_cca.models.initialization import initialize_by_name, sharded_tensors
from megatron_cca.training.setup import build_chunks
from megatron_cca.training.step import train_step
from tests.distributed.ranks import split_anew
from tests.distributed.workers import start
from tests.references import var, var_in_megatron


def _frozen():
    return var_in_megatron.frozen_tensors(var.random_quantizer(var.TINY), var.TINY)


def new_model(settings):
    """Save a model with its first values."""
    config = load_config(None, settings["overrides"])
    split_anew(config)

    def initialize(chunk, **facts):
        initialize_by_name(chunk, **facts | {"frozen": _frozen()})

    architecture = resolve_architecture(config.model)
    chunks = build_chunks(config, architecture, config.training, None, "", initialize=initialize)
    saver.save(Path(settings["output"]), 0, chunks, None, summarize(config))


def trained_checkpoint(settings):
    """Which frozen tensors of a rank are not the image tokenizer's after two steps. Saves a checkpoint."""
    run = start(settings["overrides"])
    for _ in range(2):
        assert train_step(run).problem is None
    run.gather_parameters()
    saver.save(Path(settings["output"]), 2, run.policy_chunks, run.optimizer, summarize(run.config))
    frozen, reference = _frozen(), getattr(run.reference, "chunks", [])
    found = [
        (shard.key, shard.data)
        for chunk in (*run.policy_chunks, *reference)
        for shard in sharded_tensors(chunk.sharded_state_dict())
        if shard.key in frozen
    ]
    assert {key for key, _ in found} == frozen.keys()
    everyone = [None] * dist.get_world_size()
    changed = [key for key, data in found if not torch.equal(data.view_as(frozen[key]), frozen[key])]
    dist.all_gather_object(everyone, changed)
    return [key for rank in everyone for key in rank]


def first_codes(settings):
    """How often each code was drawn for the first scale of one class, and its probability by the plain model."""
    config, sizes, label = load_config(None, settings["overrides"]), var.TINY, 4
    split_anew(config)
    architecture = resolve_architecture(config.model)
    chunks = gpt.build_gpt(architecture, config.model, config.parallel, config.training)
    distributed.load_weights(layout.resolve(settings["checkpoint"], "checkpoint"), chunks, "checkpoint")
    requests = [ImageRequest(np.array([sizes.codebook + label]), seed) for seed in range(settings["images"])]
    at_random = SamplingSettings(height=1, width=sizes.tokens, temperature=1)
    drawn = sample_codes([chunk.eval() for chunk in chunks], architecture.vocabulary, requests, at_random)[:, 0, 0]
    weights, quantizer = torch.load(settings["weights"]), var.random_quantizer(sizes)
    nothing = torch.zeros(1, sizes.tokens, dtype=torch.int64)
    logits = var.logits(weights, quantizer, torch.tensor([label]), nothing, sizes)[0, 0]
    return np.bincount(drawn, minlength=sizes.codebook).tolist(), logits.softmax(-1).tolist()
