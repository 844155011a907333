"""The training loop, from top to bottom."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist
import yaml

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict
from megatron_cca.errors import Stopped, UserError
from megatron_cca.io.outputs import write_text
from megatron_cca.models import explicit
from megatron_cca.models.gpt import num_model_chunks
from megatron_cca.models.layers import engine_is_available
from megatron_cca.parallel.ranks import described, initialize_distributed, largest
from megatron_cca.terminal import report_losses_to
from megatron_cca.training.batches import ContrastWatch, RunData
from megatron_cca.training.faults import Alarms, check_alarms, skipped_in_a_row, stop_without_data
from megatron_cca.training.log_ratio_gate import check_log_ratio
from megatron_cca.training.run_log import MetricsLog, RunLog
from megatron_cca.training.saving import StopRequest, finish_saves, report_finished_saves, save_checkpoint, warn_of_fork
from megatron_cca.training.setup import Run, set_up
from megatron_cca.training.step import DataLost, StepReport, train_step, validate
from megatron_cca.training.watchdog import watched
from megatron_cca.version import code_version

if TYPE_CHECKING:
    from megatron_cca.training.pictures import SamplePictures


def train(config: Config, data: RunData) -> None:
    """Train to ``training.train_iters``. Continue from the newest whole checkpoint in ``training.output_dir``.

    Collective over all ranks of the job. The configuration must have passed :func:`checks.check_run`.

    Raises:
        Stopped: a signal of :data:`terminal.STOPPING` came, and the run is saved.
        UserError: loss or gradients are not finite, an alarm ends the run, or the last save failed.
    """
    initialize_distributed(config)
    with set_up(config, data) as run:
        if run.iteration < config.training.train_iters:
            with _reporting(run) as log:
                _loop(run, log)
        elif dist.get_rank() == 0:
            reached = f"{config.training.output_dir} is already at step {run.iteration}"
            print(f"{reached}; raise training.train_iters to go on", flush=True)


@contextmanager
def _reporting(run: Run) -> Iterator[RunLog]:
    """Open the run's logs, and record the error that ends the block."""
    output = Path(run.config.training.output_dir)
    with RunLog(output) as log, report_losses_to(partial(_report_lost_output, log)), ExitStack() as stack:
        try:
            if dist.get_rank() == 0:
                _write_config(run.config, output)
                log.metrics = stack.enter_context(_open_metrics(run, output, log))
                if run.config.logging.wandb or run.config.logging.mlflow:
                    from megatron_cca.training.trackers import Trackers

                    stack.enter_context(Trackers(run.config, log))
                _report_start(run, log)
            yield log
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, Stopped):
                log.own_event("failed", step=run.iteration, error=described(error))
            raise


def _report_lost_output(log: RunLog, stream: str, reason: str) -> None:
    line = f"{stream} cannot be written ({reason}); the run goes on, its logs are in its folder"
    log.own_event("output_lost", reason=line)
    print(f"megatron_cca: {line}", file=sys.stderr, flush=True)


def _write_config(config: Config, output: Path) -> None:
    try:
        write_text(output / "config.yaml", yaml.safe_dump(config_to_dict(explicit(config)), sort_keys=False))
    except OSError as error:
        raise UserError(f"training.output_dir: cannot be written: {described(error)}; choose another") from None


def _open_metrics(run: Run, output: Path, log: RunLog) -> MetricsLog:
    config = run.config
    return MetricsLog(
        output,
        run.iteration,
        config.training.train_iters,
        tensorboard=config.logging.tensorboard,
        progress_bar=config.logging.progress_bar,
        on_loss=lambda line: log.own_event("logs_lost", reason=line),
    )


def _report_start(run: Run, log: RunLog) -> None:
    began = {"step": run.iteration, "world_size": dist.get_world_size(), "host": platform.host_name()}
    began |= {"device": platform.device_name(), "loader": run.loader.loader}
    log.event("resumed" if run.iteration else "started", _headline(run), **began, code=code_version())
    if engine_is_available():
        from megatron_cca.training.kernel_checks import attention_lines

        for line in attention_lines(run.config, has_engine=True):
            log.info(line)
    if run.config.objective.reference_draws_partners:
        from megatron_cca.training.drawn_partners import lines_on_undrawn

        batches = [run.batches] if run.validation is None else [run.batches, run.validation.batches]
        for line in lines_on_undrawn(run.config, [one.data for one in batches]):
            log.info(line)
    for line in run.passed_over:
        log.event("passed_over", f"passed over: {line}", reason=line)
    warn_of_fork(run, log)


def _loop(run: Run, log: RunLog) -> None:
    training = run.config.training
    pictures, alarms, skipped = _pictures(run), Alarms(run.config), 0
    contrast = _watch_contrast(run, log)
    with StopRequest() as stop, watched(run.progress, log, run.config.faults.hang_timeout_seconds):
        if pictures is not None and run.iteration == 0:
            pictures.draw(0, log.metrics)
        while run.iteration < training.train_iters:
            started = time.perf_counter()
            try:
                report = train_step(run)
                platform.synchronize()
                _report_step(run, report, time.perf_counter() - started, log, contrast)
            except DataLost as lost:
                stop_without_data(run, lost, log)
            skipped = skipped_in_a_row(run, report, skipped, log)
            check_alarms(run, alarms, report, log)
            if pictures is not None and run.iteration % run.config.logging.sample_interval == 0:
                run.progress.at("drawing pictures")
                pictures.draw(run.iteration, log.metrics)
            signal_number = largest(stop.number)
            at_end = run.iteration == training.train_iters
            if at_end or signal_number or (training.save_interval and run.iteration % training.save_interval == 0):
                save_checkpoint(run, log)
            else:
                report_finished_saves(run, run.saver.poll(), log)
            if signal_number and not at_end:
                _stop(run, signal_number, log)
            run.progress.step_done()
        _finish(run, log)


def _pictures(run: Run) -> SamplePictures | None:
    if not run.config.logging.sample_interval:
        return None
    # The module imports much, and few runs draw pictures.
    from megatron_cca.training.pictures import open_pictures

    return open_pictures(run)


def _watch_contrast(run: Run, log: RunLog) -> ContrastWatch | None:
    if not run.config.objective.needs_reference or log.metrics is None:
        return None
    watch = ContrastWatch(run.config, run.batches.data)
    watch.begin(log)
    return watch


def _report_step(run: Run, report: StepReport, seconds: float, log: RunLog, contrast: ContrastWatch | None) -> None:
    """Validate if it is time, and log the step before ``run.iteration``. Collective over all ranks."""
    step = run.iteration - 1
    row = _row(run, step, report, seconds)
    if step == 0 and report.problem is None:
        _check_first_step(run, report, log)
    if run.validation is not None and run.iteration % run.config.validation.interval == 0:
        run.progress.at("validation")
        row |= {f"validation_{name}": value for name, value in validate(run).items()}
    if log.metrics is not None:
        log.metrics.write(row)
    if contrast is not None:
        contrast.after(step, row, log)


def _stop(run: Run, signal_number: int, log: RunLog) -> NoReturn:
    finish_saves(run, log)
    name = signal.Signals(signal_number).name
    saved = run.saver.last_saved
    kept = f"step {saved} is saved" if saved is not None else "nothing is saved"
    log.event("stopped", step=run.iteration, signal=name, saved=saved)
    raise Stopped(f"{name}: {kept} in {run.config.training.output_dir}; the same command continues", signal_number)


def _finish(run: Run, log: RunLog) -> None:
    finish_saves(run, log)
    if run.saver.last_saved != run.iteration:
        raise UserError(
            f"training.output_dir: step {run.iteration}, the last one, could not be saved in {run.checkpoints} (see "
            "above); make room, then the same command continues from the newest checkpoint"
        )
    log.event("finished", step=run.iteration)


def _check_first_step(run: Run, report: StepReport, log: RunLog) -> None:
    if report.log_ratio is None:
        return
    log.info(check_log_ratio(run.config, report.log_ratio))
    if report.reference_is_frozen is False:
        raise UserError(
            "reference: its log-probabilities of step 0 are others after the first update, so that it is not frozen; "
            "report this, with the configuration"
        )
    if report.reference_is_frozen:
        log.info("reference: frozen; the first update left its log-probabilities as they were, to the last bit")


def _row(run: Run, step: int, report: StepReport, seconds: float) -> dict[str, float]:
    return {
        "step": step,
        **report.metrics,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "samples_per_second": run.config.training.global_batch_size / seconds,
        "tokens_per_second": report.num_tokens / seconds,
        "data_wait": report.data_wait_seconds / seconds,
        "support_size": len(run.forward.head["support"]),
        "peak_memory_gib": platform.peak_memory_bytes() / 2**30,
    }


def _headline(run: Run) -> str:
    config = run.config
    parallel = config.parallel
    sizes = [f"TP {parallel.tensor_model_parallel_size}", f"PP {parallel.pipeline_model_parallel_size}"]
    if num_model_chunks(parallel) > 1:
        sizes.append(f"VPP {num_model_chunks(parallel)}")
    if parallel.context_parallel_size > 1:
        sizes.append(f"CP {parallel.context_parallel_size}")
    where = f"{' x '.join(sizes)} on {dist.get_world_size()} process(es), {platform.device_name()}"
    where += f", batches through {run.loader.loader}"
    resumed = f", continuing at step {run.iteration}" if run.iteration else ""
    support = ", normalised over visual words" if config.objective.normalization == "image" else ""
    return f"{config.objective.name}{support}: {config.model.name}, {config.training.precision}, {where}{resumed}"
