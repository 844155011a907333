"""What ranks do with a model's logits and log-probabilities; each function returns plain data."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_cca.checkpoint import distributed, layout, saver
from megatron_cca.checkpoint.summary import saved_config, summarize
from megatron_cca.config.load import load_config
from megatron_cca.lab.reference_bias import BiasSettings
from megatron_cca.models import gpt, resolve_architecture
from megatron_cca.models.frozen_weights import dequantize_rows, quantize_rows
from megatron_cca.models.initialization import sharded_tensors
from megatron_cca.parallel import sequence_logps, token_logps
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.batches import open_data, training_batches
from tests.distributed.forwards import scheduled_logits
from tests.distributed.ranks import split_anew
from tests.references.dense_logps import dense_token_logps, worst_relative_error


def vocab_parallel_logps(settings):
    """Worst relative errors of sequence_logps over the whole job as one tensor-parallel group, by case."""
    return {name: _vocab_parallel_case(**case) for name, case in settings["cases"].items()}


def _vocab_parallel_case(
    length, batch, width, vocabulary, padded, chunk_size, mask, dtype="float32", scale=1.0, support=None, has_bias=False
):
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(length, batch, width, generator=generator)).to(getattr(torch, dtype))
    whole = torch.randn(padded, width, generator=generator).to(hidden.dtype)
    hidden, weight = hidden.requires_grad_(), whole.chunk(ranks)[rank].clone().requires_grad_()
    whole_bias = torch.randn(padded, generator=generator).to(hidden.dtype) if has_bias else torch.zeros(padded)
    bias = whole_bias.chunk(ranks)[rank].clone().requires_grad_()
    border, words = padded // ranks, range(*support) if support is not None else range(vocabulary)
    targets = torch.randint(words.start, words.stop, (batch, length), generator=generator)
    # Targets on the borders of the shards, and the first and last word that counts.
    edges = [edge for edge in (words[0], border - 1, border, 2 * border - 1, words[-1]) if edge in words]
    targets[0, : len(edges)] = torch.tensor(edges)
    masks = {"full": torch.ones(batch, length), "empty": torch.zeros(batch, length)}
    masks["ragged"] = (torch.rand(batch, length, generator=generator) < 0.7).float()
    masks["ragged"][0] = 1
    mask = masks[mask].bool()
    head = {"vocab_size": vocabulary, "support": words if support is not None else None, "chunk_size": chunk_size}
    logps = sequence_logps(hidden, weight, targets, mask, bias=bias if has_bias else None, tp_group=group, **head)
    upstream = torch.randn(batch, generator=generator)
    logps.backward(upstream)
    weight_grads = [torch.empty_like(weight) for _ in range(ranks)]
    dist.all_gather(weight_grads, weight.grad)
    bias_grads = [torch.empty_like(bias) for _ in range(ranks)]
    if has_bias:
        dist.all_gather(bias_grads, bias.grad)
    # The oracle, on every rank.
    hidden64, weight64, bias64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, whole, whole_bias))
    dense = dense_token_logps(hidden64, weight64, targets, mask, vocabulary, words, bias64).sum(1)
    dense.backward(upstream.double())
    gradients = {"bias": (torch.cat(bias_grads), bias64.grad)} if has_bias else {}
    return {
        **{name: worst_relative_error(*pair) for name, pair in gradients.items()},
        "logps": worst_relative_error(logps, dense),
        "hidden": worst_relative_error(hidden.grad, hidden64.grad),
        "weight": worst_relative_error(torch.cat(weight_grads), weight64.grad),
    }


def refused_shards(settings):
    """What sequence_logps says to heads that are not this vocabulary's shards, on rank 0."""
    messages = []
    for rows in settings["rows"]:
        try:
            sequence_logps(
                torch.zeros(3, 1, 4),
                torch.zeros(rows[dist.get_rank()], 4),
                torch.zeros(1, 3, dtype=torch.int64),
                torch.ones(1, 3, dtype=torch.bool),
                tp_group=dist.group.WORLD,
                vocab_size=settings["vocabulary"],
            )
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    return messages


def sampled(settings):
    """By layout: codes that a checkpoint gives for fixed seeds and prompts of three lengths."""
    return {name: _sampled(settings, overrides) for name, overrides in settings["layouts"].items()}


def _sampled(settings, overrides):
    import numpy as np

    from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes

    model = _for_sampling(settings["checkpoint"], overrides)
    vocabulary = model.architecture.vocabulary
    prompts = [np.array([vocabulary.bos, *range(index % 3), vocabulary.boi, 5, vocabulary.img]) for index in range(8)]
    requests = [ImageRequest(prompt, index, prompts[0]) for index, prompt in enumerate(prompts)]
    options = SamplingSettings(4, 4, **settings["options"])
    return sample_codes(model.chunks, vocabulary, requests, options).tolist()


def _for_sampling(checkpoint, overrides):
    from megatron_cca.generation.model_loading import load_for_sampling

    split_anew(load_config(None, overrides))
    return load_for_sampling(checkpoint)


def cached_and_whole_logits(settings):
    """By layout: largest difference of the sampler's logits to those of the training path, and the largest logit."""
    return {name: _cached_and_whole(settings["checkpoint"], it) for name, it in settings["layouts"].items()}


def _cached_and_whole(checkpoint, overrides):
    from megatron_cca.generation.decoder import decoding

    model = _for_sampling(checkpoint, overrides)
    # Visual tokens on both of two tensor-parallel ranks.
    vocabulary = replace(model.architecture.vocabulary, visual_start=200)
    tokens = torch.randint(0, vocabulary.size, (3, 20), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([4, 6, 5])
    whole = _visual_logits(model, tokens, vocabulary)
    with decoding(model.chunks, vocabulary) as decoder:
        cache = decoder.new_cache(20)
        cached = [decoder.feed(cache, tokens[:, :6], counts)]
        for turn in range(14):
            cached.append(decoder.feed(cache, tokens[torch.arange(3), counts + turn, None]))
    again = _visual_logits(model, tokens, vocabulary)
    answer = torch.zeros(3)
    if decoder.is_last_stage:
        wanted = torch.stack([whole[torch.arange(3), counts - 1 + turn] for turn in range(15)])
        found = torch.stack(cached)
        answer = torch.stack([(found - wanted).abs().max(), wanted.abs().max(), (again - whole).abs().max()])
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return answer.tolist()


def huggingface_logits(settings):
    """By layout: largest difference of a Hugging Face folder's logits on Megatron to those kept in a file."""
    wanted = load_file(settings["expected"])
    answers = {}
    for name, overrides in settings["layouts"].items():
        model = _for_sampling(settings["folder"], overrides)
        found = _visual_logits(model, wanted["tokens"], model.architecture.vocabulary)
        difference = torch.zeros(()) if found is None else (found - wanted["logits"]).abs().max()
        dist.broadcast(difference, dist.get_world_size() - 1)
        answers[name] = difference.item()
    return answers


def _visual_logits(model, tokens, vocabulary):
    """``[B, S, K]`` of whole sequences; on the last stage."""
    found, start = scheduled_logits(model.chunks, tokens), vocabulary.visual_start
    return None if found is None else found[..., start : start + vocabulary.codebook_size]


def continuations(settings):
    """For each layout: the logits of ``settings["tokens"]``, and the greedy continuation of its rows."""
    answers = {}
    for name, overrides in settings["layouts"].items():
        architecture, _, chunks = _loaded(settings["checkpoint"], overrides)
        tokens = torch.tensor(settings["tokens"])
        logits = _whole_logits(chunks, tokens, architecture.vocabulary.size)
        answers[name] = {"logits": logits.tolist()}
        for _ in range(settings["new_tokens"]):
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
            logits = _whole_logits(chunks, tokens, architecture.vocabulary.size)
        answers[name]["tokens"] = tokens.tolist()
    return answers


def resaved(settings):
    """Load a checkpoint on a layout and save it again from there."""
    _, config, chunks = _loaded(settings["checkpoint"], settings["overrides"])
    start = layout.resolve(settings["checkpoint"], "checkpoint")
    saver.save(Path(settings["output"]), 7, chunks, None, summarize(config), start)


def assert_loaded_weights(settings):
    """On each layout, every rank's parts of a checkpoint's weights are those of whole tensors in a file."""
    expected = load_file(settings["expected"])
    for overrides in settings["layouts"]:
        _, _, chunks = _loaded(settings["checkpoint"], overrides)
        for shard in sharded_tensors([chunk.sharded_state_dict() for chunk in chunks]):
            low, stacked = shard.global_offset, shard.prepend_axis_num
            sizes = (*(1 for _ in range(stacked)), *shard.local_shape)
            block = expected[shard.key][tuple(slice(a, a + size) for a, size in zip(low, sizes, strict=True))]
            assert torch.equal(shard.data.view(sizes), block), (overrides, shard.key)


def _loaded(checkpoint, overrides):
    """A checkpoint's model on the layout of ``overrides``, in the precision that they name."""
    folder = layout.resolve(checkpoint, "checkpoint")
    saved = saved_config(folder, "checkpoint")
    config = replace(load_config(None, overrides), model=saved.model)
    split_anew(config)
    architecture = resolve_architecture(config.model)
    chunks = gpt.build_gpt(architecture, config.model, config.parallel, config.training)
    distributed.load_weights(folder, chunks, "checkpoint")
    return architecture, config, [chunk.eval() for chunk in chunks]


def _whole_logits(chunks, tokens, vocab_size):
    """float32 [B, S, V] on every rank."""
    length = tokens.size(1)
    # Sequence parallelism wants an even length; what follows a token does not reach it.
    tokens = torch.nn.functional.pad(tokens, (0, length % 2))
    found = scheduled_logits(chunks, tokens)
    logits = torch.empty(*tokens.shape, vocab_size) if found is None else found[..., :vocab_size].contiguous()
    last, group = parallel_state.get_pipeline_model_parallel_last_rank, parallel_state.get_pipeline_model_parallel_group
    dist.broadcast(logits, src=last(), group=group())
    return logits[:, :length]


def reference_bias(settings):
    """A random checkpoint as lab.reference_bias measures it, and the same log-probabilities in plain ways."""
    from megatron_cca.lab.reference_bias import measure as bias
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, settings["overrides"])
    initialize_distributed(config)
    chunks = build_chunks(config, resolve_architecture(config.model), config.training, None, "")
    saver.save(Path(settings["checkpoint"]), 0, chunks, None, summarize(config))
    lives, original = [], bias.prefix_logps

    def spy(chunks, *arguments):
        lives.append([life() is not None for life in models])
        models.append(weakref.ref(chunks[0]))
        return original(chunks, *arguments)

    models, bias.prefix_logps = [], spy
    asked = {name: settings[name] for name in ("checkpoint", "data", "rows", "lengths", "precisions", "seed")}
    pairs = bias.measure(BiasSettings(**asked))
    # Layers that give another answer every time.
    answers = itertools.count()
    bias.prefix_logps = lambda *arguments: original(*arguments) + 0.25 * next(answers)
    shaky = bias.measure(BiasSettings(**{**asked, "precisions": ["fp32"]}))
    bias.prefix_logps = original
    found = {f"{pair.policy} / {pair.reference}": {} for pair in pairs}
    for pair in pairs:
        spread = pair.spread
        found[f"{pair.policy} / {pair.reference}"][pair.tokens] = [spread.mean, spread.std, spread.worst, spread.rows]
    plain = {
        precision + " rounded" * is_rounded: _plain_logps(settings, precision, is_rounded)
        for precision, is_rounded in itertools.product(("fp32", "bf16"), (False, True))
    }
    others = {"lives": lives, "shaky": shaky[0].spread.mean, "token by token": _by_token(settings)}
    return {"measured": found, "plain": plain, **others}


def _plain_logps(settings, precision, is_rounded):
    """By length, the log-probability of each row as training sums it, with the mask cut to the first tokens."""
    architecture, _, (chunk,) = _loaded(settings["checkpoint"], [f"training.precision={precision}"])
    for name, weight in chunk.named_parameters():
        if is_rounded and weight.dim() == 2 and "output_layer" not in name:
            weight.data = dequantize_rows(*quantize_rows(weight.data), weight.dtype)
    head = {"vocab_size": architecture.vocabulary.size, "chunk_size": 7}
    found = {length: [] for length in settings["lengths"]}
    with torch.no_grad():
        for rows, row in itertools.product(_pair_rows(settings), range(2)):
            # What bf16 rounds to depends on the shape: each row stands alone and ends with its image.
            end = int(rows.mask[row].nonzero().max()) + 1
            tokens, targets, mask = (part[row : row + 1, :end] for part in (rows.tokens, rows.targets, rows.mask))
            for length in settings["lengths"]:
                cut = mask & (mask.cumsum(1) <= length)
                found[length] += gpt.image_logps(chunk, tokens, targets, cut, **head).tolist()
    return found


def _pair_rows(settings):
    """The microbatches of a training run's first step."""
    keys = {
        "data.path": settings["data"],
        "data.condition_dropout": 0.0,
        "training.micro_batch_size": 1,
        "training.global_batch_size": settings["rows"] // 2,
        "training.seed": settings["seed"],
    }
    config = load_config(None, [*settings["overrides"], *(f"{key}={value}" for key, value in keys.items())])
    return training_batches(config, open_data(config), with_pairs=True).build(0, 0, 1).microbatches


def _by_token(settings):
    """Of token_logps: the worst error against a loop over rows and tokens, and what stands where masked out."""
    architecture, _, (chunk,) = _loaded(settings["checkpoint"], ["training.precision=fp32"])
    rows, vocab_size = _pair_rows(settings)[0], architecture.vocabulary.size
    with torch.no_grad():
        found = gpt.image_logps(
            chunk, rows.tokens, rows.targets, rows.mask, logps_of=token_logps, vocab_size=vocab_size, chunk_size=7
        )
    logps = torch.log_softmax(_whole_logits([chunk], rows.tokens, vocab_size).double(), dim=-1)
    expected = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for row, token in rows.mask.nonzero().tolist():
        expected[row, token] = logps[row, token, rows.targets[row, token]]
    return {"dtype": str(found.dtype), "error": (found - expected).abs().max().item()}
