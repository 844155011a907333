"""Kill a training run again and again, at random moments and in the middle of saves; nothing may be lost.

    .venv/bin/python -m tests.soak                  50 kills, some minutes on two cores
    .venv/bin/python -m tests.soak --kills 500 --seed 7

A run on two ranks is started, one of its ranks (or the process that writes its checkpoint) gets SIGKILL, the other is
ended as a launcher would, and the same command line starts again. After every kill the newest checkpoint must be whole
and not older than the one before; in the end weights and optimizer must equal an uninterrupted run's, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from tests.distributed.launch import ROOT, end_job, start_job

SCRIPT = ROOT / "examples" / "pretrain_cca_emu3.sh"
RANKS = 2
LAYOUTS = {
    "TP 2": ["parallel.tensor_model_parallel_size=2"],
    "PP 2": ["parallel.pipeline_model_parallel_size=2"],
    "DP 2": [],
}
_ATTEMPT_SECONDS = 120
_SAVE_SECONDS = 10


@dataclass
class Tally:
    """What the kills met.

    Attributes:
        kills, in_saves: all, and those while a checkpoint was being written.
        steps: of the newest checkpoint after each kill.
    """

    kills: int = 0
    in_saves: int = 0
    steps: list[int] = field(default_factory=list)


def command(folder: Path, data: str, train_iters: int, layout_name: str) -> list[str]:
    """The arguments of a run that saves every second step and keeps three checkpoints."""
    settings = {
        "data.path": data,
        "training.pretrained_checkpoint": "null",
        "training.output_dir": str(folder),
        "training.train_iters": train_iters,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 4,
        "training.save_interval": 2,
        "training.keep_last": 3,
        "training.keep_every": 10,
        "logging.tensorboard": "false",
        "faults.hang_timeout_seconds": 60,
    }
    settings |= dict(setting.split("=") for setting in LAYOUTS[layout_name])
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def soak(folder: Path, data: str, kills: int, layout_name: str, seed: int, *, shown: bool = True) -> Tally:
    """Kill ``kills`` times, then let the run end, and compare it with one that was left alone.

    Raises:
        AssertionError: a checkpoint was lost or damaged, or the weights differ.
    """
    dice, tally = random.Random(seed), Tally()  # noqa: S311
    train_iters = 2 * kills + 4
    whole, killed = folder / "whole", folder / "killed"
    _run_to_end(folder, command(whole, data, train_iters, layout_name))
    arguments = command(killed, data, train_iters, layout_name)
    with tqdm(total=kills, desc=f"soak, {layout_name}", unit="kill", disable=not shown) as bar:
        while tally.kills < kills:
            if _kill_once(folder, arguments, killed, dice, tally):
                bar.update()
            _check_nothing_lost(killed, tally)
    _run_to_end(folder, arguments)
    _compare(whole, killed, train_iters)
    return tally


def _kill_once(folder: Path, arguments: list[str], run: Path, dice: random.Random, tally: Tally) -> bool:
    """Whether there was somebody to kill: the run may have ended before."""
    root = run / layout.FOLDER
    ranks = start_job(RANKS, SCRIPT, *arguments, cwd=folder)
    try:
        _wait_for_life(run, ranks)
        in_save = dice.random() < 0.5
        deadline = time.monotonic() + (_SAVE_SECONDS if in_save else dice.uniform(0.0, 1.5))
        while time.monotonic() < deadline and all(rank.is_alive() for rank in ranks):
            if in_save and any(root.glob(".iter_*")):
                time.sleep(dice.uniform(0.0, 0.15))
                break
            time.sleep(0.001)
        victims = [rank.pid for rank in ranks if rank.is_alive()]
        if not victims:
            return False
        writers = [child.pid for pid in victims for child in psutil.Process(pid).children()]
        tally.in_saves += any(root.glob(".iter_*"))
        os.kill(dice.choice([*victims, *writers]), signal.SIGKILL)
        tally.kills += 1
        # A launcher needs a moment to notice; what the survivors do until then must do no harm.
        time.sleep(dice.uniform(0.0, 0.3))
        return True
    finally:
        end_job(ranks)


def _wait_for_life(run: Path, ranks: list) -> None:
    """Until the first step of this attempt: before it there is nothing to lose."""
    metrics = run / "metrics.jsonl"
    before, deadline = _mark(metrics), time.monotonic() + _ATTEMPT_SECONDS
    while _mark(metrics) == before and all(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.01)


def _mark(file: Path) -> tuple[int, int]:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime_ns, file.stat().st_size
    return (0, 0)


def _run_to_end(folder: Path, arguments: list[str]) -> None:
    ranks = start_job(RANKS, SCRIPT, *arguments, cwd=folder)
    for rank in ranks:
        rank.join(10 * _ATTEMPT_SECONDS)
        if rank.exitcode != 0:
            end_job(ranks)
            said = "\n".join((folder / f"rank{index}.err").read_text()[-3000:] for index in range(RANKS))
            raise AssertionError(f"the run ended with {rank.exitcode}:\n{said}")


def _check_nothing_lost(run: Path, tally: Tally) -> None:
    """What has a checkpoint's name is whole, and the newest is not older than it was."""
    root = run / layout.FOLDER
    # What a kill between two renames leaves is put back at the next start, and so here.
    layout.tidy(root)
    found = layout.iterations(root)
    for number in found:
        check_whole(layout.iteration_folder(root, number), "soak")
    before = tally.steps[-1] if tally.steps else 0
    assert (found[-1] if found else 0) >= before, f"step {before} was saved, now there are {found}"
    tally.steps.append(found[-1] if found else 0)


def _compare(whole: Path, killed: Path, iteration: int) -> None:
    first, second = (
        StoredTensors(layout.iteration_folder(run / layout.FOLDER, iteration), "soak") for run in (whole, killed)
    )
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        zeros, shape = [0] * len(first.shape(name)), first.shape(name)
        one, other = (stored.read_block(name, zeros, shape) for stored in (first, second))
        assert torch.equal(one, other), f"{name} differs from the uninterrupted run's"


def main() -> None:
    """Soak, and print what it met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="over all layouts (default 50)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from megatron_cca.config import ModelConfig
    from megatron_cca.data.digits import digit_shards

    data, started = str(digit_shards(ModelConfig()).resolve()), time.monotonic()
    shares = [len(range(index, arguments.kills, len(arguments.layouts))) for index in range(len(arguments.layouts))]
    with tempfile.TemporaryDirectory() as folder:
        for name, kills in zip(arguments.layouts, shares, strict=True):
            place = Path(folder) / name.replace(" ", "")
            place.mkdir()
            try:
                tally = soak(place, data, kills, name, arguments.seed)
            except (AssertionError, UserError) as error:
                sys.exit(f"soak, {name}, seed {arguments.seed}: {error}")
            print(
                f"{name}: {tally.kills} kills, {tally.in_saves} of them during a save; 0 checkpoints lost, 0 damaged; "
                "weights and optimizer equal the uninterrupted run's bit for bit"
            )
    print(f"{arguments.kills} kills in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
