"""Train with Condition Contrastive Alignment, or by next-token likelihood; every rank of a job runs this."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.config import Config, ConfigFile, example
from megatron_cca.config.load import load_config
from megatron_cca.data import with_sizes_of_data
from megatron_cca.errors import UserError
from megatron_cca.io.options import DeviceChoice, Overrides, options
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_errors

if TYPE_CHECKING:
    from megatron_cca.training.batches import RunData

_DEFAULT, _BASE = example("emu3_tiny_cca"), example("emu3_tiny_base")
_EXAMPLES = """examples:
  torchrun examples/pretrain_cca_emu3.sh
  torchrun --nproc_per_node 2 examples/pretrain_cca_emu3.sh --set parallel.tensor_model_parallel_size=2
"""


@options
class TrainOptions:
    """The options of a training job. Everything else is in its configuration."""

    config: ConfigFile | None = None
    """YAML file, or the name of an example (default: emu3_tiny_cca, the tiny model on scikit-learn's digits)"""
    overrides: Overrides = ()
    """override a key of the configuration; may be repeated, e.g. --set training.train_iters=10"""
    auto_resume: bool = True
    """continue from the newest whole checkpoint in training.output_dir (default); --no-auto-resume refuses a folder
    that holds one"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""


OPTIONS = TrainOptions


def main(
    argv: Sequence[str] | None = None,
    default_config: Path = _DEFAULT,
    base_config: Path = _BASE,
) -> None:
    """Parse the command line, refuse what cannot run, train.

    Args:
        argv: command-line arguments. None means those of the process.
        default_config: the YAML file to take without ``--config``.
        base_config: the YAML file that pretrains the default's base model, if that does not exist yet.
    """
    given = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_errors():
        config = with_sizes_of_data(load_config(given.config or default_config, given.overrides))
        # Imported late: --help and a mistyped key need not wait for it.
        from megatron_cca import platform

        is_default = given.config is None or given.config.samefile(default_config)
        base = _missing_base(config, load_config(default_config), base_config) if is_default else None
        runs = [config] if base is None else [base, config]
        _check_all(runs)
        for run in runs:
            check_writable(Path(run.training.output_dir), "training.output_dir")
        if not given.auto_resume:
            _check_fresh(config)
        platform.install_option(given.device)
        # Import late: Megatron-Core must not be imported before the platform is installed.
        import torch.distributed as dist

        from megatron_cca.training.loop import train

        for run, data in _with_data(runs):
            train(run, data)
        dist.destroy_process_group()


def _missing_base(config: Config, default: Config, base_config: Path) -> Config | None:
    """Return the run that pretrains the default configuration's base. Return None if it is not needed or exists."""
    from megatron_cca.checkpoint import layout

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
    from megatron_cca.training.checks import check_new_run, check_run
    from megatron_cca.training.resuming import check_resume

    if runs[-1].logging.wandb or runs[-1].logging.mlflow:
        from megatron_cca.training.trackers import check_trackers

        check_trackers(runs[-1].logging)
    world_size = int(os.environ["WORLD_SIZE"])
    check_run(runs[0], world_size)
    if len(runs) > 1:
        # The base of this run does not exist yet. Everything else can be checked now.
        check_new_run(replace(runs[1], training=replace(runs[1].training, pretrained_checkpoint=None)), world_size)
        check_resume(runs[1], start_exists=False)


def _check_fresh(config: Config) -> None:
    from megatron_cca.checkpoint import layout

    root = Path(config.training.output_dir) / layout.FOLDER
    if layout.iterations(root):
        raise UserError(
            f"training.output_dir: {root} holds checkpoints, the newest of step {layout.iterations(root)[-1]}; leave "
            "--no-auto-resume out to continue, or choose another folder"
        )


def _with_data(runs: Sequence[Config]) -> Iterator[tuple[Config, RunData]]:
    """Yield each run with its data. Check what could not be checked before the run in front of it ended."""
    from megatron_cca.training import computes_plainly
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.resuming import check_resume

    # Another thread reads ahead. By default this thread would wait 5 ms each time it takes the interpreter from it.
    sys.setswitchinterval(1e-4)
    for config in runs:
        if not computes_plainly(config):
            from megatron_cca.training.kernel_checks import check_devices

            check_devices(config)
    for config in runs:
        data = open_data(config)
        if config.reference.strategy == "cached":
            from megatron_cca.training.caching import check_cache

            check_cache(config, data)
        # Check again, since the base of this run may have been trained just now.
        check_resume(config)
        yield config, data
