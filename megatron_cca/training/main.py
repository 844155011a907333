"""The training program: what ``examples/pretrain_cca_emu3.sh`` runs on every rank."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_cca import platform
from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import path_option
from megatron_cca.reporting import reported_errors
from megatron_cca.training.checks import check_new_run, check_run
from megatron_cca.training.resuming import check_resume


def main(default_config: Path, base_config: Path, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot run, train.

    Args:
        default_config: the YAML file taken without ``--config``.
        base_config: how to pretrain the default's base model where it is not there yet.
        argv: command-line arguments; None means the process's.
    """
    arguments = _parser(default_config).parse_args(argv)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_errors():
        config = load_config(arguments.config or default_config, arguments.set)
        base = None if arguments.config else _missing_base(config, load_config(default_config), base_config)
        runs = [config] if base is None else [base, config]
        _check_all(runs)
        for run in runs:
            check_writable(Path(run.training.output_dir), "training.output_dir")
        if not arguments.auto_resume:
            _check_fresh(config)
        _install(arguments.device)
        _train_all(runs)


def _parser(default_config: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_cca_emu3.sh",
        description="Train with Condition Contrastive Alignment (or next-token likelihood) on Megatron-Core.",
        epilog="Examples: torchrun examples/pretrain_cca_emu3.sh | torchrun --nproc_per_node 2 "
        "examples/pretrain_cca_emu3.sh --set parallel.tensor_model_parallel_size=2",
    )
    parser.add_argument(
        "--config",
        type=path_option,
        metavar="FILE",
        help=f"YAML file (default: {default_config.name}: the tiny model on scikit-learn's digits)",
    )
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the configuration; may be repeated, e.g. --set training.train_iters=10",
    )
    parser.add_argument(
        "--auto-resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue from the newest whole checkpoint in training.output_dir (default); --no-auto-resume refuses a "
        "folder that holds one",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one"
    )
    return parser


def _missing_base(config: Config, default: Config, base_config: Path) -> Config | None:
    """The run that pretrains the default configuration's base, if it is wanted and not there yet."""
    wanted = config.training.pretrained_checkpoint
    if wanted is None or wanted != default.training.pretrained_checkpoint:
        return None
    base = load_config(base_config)
    base = replace(
        base,
        model=config.model,
        parallel=config.parallel,
        data=replace(base.data, path=config.data.path),
        training=replace(base.training, output_dir=wanted),
    )
    iteration = layout.newest_complete(Path(wanted) / layout.FOLDER)
    return base if iteration is None or iteration < base.training.train_iters else None


def _check_all(runs: Sequence[Config]) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    check_run(runs[0], world_size)
    if len(runs) > 1:
        # Its base does not exist yet; everything else about it can be refused now.
        check_new_run(replace(runs[1], training=replace(runs[1].training, pretrained_checkpoint=None)), world_size)
        check_resume(runs[1], start_exists=False)


def _check_fresh(config: Config) -> None:
    root = Path(config.training.output_dir) / layout.FOLDER
    if layout.iterations(root):
        raise UserError(
            f"training.output_dir: {root} holds checkpoints, the newest of step {layout.iterations(root)[-1]}; leave "
            "--no-auto-resume out to continue, or choose another folder"
        )


def _install(device: platform.DeviceChoice) -> None:
    try:
        platform.install(device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def _train_all(runs: Sequence[Config]) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.training.batches import open_data
    from megatron_cca.training.kernel_checks import check_devices
    from megatron_cca.training.loop import train

    # A thread reads ahead; whenever this one wants the interpreter from it, it would wait the default of 5 ms.
    sys.setswitchinterval(1e-4)
    for config in runs:
        check_devices(config)
    for config in runs:
        data = open_data(config)
        if config.reference.strategy == "cached":
            from megatron_cca.training.caching import check_cache

            check_cache(config, data)
        # Once more, for a run whose base has only just been trained.
        check_resume(config)
        train(config, data)
    dist.destroy_process_group()
