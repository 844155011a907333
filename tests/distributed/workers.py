"""What the ranks of the distributed tests do. Run by launch.run_workers; each function returns plain data."""

from __future__ import annotations

import hashlib
import itertools
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

from megatron_cca import platform

platform.install("cpu")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from megatron_cca.checkpoint import distributed, layout, saving
from megatron_cca.checkpoint.integrity import newest_whole
from megatron_cca.checkpoint.summary import saved_config, summarize
from megatron_cca.config_files import load_config
from megatron_cca.data.shards import TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models import gpt, lora, resolve_architecture
from megatron_cca.models.fp8_weights import dequantize_rows, quantize_rows
from megatron_cca.models.initialization import sharded_tensors
from megatron_cca.parallel import sequence_logps
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.planner.dry_run import counted_step, dry_run
from megatron_cca.planner.fake_cluster import fake_job, fake_tensors
from megatron_cca.planner.observer import Observer
from megatron_cca.planner.workload import Workload
from megatron_cca.platform.transfers import Fetcher
from megatron_cca.scaling.collective_timer import timed_collectives
from megatron_cca.training.batches import loader, open_data, training_batches
from megatron_cca.training.caching import cache_reference
from megatron_cca.training.saves import begin_save
from megatron_cca.training.setup import set_up
from megatron_cca.training.step import train_step, validate
from tests.distributed.ranks import split_anew
from tests.references.dense_logps import dense_token_logps, worst_relative_error


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


def vocab_parallel_logps(settings):
    """Worst relative errors of sequence_logps over the whole job as one tensor-parallel group, by case."""
    return {name: _vocab_parallel_case(**case) for name, case in settings["cases"].items()}


def _vocab_parallel_case(length, batch, width, vocabulary, padded, chunk_size, mask, dtype="float32", scale=1.0):
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(length, batch, width, generator=generator)).to(getattr(torch, dtype))
    whole = torch.randn(padded, width, generator=generator).to(hidden.dtype)
    hidden, weight = hidden.requires_grad_(), whole.chunk(ranks)[rank].clone().requires_grad_()
    border = padded // ranks
    targets = torch.randint(0, vocabulary, (batch, length), generator=generator)
    # Targets on the borders of the shards, and the last true word.
    edges = [edge for edge in (0, border - 1, border, 2 * border - 1, vocabulary - 1) if edge < vocabulary]
    targets[0, : len(edges)] = torch.tensor(edges)
    masks = {"full": torch.ones(batch, length), "empty": torch.zeros(batch, length)}
    masks["ragged"] = (torch.rand(batch, length, generator=generator) < 0.7).float()
    masks["ragged"][0] = 1
    mask = masks[mask].bool()
    logps = sequence_logps(hidden, weight, targets, mask, tp_group=group, vocab_size=vocabulary, chunk_size=chunk_size)
    upstream = torch.randn(batch, generator=generator)
    logps.backward(upstream)
    weight_grads = [torch.empty_like(weight) for _ in range(ranks)]
    dist.all_gather(weight_grads, weight.grad)
    # The oracle, on every rank.
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, whole))
    dense = dense_token_logps(hidden64, weight64, targets, mask, vocabulary).sum(1)
    dense.backward(upstream.double())
    return {
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

    from megatron_cca.generation.sampler import ImageRequest, SamplingSettings, sample_codes

    model = _for_sampling(settings["checkpoint"], overrides)
    vocabulary = model.architecture.vocabulary
    prompts = [np.array([vocabulary.bos, *range(index % 3), vocabulary.boi, 5, vocabulary.img]) for index in range(8)]
    requests = [ImageRequest(prompt, seed=index) for index, prompt in enumerate(prompts)]
    options = SamplingSettings(4, 4, **settings["options"])
    return sample_codes(model.chunks, vocabulary, requests, options, unconditional=prompts[0]).tolist()


def _for_sampling(checkpoint, overrides):
    from megatron_cca.generation.loading import load_for_sampling

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
    whole = _scheduled_logits(model, tokens, vocabulary)
    with decoding(model.chunks, vocabulary) as decoder:
        cache = decoder.new_cache(20)
        cached = [decoder.feed(cache, tokens[:, :6], counts)]
        for turn in range(14):
            cached.append(decoder.feed(cache, tokens[torch.arange(3), counts + turn, None]))
    again = _scheduled_logits(model, tokens, vocabulary)
    answer = torch.zeros(3)
    if decoder.is_last_stage:
        wanted = torch.stack([whole[torch.arange(3), counts - 1 + turn] for turn in range(15)])
        found = torch.stack(cached)
        answer = torch.stack([(found - wanted).abs().max(), wanted.abs().max(), (again - whole).abs().max()])
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return answer.tolist()


def _scheduled_logits(model, tokens, vocabulary):
    """Visual logits ``[B, S, K]`` of whole sequences by Megatron's own schedule, without a cache; on the last stage."""

    def head(*, hidden_states, output_layer, **_unused):
        logits, _ = output_layer(hidden_states)
        return gather_from_tensor_model_parallel_region(logits).transpose(0, 1)

    def forward_step(_iterator, chunk):
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return chunk(tokens, positions, None, output_processor=head), lambda logits, non_loss_data: logits

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None for _ in model.chunks],
            model=model.chunks,
            num_microbatches=1,
            seq_length=tokens.size(1),
            micro_batch_size=len(tokens),
            forward_only=True,
            collect_non_loss_data=True,
        )
    start = vocabulary.visual_start
    return found[0][..., start : start + vocabulary.codebook_size] if found else None


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


@torch.no_grad()
def _whole_logits(chunks, tokens, vocab_size):
    """float32 [B, S, V] on every rank, through Megatron's own schedule."""
    length = tokens.size(1)
    # Sequence parallelism wants an even length; what follows a token does not reach it.
    tokens = torch.nn.functional.pad(tokens, (0, length % 2))

    def forward_step(data, model):
        output = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
        return output, lambda logits, non_loss_data: gather_from_tensor_model_parallel_region(logits)

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None for _ in chunks],
        model=chunks,
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=tokens.size(1),
        micro_batch_size=tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )
    logits = found[0][..., :vocab_size].contiguous() if found else torch.empty(*tokens.shape, vocab_size)
    last, group = parallel_state.get_pipeline_model_parallel_last_rank, parallel_state.get_pipeline_model_parallel_group
    dist.broadcast(logits, src=last(), group=group())
    return logits[:, :length]


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
    saving.save(Path(settings["output"]), 7, chunks, None, summarize(config), start)


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


def reference_bias(settings):
    """A random checkpoint as training.reference_bias measures it, and the same log-probabilities in plain ways."""
    from megatron_cca.training import reference_bias as bias
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, settings["overrides"])
    initialize_distributed(config)
    chunks = build_chunks(config, resolve_architecture(config.model), config.training, None, "")
    saving.save(Path(settings["checkpoint"]), 0, chunks, None, summarize(config))
    lives, original = [], bias.prefix_logps

    def spy(chunks, *arguments):
        lives.append([life() is not None for life in models])
        models.append(weakref.ref(chunks[0]))
        return original(chunks, *arguments)

    models, bias.prefix_logps = [], spy
    asked = {name: settings[name] for name in ("checkpoint", "data", "rows", "lengths", "precisions", "seed")}
    pairs = bias.measure(bias.BiasSettings(**asked))
    # Layers that give another answer every time.
    answers = itertools.count()
    bias.prefix_logps = lambda *arguments: original(*arguments) + 0.25 * next(answers)
    shaky = bias.measure(bias.BiasSettings(**{**asked, "precisions": ["fp32"]}))
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
    """Of image_token_logps: the worst error against a loop over rows and tokens, and what stands where masked out."""
    architecture, _, (chunk,) = _loaded(settings["checkpoint"], ["training.precision=fp32"])
    rows, vocab_size = _pair_rows(settings)[0], architecture.vocabulary.size
    with torch.no_grad():
        found = gpt.image_token_logps(chunk, rows.tokens, rows.targets, rows.mask, vocab_size=vocab_size, chunk_size=7)
    logps = torch.log_softmax(_whole_logits([chunk], rows.tokens, vocab_size).double(), dim=-1)
    expected = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for row, token in rows.mask.nonzero().tolist():
        expected[row, token] = logps[row, token, rows.targets[row, token]]
    return {"dtype": str(found.dtype), "error": (found - expected).abs().max().item()}


def late_ranks(settings):
    """What is timed on every rank where rank 0 is late: an all-reduce within a stage, then a message between two."""
    return {
        "one stage": _late(settings["late"], lambda rank: 0, lambda: dist.all_reduce(torch.ones(8))),
        "two stages": _late(settings["late"], lambda rank: rank, _message),
    }


def _late(seconds, stage_of, communicate):
    dist.barrier()
    with timed_collectives(stage_of) as timer:
        # Once in time, which shows what the transfer itself takes.
        for late in (0.0, seconds):
            time.sleep(late if dist.get_rank() == 0 else 0.0)
            communicate()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [[span.kind, span.crosses_stages, span.exposed] for span in timer.spans])
    return everyone


def _message():
    if dist.get_world_size() > 1:
        dist.send(torch.ones(8), 1) if dist.get_rank() == 0 else dist.irecv(torch.ones(8), 0).wait()


def even_pipeline(settings):
    """By number of microbatches: what is timed on every rank of a pipeline whose stages all sleep equally long."""
    initialize_distributed(load_config(None, [f"parallel.pipeline_model_parallel_size={dist.get_world_size()}"]))
    stage, found = _SleepingStage(settings["seconds"]), {}
    for microbatches in settings["microbatches"]:
        dist.barrier()
        with timed_collectives(lambda rank: rank) as timer:
            started = time.perf_counter()
            get_forward_backward_func()(
                forward_step_func=lambda _, model: (model(), lambda output: (output.sum(), {})),
                data_iterator=iter([]),
                model=[stage],
                num_microbatches=microbatches,
                seq_length=4,
                micro_batch_size=1,
                forward_only=False,
            )
            # As a step's end does: the last stage is done first.
            dist.all_reduce(torch.ones(1))
            seconds = time.perf_counter() - started
        spans = [[span.kind, span.crosses_stages, span.exposed] for span in timer.spans]
        found[microbatches] = [None] * dist.get_world_size()
        dist.all_gather_object(found[microbatches], {"seconds": seconds, "spans": spans})
    return found


class _SleepingStage(torch.nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=dist.get_world_size(),
            pipeline_dtype=torch.float32,
        )
        self.seconds, self.received = seconds, None
        self.weight = torch.nn.Parameter(torch.ones(()))

    def set_input_tensor(self, tensors):
        self.received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self):
        received = torch.ones(4, 1, 8) if self.received is None else self.received
        return _Sleep.apply(received * self.weight, self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor, seconds):
        context.seconds = seconds
        time.sleep(seconds)
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(2 * context.seconds)
        return gradient, None


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


def huggingface_logits(settings):
    """By layout: largest difference of a Hugging Face folder's logits on Megatron to those kept in a file."""
    wanted = load_file(settings["expected"])
    answers = {}
    for name, overrides in settings["layouts"].items():
        model = _for_sampling(settings["folder"], overrides)
        found = _scheduled_logits(model, wanted["tokens"], model.architecture.vocabulary)
        difference = torch.zeros(()) if found is None else (found - wanted["logits"]).abs().max()
        dist.broadcast(difference, dist.get_world_size() - 1)
        answers[name] = difference.item()
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
    """Save at step 2 in the background with a slow disk, train on meanwhile; returns where it is and the last loss."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def slowly(*arguments, **options):
        time.sleep(settings["seconds"])
        return write(*arguments, **options)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(slowly)
    run = _start(settings["overrides"])
    for _ in range(2):
        train_step(run)
    ended = begin_save(run)
    polled = []
    while run.iteration < settings["steps"]:
        train_step(run)
        polled += run.saver.poll()
    writing = run.saver.is_writing
    ended += polled + run.saver.finish()
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    return {"writing": writing, "problems": [saved.problem for saved in ended], "iteration": run.iteration}


def counted_steps(settings):
    config, workload = _planned(settings)
    initialize_distributed(config)
    replicas = parallel_state.get_data_parallel_world_size()
    microbatches = config.training.global_batch_size // config.training.micro_batch_size // replicas
    with Observer() as observer:
        counted = counted_step(config, workload, observer, microbatches)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(counted))
    return everyone


def dry_runs(settings):
    dist.destroy_process_group()
    found = [_dry_run(job) for job in settings["jobs"]]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def _dry_run(job):
    config, workload = _planned(job)
    if not job.get("run_all"):
        return asdict(dry_run(config, job["ranks"], job["rank"], workload, like_gpu=job["like_gpu"]))
    microbatches = config.training.global_batch_size // config.training.micro_batch_size
    with fake_job(0, 1):
        initialize_distributed(config)
        share = workload.image_tokens / workload.seq_length
        with fake_tensors(share, like_gpu=job["like_gpu"]) as observer:
            return asdict(counted_step(config, workload, observer, microbatches, run_all=True))


def _planned(job):
    return load_config(job["config"], job["overrides"]), Workload(*job["workload"])
