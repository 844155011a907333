"""Measure how far apart precision alone moves a policy and its reference, and which beta is safe with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from megatron_cca.errors import UserError
from megatron_cca.io.options import DeviceChoice, File, Option, options
from megatron_cca.io.outputs import check_writable
from megatron_cca.lab.reference_bias import BiasSettings
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

_EXAMPLE = """example:
  megatron-cca measure-reference-bias --checkpoint checkpoints/emu3_8b --data shards/train --beta 0.0015 \\
      --output bias.json

The objective multiplies log-ratios with beta; a training run stops where precision alone makes that
product larger than 0.05 (root mean square over the rows).
"""


@options
class BiasOptions:
    """The measurement, and what to do with the numbers."""

    settings: BiasSettings
    beta: Annotated[float, Field(gt=0)] | None = None
    """say for every pair whether this beta is safe (default: the paper's, 0.02 at 576 tokens, times 576 / tokens)"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""
    output: Annotated[File, Option(metavar="FILE.json")] | None = None
    """also write the numbers there, and FILE.png beside it"""


OPTIONS = BiasOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be measured, print the table."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLE)
    with reported_tool_errors(("matplotlib",)):
        _check_output(given)
        # Imported late: --help need not wait for it.
        from megatron_cca import platform

        platform.install_option(given.device)
        _measure(given)


def _check_output(given: BiasOptions) -> None:
    output = given.output
    if output is None:
        return
    if output.suffix != ".json":
        raise UserError(f"--output: {output} must end in .json")
    if not output.parent.is_dir():
        raise UserError(f"--output: the folder {output.parent} does not exist")
    check_writable(output)
    # Needed only at the end. If it is missing, fail now.
    import matplotlib  # noqa: F401


def _measure(given: BiasOptions) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.lab.reference_bias.measure import conclusions, measure, table, write

    pairs = measure(given.settings)
    print(f"{given.settings.rows} rows; policy - reference in nats, over the first tokens of each image")
    print(table(pairs))
    print(*conclusions(pairs, given.beta), sep="\n")
    if given.output is not None:
        write(given.output, given.settings, pairs)
        print(f"wrote {given.output} and {given.output.with_suffix('.png')}")
    dist.destroy_process_group()
