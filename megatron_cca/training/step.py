"""One training step: the reference's forward pass, then the policy's forward and backward, on Megatron's schedule."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_cca import platform
from megatron_cca.data.microbatches import Microbatch, StepBatch
from megatron_cca.objectives import PairLogps, SequenceLogps
from megatron_cca.parallel.ranks import all_finite, any_rank, first_problem
from megatron_cca.training import dropout_key, uses_reference_pass
from megatron_cca.training.batches import loader
from megatron_cca.training.log_ratio_gate import LogRatioSpread, log_ratio_spread
from megatron_cca.training.reference import gathered_rows
from megatron_cca.training.setup import Run, seed_step

_TERMS = {
    "policy_positive": "the policy's log p(x|c)",
    "policy_negative": "the policy's log p(x|c')",
    "reference_positive": "the reference's log p(x|c)",
    "reference_negative": "the reference's log p(x|c')",
    "policy": "the policy's log p(x|c)",
}
# The tensors of PairLogps, in its order.
_COLUMNS = [*list(_TERMS)[:4], "negative_is_positive"]


class DataLost(Exception):
    """The error that some rank could not read its batch. All ranks raise it before the same step changes anything."""


@dataclass(frozen=True)
class StepReport:
    """The results of a step.

    Attributes:
        metrics: the objective's metrics over the whole global batch, before the update. The same for any layout.
        log_ratio: policy minus reference over all rows. None without a reference.
        grad_norm: global norm before clipping. NaN if there was no update.
        learning_rate: of this update.
        num_tokens: non-padding tokens that the policy saw, over the global batch.
        image_tokens: image tokens of a row, averaged over the global batch.
        data_wait_seconds: how long this rank waited for the batch.
        problem: why there was no update, in one line. None if there was one.
        reference_is_frozen: of step 0 with an update: whether the reference has the same log-probabilities after it, to
            the last bit. None where it was not computed again.
    """

    metrics: dict[str, float]
    log_ratio: LogRatioSpread | None
    grad_norm: float
    learning_rate: float
    num_tokens: int
    image_tokens: float
    data_wait_seconds: float
    problem: str | None
    reference_is_frozen: bool | None = None


def train_step(run: Run) -> StepReport:
    """Take the step ``run.iteration`` and increase that number. Collective over all ranks.

    If loss or gradients are not finite, weights and optimizer stay as they were.

    Raises:
        DataLost: a batch could not be read.
    """
    step = run.iteration
    if dropout_key(run.config) is not None:
        seed_step(run.config, step)
    run.progress.at("reading the batch" if run.loader.reads else "receiving the batch", step)
    started = time.perf_counter()
    batch, unread = run.loader.attempt(step)
    data_wait_seconds = time.perf_counter() - started
    run.progress.at("reference pass")
    reference = run.reference.logps(batch, step) if run.reference is not None else {}
    run.progress.at("policy pass")
    if run.graphs is not None:
        run.graphs.before_step()
    rows = _policy_pass(run, batch, reference)
    metrics, log_ratio, loss_problem = _global_metrics(run, rows, batch.mean_num_tokens)
    run.progress.at("optimizer step")
    problem = not_finite(run.policy, unread or loss_problem)
    if problem is not None:
        _check_read(unread)
    grad_norm = run.optimizer.step()[1] if problem is None else math.nan
    is_frozen = _is_frozen(run, batch, reference) if step == 0 and problem is None else None
    learning_rate = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step(increment=1)
    run.iteration += 1
    return StepReport(
        metrics=metrics,
        log_ratio=log_ratio,
        grad_norm=float(grad_norm),
        learning_rate=learning_rate,
        num_tokens=batch.num_tokens,
        image_tokens=batch.mean_num_tokens,
        data_wait_seconds=data_wait_seconds,
        problem=problem,
        reference_is_frozen=is_frozen,
    )


def _is_frozen(run: Run, batch: StepBatch, before: dict[int, Tensor]) -> bool | None:
    # A cache cannot move, and dropout draws other masks.
    if not uses_reference_pass(run.config) or dropout_key(run.config) is not None:
        return None
    run.progress.at("reference pass after the first update")
    after = run.reference.logps(batch, 0)
    return not any_rank(any(not torch.equal(after[index], logps) for index, logps in before.items()))


def validate(run: Run) -> dict[str, float]:
    """Return the objective's metrics over all validation batches, the same for any layout. Collective over all ranks.

    Raises:
        DataLost: a batch could not be read.
    """
    for chunk in run.policy:
        chunk.eval()
    unread = None
    with loader(run.config, run.validation.batches) as batches:
        steps = []
        for step in range(run.validation.iters):
            batch, problem = batches.attempt(step)
            unread = unread or problem
            steps.append(_validation_rows(run, batch, step))
    _check_read(unread)
    for chunk in run.policy:
        chunk.train()
    rows = [row for step, _ in steps for row in step]
    return _global_metrics(run, rows, fmean(mean_num_tokens for _, mean_num_tokens in steps))[0]


def not_finite(policy: list[DistributedDataParallel], loss_problem: str | None) -> str | None:
    """Return why there must be no update, in one line. Return None if all is finite. Collective over all ranks.

    If all is finite, it costs one pass over the gradients and two small all-reduces.

    Args:
        policy: model chunks whose gradients have been reduced.
        loss_problem: the result of :func:`terms_not_finite`, the same on every rank of a pipeline.
    """
    gradients_are_finite = all(all_finite(buffer.grad_data) for chunk in policy for buffer in chunk.buffers)
    problems = [first_problem(loss_problem)] if any_rank(loss_problem is not None) else []
    problems += [first_problem(_gradients_not_finite(policy))] if any_rank(not gradients_are_finite) else []
    return "; ".join(found for found in problems if found) or None


def terms_not_finite(rows: PairLogps | SequenceLogps) -> str | None:
    """Return which log-probabilities of a global batch are not finite, in one line. Return None if all are finite."""
    found = []
    for name, values in vars(rows).items():
        if torch.is_tensor(values) and values.is_floating_point():
            bad = int((~torch.isfinite(values)).sum())
            found += [f"{_TERMS.get(name, name)} in {bad} of {values.numel()} rows"] if bad else []
    return f"loss: NaN or infinity in {', '.join(found)}" if found else None


def _gradients_not_finite(policy: list[DistributedDataParallel]) -> str | None:
    bad = [name for name, gradient in _gradients(policy) if not all_finite(gradient)]
    if not bad:
        return None
    groups = Counter(_group(name) for name in bad)
    shown = [f"{group} ({count} tensor{'s' * (count > 1)})" for group, count in list(groups.items())[:3]]
    more = f" and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return f"gradients: NaN or infinity on rank {dist.get_rank()} in {', '.join(shown)}{more}, first in {bad[0]}"


def _gradients(policy: list[DistributedDataParallel]) -> list[tuple[str, Tensor]]:
    """Return the gradients with global names, which number the layers of the whole model."""
    found = []
    for chunk in policy:
        layers = chunk.module.decoder.layers
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad and getattr(parameter, "main_grad", None) is not None:
                head, _, tail = name.partition("decoder.layers.")
                number, _, rest = tail.partition(".")
                # Megatron counts layers from 1, but from 0 in the names of its checkpoints.
                place = f"{layers[int(number)].layer_number - 1}.{rest}" if tail else ""
                found.append((f"{head}decoder.layers.{place}" if tail else name, parameter.main_grad))
    return found


def _group(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[2]}" if name.startswith("decoder.layers.") else parts[0]


def _check_read(problem: str | None) -> None:
    """Raise the problem of any rank on all ranks."""
    found = first_problem(problem)
    if found is not None:
        raise DataLost(found)


def _validation_rows(run: Run, batch: StepBatch, step: int) -> tuple[list[PairLogps | SequenceLogps], float]:
    reference = run.reference.logps(batch, step, "validation") if run.reference is not None else {}
    policy = run.forward.logps(run.policy, batch)
    microbatches = [(batch.microbatches[index], logps, reference.get(index)) for index, logps in policy.items()]
    return [_rows(run, batch, *parts) for parts in microbatches], batch.mean_num_tokens


def _policy_pass(run: Run, batch: StepBatch, reference: dict[int, Tensor]) -> list[PairLogps | SequenceLogps]:
    """Run forward and backward of every microbatch. Return the detached rows on the last stage."""
    collected: list = []

    def loss_of(index: int, microbatch: Microbatch, logps: Tensor) -> tuple[Tensor, dict]:
        rows = _rows(run, batch, microbatch, logps, reference.get(index))
        collected.append(_rows(run, batch, microbatch, logps.detach(), reference.get(index)))
        # Megatron divides the loss in place by the number of microbatches. Therefore the rows are reported.
        return run.config.objective(rows).loss, {}

    for chunk in run.policy:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    run.forward.train(run.policy, batch, loss_of)
    return collected


def _rows(run: Run, batch: StepBatch, microbatch: Microbatch, policy: Tensor, reference: Tensor | None):
    if not run.config.objective.needs_reference:
        return SequenceLogps(policy, batch.mean_num_tokens)
    return PairLogps(*policy.chunk(2), *reference.chunk(2), microbatch.negative_is_positive, batch.mean_num_tokens)


def _global_metrics(
    run: Run, rows: list, mean_num_tokens: float
) -> tuple[dict[str, float], LogRatioSpread | None, str | None]:
    """Return metrics, log-ratios and what is not finite, over all rows of the global batch, on every rank."""
    answer: list = [None, None, None]
    if parallel_state.is_pipeline_last_stage():
        gathered = _gather_rows(run, rows, mean_num_tokens)
        answer[0] = {name: value.item() for name, value in run.config.objective(gathered).metrics.items()}
        if run.config.objective.needs_reference:
            answer[1] = log_ratio_spread(gathered)
        answer[2] = terms_not_finite(gathered)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(
            answer,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
            device=platform.device(),
        )
    return answer[0], answer[1], answer[2]


def _gather_rows(run: Run, rows: list, mean_num_tokens: float) -> PairLogps | SequenceLogps:
    names = ["policy"] if not run.config.objective.needs_reference else _COLUMNS
    mine = torch.stack([torch.cat([getattr(row, name).float() for row in rows]) for name in names])
    columns = gathered_rows(mine)
    if not run.config.objective.needs_reference:
        return SequenceLogps(columns[0], mean_num_tokens)
    return PairLogps(*columns[:4], columns[4].bool(), mean_num_tokens)
