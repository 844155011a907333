"""One training step: the reference's forward pass, then the policy's forward and backward, on Megatron's schedule."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cca import platform
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.models.gpt import image_logps
from megatron_cca.objectives import PairLogps, SequenceLogps
from megatron_cca.training.batches import loader
from megatron_cca.training.setup import Run, seed_step


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        metrics: the objective's metrics over the whole global batch, before the update; the same for any layout.
        worst_log_ratio: largest ``|policy - reference|`` over all rows, nats; None without a reference.
        grad_norm: global norm before clipping.
        learning_rate: of this update.
        num_tokens: non-padding tokens that the policy saw, over the global batch.
        data_wait_seconds: how long this rank waited for the batch.
    """

    metrics: dict[str, float]
    worst_log_ratio: float | None
    grad_norm: float
    learning_rate: float
    num_tokens: int
    data_wait_seconds: float


def train_step(run: Run) -> StepReport:
    """Take the step ``run.iteration`` and advance it. Collective over all ranks."""
    step = run.iteration
    if run.config.model.hidden_dropout > 0 or run.config.model.attention_dropout > 0:
        seed_step(run.config, step)
    started = time.perf_counter()
    batch = run.loader.get(step)
    data_wait_seconds = time.perf_counter() - started
    reference = _forward_logps(run, batch, run.reference) if run.uses_pairs else {}
    rows = _policy_pass(run, batch, reference)
    _, grad_norm, _ = run.optimizer.step()
    learning_rate = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step(increment=1)
    run.iteration += 1
    metrics, worst = _global_metrics(run, rows, batch.mean_num_tokens)
    return StepReport(metrics, worst, float(grad_norm), learning_rate, batch.num_tokens, data_wait_seconds)


def validate(run: Run) -> dict[str, float]:
    """The objective's metrics over all validation batches, the same for any layout. Collective over all ranks."""
    for chunk in run.policy:
        chunk.eval()
    with loader(run.config, run.validation.batches) as batches:
        steps = [_validation_rows(run, batches.get(step)) for step in range(run.validation.iters)]
    for chunk in run.policy:
        chunk.train()
    rows = [row for step, _ in steps for row in step]
    return _global_metrics(run, rows, fmean(mean_num_tokens for _, mean_num_tokens in steps))[0]


def _validation_rows(run: Run, batch: StepBatch) -> tuple[list[PairLogps | SequenceLogps], float]:
    reference = _forward_logps(run, batch, run.reference) if run.uses_pairs else {}
    policy = _forward_logps(run, batch, run.policy)
    microbatches = [(batch.microbatches[index], logps, reference.get(index)) for index, logps in policy.items()]
    return [_rows(run, batch, *parts) for parts in microbatches], batch.mean_num_tokens


def _schedule(run: Run, batch: StepBatch, chunks: list[torch.nn.Module], forward_step, **options) -> list:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(batch.microbatches)) for _ in chunks],
        model=chunks,
        num_microbatches=len(batch.microbatches),
        seq_length=batch.seq_length,
        micro_batch_size=run.batches.rows_per_microbatch,
        **options,
    )


def _forward(run: Run, microbatches: Iterator, model: torch.nn.Module) -> tuple[int, Microbatch, Tensor]:
    index, rows = next(microbatches)
    head = {"vocab_size": run.architecture.vocabulary.size, "chunk_size": run.config.training.logps_chunk_size}
    return index, rows, image_logps(model, rows.tokens, rows.targets, rows.mask, **head)


def _forward_logps(run: Run, batch: StepBatch, chunks: list[torch.nn.Module]) -> dict[int, Tensor]:
    """A model's log-probabilities by microbatch, on the last pipeline stage; empty elsewhere."""

    def forward_step(microbatches, model):
        index, _, output = _forward(run, microbatches, model)
        return output, lambda logps, non_loss_data: (index, logps)

    return dict(_schedule(run, batch, chunks, forward_step, forward_only=True, collect_non_loss_data=True))


def _policy_pass(run: Run, batch: StepBatch, reference: dict[int, Tensor]) -> list[PairLogps | SequenceLogps]:
    """Forward and backward of every microbatch; returns the detached rows on the last stage."""
    collected: list = []

    def loss(index: int, microbatch: Microbatch, logps: Tensor):
        rows = _rows(run, batch, microbatch, logps, reference.get(index))
        collected.append(_rows(run, batch, microbatch, logps.detach(), reference.get(index)))
        result = run.objective(rows)
        # Megatron divides the loss in place by the number of microbatches; the rows are reported instead.
        return result.loss, {}

    def forward_step(microbatches, model):
        index, microbatch, output = _forward(run, microbatches, model)
        return output, partial(loss, index, microbatch)

    for chunk in run.policy:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    _schedule(run, batch, run.policy, forward_step, forward_only=False)
    return collected


def _rows(run: Run, batch: StepBatch, microbatch: Microbatch, policy: Tensor, reference: Tensor | None):
    if not run.uses_pairs:
        return SequenceLogps(policy, batch.mean_num_tokens)
    return PairLogps(*policy.chunk(2), *reference.chunk(2), microbatch.negative_is_positive)


def _global_metrics(run: Run, rows: list, mean_num_tokens: float) -> tuple[dict[str, float], float | None]:
    """The objective's metrics over all rows of the global batch, on every rank."""
    answer: list = [None, None]
    if parallel_state.is_pipeline_last_stage():
        gathered = _gather_rows(run, rows, mean_num_tokens)
        answer[0] = {name: value.item() for name, value in run.objective(gathered).metrics.items()}
        if run.uses_pairs:
            answer[1] = max(ratio.abs().max().item() for ratio in gathered.log_ratios())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(
            answer,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
            device=platform.device(),
        )
    return answer[0], answer[1]


def _gather_rows(run: Run, rows: list, mean_num_tokens: float) -> PairLogps | SequenceLogps:
    names = ["policy"] if not run.uses_pairs else list(PairLogps.__dataclass_fields__)
    mine = torch.stack([torch.cat([getattr(row, name).float() for row in rows]) for name in names])
    group = parallel_state.get_data_parallel_group()
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    columns = torch.cat(everyone, dim=1)
    if not run.uses_pairs:
        return SequenceLogps(columns[0], mean_num_tokens)
    return PairLogps(*columns[:4], columns[4].bool())
