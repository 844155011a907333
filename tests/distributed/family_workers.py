"""What ranks do with a family's tiny model beside what its oracle says; each function returns plain data."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.config.load import load_config
from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes
from megatron_cca.generation.decoder import decoding
from megatron_cca.models import gpt, resolve_architecture
from megatron_cca.models.frozen_weights import keep_in_fp8
from megatron_cca.models.initialization import sharded_tensors
from megatron_cca.parallel import token_logps
from megatron_cca.training.step import train_step
from tests.distributed.forwards import scheduled_logits
from tests.distributed.ranks import split_anew
from tests.distributed.workers import start, take_steps
from tests.references.in_megatron import JUNK, parts_on_this_rank


def forwards(settings):
    """How far a model is from its oracle: logits of whole rows and with a cache, greedy codes; and what it draws."""
    wanted = torch.load(settings["answers"], weights_only=False)
    config = load_config(None, settings["overrides"])
    architecture, chunks = _loaded(config, settings["checkpoint"])
    has_cache = config.parallel.context_parallel_size == 1
    answer = {
        "logits": _worst(_whole(chunks, architecture, config, wanted)),
        "largest": wanted["logits"].abs().max().item(),
        "cached": _worst(_cached(chunks, architecture.vocabulary, wanted) if has_cache else 0.0),
    }
    if has_cache:
        answer["greedy"] = {
            scale: _drawn(chunks, architecture.vocabulary, wanted, "grid", guidance_scale=scale, temperature=0)
            for scale in wanted["greedy"]
        }
        at_random = {"temperature": 1, "top_k": 30, "top_p": 0.9, "batch_size": 2}
        answer["drawn"] = {
            scale: _drawn(chunks, architecture.vocabulary, wanted, "small_grid", guidance_scale=scale, **at_random)
            for scale in wanted["greedy"]
        }
    return answer


def _loaded(config, checkpoint):
    split_anew(config)
    architecture = resolve_architecture(config.model)
    chunks = gpt.build_gpt(architecture, config.model, config.parallel, config.training)
    distributed.load_weights(layout.resolve(checkpoint, "checkpoint"), chunks, "checkpoint")
    spoil_rows_of_no_word(chunks, architecture)
    return architecture, [chunk.eval() for chunk in chunks]


@torch.no_grad()
def spoil_rows_of_no_word(chunks, architecture):
    """Fill the rows that pad embedding and head: whoever looks at them is seen."""
    words = {"word_embeddings": architecture.num_words, "output_layer": architecture.vocabulary.output_size}
    for shard in sharded_tensors([chunk.sharded_state_dict() for chunk in chunks]):
        for name, count in words.items():
            if name in shard.key:
                shard.data[max(0, count - shard.global_offset[0]) :] = JUNK


def _worst(difference):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, difference)
    return max(found)


@torch.no_grad()
def _whole(chunks, architecture, config, wanted):
    """The largest difference over rows as long as the layout lets them be, and over rows that are filled up."""
    tokens, logits, parallel = wanted["tokens"], wanted["logits"], config.parallel
    has_parts = parallel.sequence_parallel or parallel.context_parallel_size > 1
    length, pad = tokens.size(1), torch.nn.functional.pad
    worst = 0.0
    for filled_up in (-(-length // 4) * 4 if has_parts else length, (length // 4 + 1) * 4):
        more = filled_up - length
        parts = (
            pad(tokens, (0, more), value=architecture.vocabulary.pad),
            pad(logits, (0, 0, 0, more)),
            torch.arange(filled_up).expand(len(tokens), -1) < length,
        )
        own, expected, counts = gpt._on_this_context_rank(*parts)
        found = scheduled_logits(chunks, own)
        if found is not None:
            worst = max(worst, (found[..., : logits.size(-1)] - expected)[counts].abs().max().item())
    return worst


@torch.no_grad()
def _cached(chunks, vocabulary, wanted):
    """The largest difference token by token, behind prompts of equal and of unequal lengths."""
    if vocabulary.scales:
        return 0.0
    tokens, logits = wanted["tokens"][:4], wanted["logits"][:4]
    logits = logits[..., vocabulary.visual_start : vocabulary.visual_start + vocabulary.codebook_size]
    rows, worst = torch.arange(4), 0.0
    for counts in (torch.tensor([1, 1, 1, 1]), torch.tensor([3, 5, 2, 4])):
        turns = tokens.size(1) - int(counts.max())
        with decoding(chunks, vocabulary) as decoder:
            cache = decoder.new_cache(tokens.size(1))
            found = [decoder.feed(cache, tokens[:, : counts.max()], counts)]
            found += [decoder.feed(cache, tokens[rows, counts + turn, None]) for turn in range(turns)]
            if decoder.is_last_stage:
                expected = torch.stack([logits[rows, counts - 1 + turn] for turn in range(turns + 1)])
                worst = max(worst, (torch.stack(found) - expected).abs().max().item())
    return worst


def _drawn(chunks, vocabulary, wanted, grid, **options):
    """Codes of an image for each prompt, row by row."""
    height, width = wanted[grid]
    both = zip(wanted["prompts"], wanted["dropped"], strict=True)
    requests = [ImageRequest(prompt, seed, second) for seed, (prompt, second) in enumerate(both)]
    settings = SamplingSettings(height=height, width=width, **options)
    return sample_codes(chunks, vocabulary, requests, settings).reshape(len(requests), -1).tolist()


def steps(settings):
    """By way to compute: a step's metrics and gradient norm, and its worst gradient beside the oracle's."""
    return {name: _step(**way) for name, way in settings["ways"].items()}


def _step(overrides, answers):
    run = start(overrides)
    spoil_rows_of_no_word(run.policy_chunks, run.architecture)
    if run.reference is not None:
        spoil_rows_of_no_word(run.reference.chunks, run.architecture)
    report = train_step(run)
    assert report.problem is None
    everyone = [None] * dist.get_world_size()
    wanted = torch.load(answers, weights_only=False)
    dist.all_gather_object(everyone, _worst_gradient(run, wanted["gradients"]))
    error, where = max(everyone)
    return {**report.metrics, "grad_norm": report.grad_norm, "gradient": error, "where": where}


def _worst_gradient(run, wanted):
    """The largest difference of this rank's part of a tensor, relative to the largest number of the whole."""
    trained = {
        id(parameter) for chunk in run.policy_chunks for parameter in chunk.parameters() if parameter.requires_grad
    }
    assert trained
    for chunk in run.policy_chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.main_grad.view_as(parameter)
    frozen = getattr(gpt.unwrapped_gpt(run.policy_chunks[0]), "frozen_prefix", "nothing is")
    parts = parts_on_this_rank(run.policy_chunks, wanted, frozen)
    return max(
        (((own - part).abs().max() / whole.abs().max()).item(), f"{name}{list(part.shape)}")
        for name, own, part, whole in parts
    )


def first_log_ratios(settings):
    """By kind of run: the worst log-ratio of the first step, and of the second, after which the weights differ."""
    return {
        name: [row["worst"] for row in take_steps(start([*settings["overrides"], *more]), 2)]
        for name, more in settings["kinds"].items()
    }


@torch.no_grad()
def fp8_weights(settings):
    """The log-probabilities of a step's rows by weights in bf16, in FP8, and rounded by hand; and bytes of weights."""
    rows = torch.load(settings["answers"], weights_only=False)
    config = load_config(None, settings["overrides"])
    answer, chunks = {}, {}
    for kind in ("bf16", "fp8", "rounded"):
        architecture, (chunks[kind],) = _loaded(config, settings["checkpoint"])
        if kind == "fp8":
            answer["bytes_before"] = _bytes(chunks[kind])
            keep_in_fp8([chunks[kind]])
            answer["bytes"] = _bytes(chunks[kind])
        if kind == "rounded":
            answer["expected_bytes"] = answer["bytes_before"] + _round_by_hand(chunks[kind])
        head = {"vocab_size": architecture.vocabulary.output_size, "chunk_size": 7}
        logps = gpt.image_logps(
            chunks[kind], rows["tokens"], rows["targets"], rows["mask"], logps_of=token_logps, **head
        )
        answer[kind] = logps.tolist()
    return answer


def _bytes(chunk):
    return sum(tensor.nbytes for tensor in (*chunk.parameters(), *chunk.buffers()))


def _round_by_hand(chunk):
    """Round embedding and projections to E4M3, each row with its own scale; return by how many bytes they shrink."""
    more = 0
    for name, weight in chunk.named_parameters():
        if name.endswith(".weight") and weight.dim() == 2 and "output_layer" not in name:
            scales = weight.float().abs().amax(1, keepdim=True) / 448
            scales[scales == 0] = 1
            weight.copy_((weight.float() / scales).to(torch.float8_e4m3fn).float() * scales)
            more += 4 * len(weight) - weight.numel()
    return more
