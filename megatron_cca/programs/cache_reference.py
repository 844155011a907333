"""Compute the frozen reference's log-probabilities once, so that training needs no second model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from megatron_cca.config import Config, ConfigFile
from megatron_cca.config.load import load_config
from megatron_cca.data import with_sizes_of_data
from megatron_cca.errors import UserError
from megatron_cca.io.options import DeviceChoice, Folder, Option, Overrides, options
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

_EXAMPLE = """example:
  torchrun --nproc_per_node 8 -m megatron_cca cache-reference --config my.yaml --output caches/my

Then train with --set reference.strategy=cached --set reference.cache=caches/my. The cache serves any layout; log-ratios
start at exactly 0 on the layout, micro batch and machine that it was computed with. The same command
continues an interrupted computation.
"""


@options
class CacheOptions:
    """The run whose reference is computed, and the steps."""

    config: ConfigFile
    """the YAML file of the training run, or the name of an example"""
    output: Folder
    """a new folder, or a cache to complete"""
    overrides: Overrides = ()
    """override a key of the configuration, such as the layout to compute on; may be repeated"""
    steps: Annotated[str, Option(metavar="FIRST:LAST")] | None = None
    """the training steps to compute, without LAST (default: 0:training.train_iters)"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""


OPTIONS = CacheOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot run, fill the cache."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLE)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_tool_errors(("nvidia",)):
        check_writable(given.output)
        # Imported late: --help need not wait for it.
        from megatron_cca import platform
        from megatron_cca.training.checks import check_run

        config = _with_own_reference(with_sizes_of_data(load_config(given.config, given.overrides)))
        first, last = _steps(given.steps, config.training.train_iters)
        check_run(config, int(os.environ["WORLD_SIZE"]))
        platform.install_option(given.device)
        _cache(config, given.output, first, last)


def _with_own_reference(config: Config) -> Config:
    from megatron_cca.training.checks import check_dropout

    if not config.objective.needs_reference:
        raise UserError(f"objective.name: {config.objective.name} has no reference; nothing to compute")
    # Check before the strategy is replaced below: a cache must not keep one draw of dropout.
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
