"""Compute the log-probabilities of the frozen reference once, so that training does not need a second model."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import path_option
from megatron_cca.reporting import reported_tool_errors
from megatron_cca.training.checks import check_dropout, check_run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check the configuration, and fill the cache."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_tool_errors(("nvidia",), "data"):
        check_writable(arguments.output)
        config = _with_own_reference(load_config(arguments.config, arguments.set))
        first, last = _steps(arguments.steps, config.training.train_iters)
        check_run(config, int(os.environ["WORLD_SIZE"]))
        platform.install(arguments.device)
        _cache(config, arguments.output, first, last)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: torchrun --nproc_per_node 8 tools/cache_reference.py --config my.yaml --output caches/my; "
        "then train with --set reference.strategy=cached --set reference.cache=caches/my. The cache serves any layout; "
        "log-ratios start at exactly 0 on the layout, micro batch and machine that it was computed with. An "
        "interrupted computation goes on where it was.",
    )
    parser.add_argument(
        "--config", required=True, type=path_option, metavar="FILE", help="the YAML file of the training run"
    )
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the configuration, such as the layout to compute on; may be repeated",
    )
    parser.add_argument(
        "--steps", metavar="FIRST:LAST", help="training steps, LAST excluded (default: 0:training.train_iters)"
    )
    parser.add_argument("--output", required=True, type=path_option, help="a new folder, or a cache to be completed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _with_own_reference(config: Config) -> Config:
    if not config.objective.needs_reference:
        raise UserError(f"objective.name: {config.objective.name} has no reference; nothing to compute")
    # Asked before the strategy counts as another one here: what dropout drew once must not be kept.
    check_dropout(replace(config, reference=replace(config.reference, strategy="cached")))
    strategy = "offload" if config.reference.strategy == "offload" else "resident"
    return replace(config, reference=replace(config.reference, strategy=strategy, cache=None))


def _steps(text: str | None, train_iters: int) -> tuple[int, int]:
    if text is None:
        return 0, train_iters
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--steps: expected FIRST:LAST with FIRST below LAST, such as 0:{train_iters}, found {text!r}")
    return int(found[1]), int(found[2])


def _cache(config: Config, output: Path, first: int, last: int) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.training.batches import open_data
    from megatron_cca.training.caching import cache_reference
    from megatron_cca.training.kernel_checks import check_devices

    check_devices(config)
    cache_reference(config, open_data(config), output, first, last)
    if dist.get_rank() == 0:
        print(f"wrote {output}: steps {first} to {last - 1}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
