"""The training loop, top to bottom."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_cca import platform
from megatron_cca.checkpoint import distributed
from megatron_cca.checkpoint.summary import summarize
from megatron_cca.config import Config, config_to_dict
from megatron_cca.models import explicit
from megatron_cca.models.gpt import num_model_chunks
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.training.batches import RunData
from megatron_cca.training.log_ratio_gate import judge
from megatron_cca.training.metrics import MetricsLog
from megatron_cca.training.pictures import open_pictures
from megatron_cca.training.setup import Run, set_up
from megatron_cca.training.step import StepReport, train_step, validate


def train(config: Config, data: RunData) -> None:
    """Train to ``training.train_iters``, continuing from the newest checkpoint in ``training.output_dir``.

    Collective over all ranks of the job. The configuration must have passed :func:`checks.check_run`.
    """
    initialize_distributed(config)
    run = set_up(config, data)
    with run.loader:
        if run.iteration >= config.training.train_iters:
            reached = f"{config.training.output_dir} is already at step {run.iteration}"
            _say(f"{reached}; raise training.train_iters to go on")
            return
        _train(run)


def _train(run: Run) -> None:
    config = run.config
    if dist.get_rank() != 0:
        _loop(run, None)
        return
    output = Path(config.training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config_to_dict(explicit(config)), sort_keys=False))
    options = {"tensorboard": config.logging.tensorboard, "progress_bar": config.logging.progress_bar}
    with MetricsLog(output, run.iteration, config.training.train_iters, **options) as log:
        log.say(_headline(run))
        _loop(run, log)


def _loop(run: Run, log: MetricsLog | None) -> None:
    training = run.config.training
    pictures = open_pictures(run)
    if pictures is not None and run.iteration == 0:
        pictures.draw(0, log)
    while run.iteration < training.train_iters:
        step = run.iteration
        started = time.perf_counter()
        report = train_step(run)
        platform.synchronize()
        row = _row(run, step, report, time.perf_counter() - started)
        if step == 0:
            _check_first_step(run, report, log)
        if run.validation is not None and run.iteration % run.config.validation.interval == 0:
            row |= {f"validation_{name}": value for name, value in validate(run).items()}
        if log is not None:
            log.write(row)
        if pictures is not None and run.iteration % run.config.logging.sample_interval == 0:
            pictures.draw(run.iteration, log)
        at_end = run.iteration == training.train_iters
        if at_end or (training.save_interval and run.iteration % training.save_interval == 0):
            save_checkpoint(run, log)


def _check_first_step(run: Run, report: StepReport, log: MetricsLog | None) -> None:
    if report.log_ratio is None:
        return
    line = judge(run.config, getattr(run.objective, "beta", None), report.log_ratio)
    if log is not None:
        log.say(line)


def _row(run: Run, step: int, report: StepReport, seconds: float) -> dict[str, float]:
    return {
        "step": step,
        **report.metrics,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "samples_per_second": run.config.training.global_batch_size / seconds,
        "tokens_per_second": report.num_tokens / seconds,
        "data_wait": report.data_wait_seconds / seconds,
        "peak_memory_gib": platform.peak_memory_bytes() / 2**30,
    }


def save_checkpoint(run: Run, log: MetricsLog | None = None) -> None:
    """Save the run's state at its present step. Collective over all ranks."""
    summary = summarize(run.config, run.batches.data.fingerprint())
    distributed.save(run.checkpoints, run.iteration, run.policy_chunks, run.optimizer, summary, run.start)
    if log is not None:
        log.say(f"saved {run.checkpoints} at step {run.iteration}")


def _headline(run: Run) -> str:
    config = run.config
    parallel = config.parallel
    sizes = [f"TP {parallel.tensor_model_parallel_size}", f"PP {parallel.pipeline_model_parallel_size}"]
    if num_model_chunks(parallel) > 1:
        sizes.append(f"VPP {num_model_chunks(parallel)}")
    if parallel.context_parallel_size > 1:
        sizes.append(f"CP {parallel.context_parallel_size}")
    layout = f"{' x '.join(sizes)} on {dist.get_world_size()} process(es), {platform.device_name()}"
    resumed = f", continuing at step {run.iteration}" if run.iteration else ""
    return f"{config.objective.name}: {config.model.name}, {config.training.precision}, {layout}{resumed}"


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
