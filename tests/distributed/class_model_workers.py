"""What the ranks of tests of class models do: Megatron's model beside the plain one, filled with the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_cca.checkpoint import saver
from megatron_cca.checkpoint.summary import summarize
from megatron_cca.config.load import load_config
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes
from megatron_cca.models import gpt, resolve_architecture
from megatron_cca.models.architecture import padded_vocab_size
from megatron_cca.models.initialization import initialize_by_name, sharded_tensors
from megatron_cca.training.setup import build_chunks, build_run
from megatron_cca.training.step import train_step
from megatron_cca.training.watchdog import PhaseTracker
from tests.distributed.ranks import split_anew
from tests.references import class_losses, llamagen, llamagen_in_megatron, var, var_in_megatron
from tests.references.in_megatron import fill, parts_on_this_rank

ROWS = 8
# Enough for attention to have its say, and for few enough roundings.
STD = 0.1


class LlamaGen:
    """The plain LlamaGen of a tiny architecture."""

    # Rows filled up behind the grid of 16, to a multiple of every layout.
    filled_up = 24

    def __init__(self, architecture):
        self.sizes = llamagen.Sizes(
            layers=architecture.num_layers,
            width=architecture.hidden_size,
            heads=architecture.num_attention_heads,
            grid=4,
            codebook=128,
            classes=10,
            ffn=architecture.ffn_hidden_size,
        )

    def weights(self, seed=0):
        return llamagen.random_weights(self.sizes, seed, STD)

    def whole(self, weights, padded):
        return llamagen_in_megatron.whole_tensors(weights, self.sizes, padded)

    def logits(self, weights, classes, codes):
        """Of all codes: the last one is predicted, but not fed."""
        return llamagen.logits(weights, classes, codes[:, :-1], self.sizes)

    def logps(self, weights, classes, codes):
        return llamagen.image_logps(weights, classes, codes, self.sizes)


class Var:
    """The plain VAR of the tiny architecture."""

    filled_up = 24
    sizes = var.TINY

    def __init__(self, architecture):
        self.quantizer = var.random_quantizer(self.sizes)

    def weights(self, seed=0):
        return var.random_weights(self.sizes, seed, STD)

    def whole(self, weights, padded):
        return var_in_megatron.whole_tensors(weights, self.quantizer, self.sizes, padded)

    def logits(self, weights, classes, codes):
        quantizer = {name: value.to(weights["head.weight"].dtype) for name, value in self.quantizer.items()}
        return var.logits(weights, quantizer, classes, codes, self.sizes)

    def logps(self, weights, classes, codes):
        return var.image_logps(weights, exact(self.quantizer), classes, codes, self.sizes)


def _started(overrides):
    config = load_config(None, overrides)
    split_anew(config)
    architecture = resolve_architecture(config.model)
    plain = {"llamagen": LlamaGen, "var": Var}[config.model.name.partition("-")[0]](architecture)
    return config, architecture, plain


def _rows(sizes, seed=0):
    """Classes ``[ROWS]``, two neighbours alike and the null class among them, and codes ``[ROWS, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, sizes.classes, (ROWS,), generator=generator)
    classes[2] = classes[3]
    return classes, torch.randint(0, sizes.codebook, (ROWS, sizes.tokens), generator=generator)


def _tokens(classes, codes, sizes, length):
    """The rows that Megatron is fed ``[B, length]``: the class, all codes but the last, and what fills up."""
    tokens = torch.cat([sizes.codebook + classes[:, None], codes[:, :-1]], 1)
    # Words that are none of the model's own: nothing may look at them.
    return torch.nn.functional.pad(tokens, (0, length - tokens.size(1)), value=sizes.codebook + sizes.classes)


def _padded(config, architecture):
    return padded_vocab_size(architecture, config.model, config.parallel.tensor_model_parallel_size)


def _filled(overrides):
    config, architecture, plain = _started(overrides)
    chunks = gpt.build_gpt(architecture, config.model, config.parallel, config.training)
    weights = plain.weights()
    fill(chunks, plain.whole(weights, _padded(config, architecture)))
    return architecture, plain, exact(weights), [chunk.eval() for chunk in chunks]


def exact(weights):
    """In float64, so that no rounding but Megatron's is seen."""
    return {name: value.double() for name, value in weights.items()}


class _Reader:
    """Stands for the data: one step's rows, cut into microbatches of positives and then negatives.

    The negatives have the same codes unless ``second_codes`` are given.
    """

    reads = True

    def __init__(self, config, rows, codes, sizes, length, second_codes=None):
        self._parts = rows, codes, codes if second_codes is None else second_codes, sizes, length
        self._samples = config.training.micro_batch_size
        self._kinds = 1 if config.objective.is_plain_likelihood else 2
        self.rows_per_microbatch = self._kinds * self._samples

    def get(self, _step):
        (classes, negatives, flags), codes, second_codes, sizes, length = self._parts
        cut = [part.split(self._samples) for part in (classes, negatives, flags, codes, second_codes)]
        microbatches = [self._microbatch(*parts, sizes, length) for parts in zip(*cut, strict=True)]
        tokens = sizes.tokens
        return StepBatch(microbatches, length, mean_num_tokens=float(tokens), num_tokens=self._kinds * ROWS * tokens)

    def attempt(self, step):
        return self.get(step), None

    def _microbatch(self, classes, negatives, flags, codes, second_codes, sizes, length):
        kinds = ((classes, codes), (negatives, second_codes))[: self._kinds]
        tokens = torch.cat([_tokens(labels, shown, sizes, length) for labels, shown in kinds])
        targets = torch.nn.functional.pad(torch.cat([shown for _, shown in kinds]), (0, length - sizes.tokens))
        return Microbatch(tokens, targets, torch.arange(length).expand_as(tokens) < sizes.tokens, flags)


def steps(settings):
    """By case: relative errors of a step's loss and of its worst gradient, the name of that one, and the margin."""
    return {
        name: _step(settings["common"] + case["overrides"], case["is_filled_up"])
        for name, case in settings["cases"].items()
    }


def _step(overrides, is_filled_up):
    config, architecture, plain = _started(overrides)
    sizes = plain.sizes
    length = plain.filled_up if is_filled_up else sizes.tokens
    classes, codes = _rows(sizes)
    dropped = torch.arange(ROWS) == 5
    rows = llamagen.conditions(classes, dropped, sizes)
    assert rows[2].tolist() == [False, False, True, False, False, True, False, False]
    frozen, moved = (exact(plain.weights(seed)) for seed in (0, 1))
    trained = {name: (0.9 * value + 0.1 * moved[name]).requires_grad_() for name, value in frozen.items()}
    drawn = None
    if config.objective.name == "ddo":
        rows, drawn = (rows[0], rows[0], torch.zeros_like(rows[2])), codes.roll(1, 0)
        loss = class_losses.ddo(plain, trained, frozen, rows[0], codes, drawn, config.objective)
    elif config.objective.name == "gft":
        rows = _with_and_without(rows, sizes)
        loss = class_losses.gft(plain, trained, rows, codes, config.objective.beta)
    else:
        loss = plain_loss(config.objective, plain, trained, frozen, rows, codes)
    loss.backward()
    reader = _Reader(config, rows, codes, sizes, length, drawn)
    run = build_run(config, architecture, reader, reader, None, PhaseTracker(), initialize=None)
    padded = _padded(config, architecture)
    fill(run.policy_chunks, plain.whole(trained, padded))
    if run.reference is not None:
        fill(run.reference.chunks, plain.whole(frozen, padded))
    report = train_step(run)
    assert report.problem is None
    errors = _gradient_errors(run, {name: value.grad for name, value in trained.items()}, plain, padded)
    worst = max(errors, key=errors.get)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (errors[worst], worst))
    return [abs(report.metrics["loss"] / loss.item() - 1), *max(everyone), report.metrics.get("margin")]


def plain_loss(objective, plain, policy, reference, rows, codes):
    """The loss of an ``objective`` section by the plain model, for two sets of its weights."""
    given = {"beta": getattr(objective, "beta", None), "weight": getattr(objective, "negative_weight", None)}
    models = (partial(plain.logps, weights, codes=codes) for weights in (policy, reference))
    return class_losses.loss(objective.name, *models, rows, **given, tokens=plain.sizes.tokens)


def _with_and_without(rows, sizes):
    """Each class, and no class for the same image."""
    classes, _, flags = rows
    return classes, torch.full_like(classes, sizes.classes), torch.zeros_like(flags)


def new_model(settings):
    """Save a model with its first values."""
    config, architecture, plain = _started(settings["overrides"])
    frozen = var_in_megatron.frozen_tensors(plain.quantizer, plain.sizes)

    def initialize(chunk, **facts):
        initialize_by_name(chunk, **facts | {"frozen": frozen})

    chunks = build_chunks(config, architecture, config.training, None, "", initialize=initialize)
    saver.save(Path(settings["output"]), 0, chunks, None, summarize(config))


def trained_checkpoints(settings):
    """By case: which frozen tensors are not the plain tokenizer's after two steps. It saves a checkpoint of each."""
    return {name: _trained_checkpoint(settings["common"], **case) for name, case in settings["cases"].items()}


def _trained_checkpoint(common, overrides, output):
    config, architecture, plain = _started(common + overrides)
    classes, codes = _rows(plain.sizes)
    rows = llamagen.conditions(classes, torch.arange(ROWS) == 5, plain.sizes)
    reader = _Reader(config, rows, codes, plain.sizes, plain.filled_up)
    run = build_run(config, architecture, reader, reader, None, PhaseTracker())
    for _ in range(2):
        assert train_step(run).problem is None
    run.gather_parameters()
    saver.save(Path(output), 2, run.policy_chunks, run.optimizer, summarize(config))
    frozen = var_in_megatron.frozen_tensors(plain.quantizer, plain.sizes)
    reference = run.reference.chunks if hasattr(run.reference, "chunks") else []
    found = [
        (shard.key, shard.data)
        for chunk in (*run.policy_chunks, *reference)
        for shard in sharded_tensors(chunk.sharded_state_dict())
        if shard.key in frozen
    ]
    assert {key for key, _ in found} == frozen.keys()
    return [key for key, data in found if not torch.equal(data.view_as(frozen[key]), frozen[key])]


def _gradient_errors(run, gradients, plain, padded):
    """By tensor, the largest difference of this rank's part, relative to the largest number of the whole."""
    for chunk in run.policy_chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.main_grad.view_as(parameter)
    whole, sizes = plain.whole(gradients, padded), plain.sizes
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"):
        # Rows of no word have no gradient.
        words = sizes.codebook + (sizes.classes + 1 if name.startswith("embedding") else 0)
        if name in whole:
            whole[name][words:] = 0
    parts = parts_on_this_rank(run.policy_chunks, whole)
    return {
        f"{name}{list(part.shape)}": ((own - part).abs().max() / full.abs().max()).item()
        for name, own, part, full in parts
    }


def first_codes(settings):
    """How often each code was drawn for the first scale of one class, and its probability by the plain model."""
    architecture, plain, weights, chunks = _filled(settings["overrides"])
    sizes, label = plain.sizes, 4
    requests = [ImageRequest(np.array([sizes.codebook + label]), seed) for seed in range(settings["images"])]
    at_random = SamplingSettings(height=1, width=sizes.tokens, temperature=1)
    drawn = sample_codes(chunks, architecture.vocabulary, requests, at_random)[:, 0, 0]
    logits = plain.logits(weights, torch.tensor([label]), torch.zeros(1, sizes.tokens, dtype=torch.int64))[0, 0]
    return np.bincount(drawn, minlength=sizes.codebook).tolist(), logits.softmax(-1).tolist()
