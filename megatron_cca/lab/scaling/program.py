"""Run a sweep: launch each point on its nodes, measure or plan it, and report all of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.output_folders import claimed
from megatron_cca.io.outputs import file_system_errors, write_text
from megatron_cca.io.paths import retyped
from megatron_cca.lab.scaling import OPTION
from megatron_cca.lab.scaling.sweep import (
    LOGS,
    PLOT,
    RESULTS,
    TABLE,
    Point,
    PointRecord,
    Record,
    Sweep,
    forget_failed,
    open_sweep,
    point_named,
    read_record,
    rows_of,
    write_failed,
    write_finished,
    write_results,
)
from megatron_cca.terminal import launcher_environment

# Holds the process id of the sweep. A point ends with its sweep.
PARENT = "MEGATRON_CCA_SWEEP_PROCESS"
_TOLD = re.compile(r"megatron_cca: error: (.*)|.*?(\w*OutOfMemoryError: .*)")


def launch_point(
    point: Point, sweep: Path, output: Path, script: Path, device: platform.DeviceChoice, timeout: float
) -> None:
    """Start the job and wait until it ends.

    The point has a record afterwards in any case.

    Args:
        point: the point.
        sweep: the sweep's file.
        output: the sweep's folder.
        script: the program whose command ``point`` measures the point.
        device: auto, cpu or cuda.
        timeout: the longest duration of the job in seconds.
    """
    log = output / LOGS / f"{point.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point.num_gpus}"]
    command += [str(script), "point", OPTION, retyped(sweep), "--output", retyped(output)]
    command += ["--point", point.title, "--device", device]
    # The folder takes all temporary files of a killed job with it.
    with TemporaryDirectory(prefix="megatron_cca_sweep_") as scratch, log.open("wb") as file:
        job = subprocess.Popen(  # noqa: S603 - our own program, no shell
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(scratch), start_new_session=True
        )
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            write_failed(output, point, f"not done after {timeout:.0f} s; the sweep's timeout_seconds")
            return
        finally:
            _end(job)
    reason = _reason(log)
    write_failed(output, point, f"{reason}; see {log}" if reason else f"ended with status {status}; see {log}")


def _environment(scratch: str) -> dict[str, str]:
    """Return the environment of the job.

    It sets the number of threads as torchrun would, without torchrun's warning.
    """
    own = {"TMPDIR": scratch, PARENT: str(os.getpid())}
    return {"OMP_NUM_THREADS": "1", **os.environ, **launcher_environment(), **own}


def _end(job: subprocess.Popen, polite_seconds: float = 15) -> None:
    """End a job's processes if any are left.

    torchrun starts its ranks in sessions of their own.

    Args:
        job: the process of torchrun.
        polite_seconds: seconds between SIGTERM and SIGKILL.
    """
    if job.poll() is not None:
        return
    with_children = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    job.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(with_children, timeout=polite_seconds)
    for process in alive:
        process.kill()
    job.wait()


def _reason(log: Path) -> str | None:
    """Return the job's own error message from its log; None if there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [found for line in lines if (found := _TOLD.match(line))]
    return next((found[1] or found[2] for found in told), None)


def leave_with_the_sweep() -> None:
    """Watch the sweep that started this process, and end this process soon after it.

    In a job of another launcher it does nothing.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if not parent.isdecimal():
        raise UserError(
            f"{PARENT}: must be the number of a process, found {parent!r}; unset it, a sweep sets it itself"
        )
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        sweep = psutil.Process(parent)
        while sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


@dataclass(frozen=True)
class RunSettings:
    """The options of a sweep on the command line.

    Attributes:
        sweep: the YAML file.
        output: the folder for all results.
        script: the program, which also starts points.
        device: auto, cpu or cuda.
        retry_failed: whether failed points run again.
        collect: whether to collect existing records and start no points.
    """

    sweep: Path
    output: Path
    script: Path
    device: platform.DeviceChoice
    retry_failed: bool
    collect: bool


def run_sweep(settings: RunSettings) -> None:
    """Measure and plan the missing points, then write the table and the plot.

    Raises:
        UserError: a sweep that cannot run here (before any point runs), or records of different devices.
    """
    sweep = open_sweep(settings.sweep, settings.device, is_elsewhere=settings.collect)
    with claimed(settings.output), file_system_errors(settings.output):
        if settings.retry_failed:
            forget_failed(settings.output, [*sweep.measured, *sweep.planned])
        if not settings.collect:
            _check_this_device(sweep, settings)
            _measure_all(sweep, settings)
        # Imported late: a search loads torch. A mistyped file name must fail faster.
        from megatron_cca.lab.scaling.measure import plan_all

        plan_all(settings.output, sweep.planned)
        _write(sweep, settings.output)


def _check_this_device(sweep: Sweep, settings: RunSettings) -> None:
    is_cpu = platform.num_devices(settings.device)[0] == "cpu"
    for row in rows_of(settings.output, sweep.measured):
        if row.is_finished and row.record["device"].startswith("CPU") != is_cpu:
            here = "a CPU" if is_cpu else "a GPU"
            raise UserError(
                f"--output: {settings.output} holds points of {row.record['device']}, this is {here}; give another "
                "folder, or --collect"
            )


def _measure_all(sweep: Sweep, settings: RunSettings) -> None:
    points, output = sweep.measured, settings.output
    done = [point for point in points if read_record(output, point) is not None]
    with tqdm(total=len(points), initial=len(done), desc=sweep.settings.name, unit="point", disable=None) as bar:
        for point in points:
            # A point of each mode may be the same run.
            if point in done:
                continue
            bar.set_postfix_str(point.title)
            if read_record(output, point) is None:
                seconds = sweep.settings.timeout_seconds
                launch_point(point, settings.sweep, output, settings.script, settings.device, seconds)
            bar.update()
            _tell(bar, PointRecord(point, read_record(output, point)))
            write_results(output, rows_of(output, points))


def _tell(bar: tqdm, row: PointRecord) -> None:
    record = row.record
    how = _speed(record) if row.is_finished else f"failed: {record['reason']}"
    if bar.disable or not row.is_finished:
        bar.write(f"{row.point.title}: {how}", file=sys.stdout)
        sys.stdout.flush()


def _speed(record: Record) -> str:
    unit = "process" if record["device"].startswith("CPU") else "GPU"
    return f"{record['tokens_per_second_per_gpu']:,.0f} tokens/s/{unit}"


def _write(sweep: Sweep, output: Path) -> None:
    # Imported late: the import of matplotlib takes a second. A mistyped file name must fail faster.
    from megatron_cca.lab.scaling.report import plot, table, with_one_peak

    measured, planned = with_one_peak(rows_of(output, sweep.measured)), rows_of(output, sweep.planned)
    _check_one_device(output, measured)
    write_results(output, [*measured, *planned])
    write_text(output / TABLE, table(sweep, measured, planned))
    names = [RESULTS, TABLE]
    if any(row.is_finished for row in (*measured, *planned)):
        plot(output / PLOT, sweep, measured, planned)
        names.append(PLOT)
    print(f"wrote {', '.join(names)} to {output}")
    missing = len(sweep.measured) - len(measured)
    if missing:
        print(f"{missing} of {len(sweep.measured)} points have not been run; run.py list names them")


def _check_one_device(output: Path, rows: Sequence[PointRecord]) -> None:
    devices = sorted({row.record["device"] for row in rows if row.is_finished})
    if len(devices) > 1:
        raise UserError(f"--output: {output} holds points of {' and of '.join(devices)}; give each a folder of its own")


def list_points(path: Path, output: Path, device: platform.DeviceChoice) -> None:
    """Print the measured points with their status.

    Raises:
        UserError: see :func:`open_sweep`.
    """
    for point in open_sweep(path, device, is_elsewhere=True).measured:
        record = read_record(output, point)
        print(f"{point.title:32} {point.num_gpus:5} processes  {'not run' if record is None else record['status']}")


def measure_point(path: Path, output: Path, title: str | None, device: platform.DeviceChoice) -> None:
    """Measure one point inside a job that torchrun, Slurm or Kubernetes has started.

    Rank 0 writes its record.

    Raises:
        UserError: no such point, a job of another size, or a run that training refuses; the record has the last one,
            too.
    """
    leave_with_the_sweep()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    point = point_named(open_sweep(path, device, is_elsewhere=True), title, world_size)
    if point.num_gpus != world_size:
        raise UserError(f"--point: {point.title} is of {point.num_gpus} processes, this job has {world_size}")
    try:
        platform.install(device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    try:
        found = _measured(point)
    except Exception as error:
        # The record keeps the reason of the rank that fails first. Later errors of other ranks follow from it.
        write_failed(output, point, f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{error}")
        raise
    if os.environ.get("RANK", "0") == "0":
        write_finished(output, point, found)
        print(f"{point.title}: {_speed(found)}")


def _measured(point: Point) -> dict:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.lab.planner.candidates import check_candidate, laid_out
    from megatron_cca.lab.planner.program import PACKAGES
    from megatron_cca.lab.scaling.measure import layout_of, measure, planned_candidate
    from megatron_cca.version import code_version, installed_versions

    if point.layout is None:
        config = planned_candidate(point).config
    else:
        config = laid_out(point.config, layout_of(point.layout, point))
        check_candidate(config, point.num_gpus)
    found = measure(point, config)
    dist.destroy_process_group()
    return {
        **found,
        "device": platform.device_name(),
        "host": platform.host_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "versions": installed_versions(PACKAGES),
    }
