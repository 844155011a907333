"""Plan a run before it costs anything: which layout fits, how fast it will be, and why the others lose."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cca.io.outputs import check_writable
from megatron_cca.lab.planner import CalibrateSettings, DryRunSettings, PlanSettings
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

OPTIONS = {"search": PlanSettings, "dry-run": DryRunSettings, "calibrate": CalibrateSettings}
_EPILOG = """examples (search is meant where no command is named):
  megatron-cca plan --config emu3_8b_cca --gpus 64 --gpu h100-80gb
  megatron-cca plan dry-run --config runs/plan/plan.yaml --gpus 1024 --gpu h100-80gb
  megatron-cca plan calibrate --config emu3_8b_cca --output calibration.json
  megatron-cca plan --config emu3_8b_cca --gpus 512 --gpu h200 --image-grid 90x90 \\
      --vary micro_batch,recompute,reference,precision --output runs/plan

No GPU is needed, and neither checkpoints nor data. megatron-cca plan COMMAND --help says what a command takes.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its command."""
    settings = parse(OPTIONS, argv, __doc__, _EPILOG, default="search")
    with reported_tool_errors(("matplotlib",)):
        if settings.output is not None:
            check_writable(settings.output)
        _run(settings)


def _run(settings: PlanSettings | DryRunSettings | CalibrateSettings) -> None:
    # Imported late: --help need not wait for it.
    from megatron_cca.lab.planner.program import run_calibrate, run_dry, run_search

    run = {PlanSettings: run_search, DryRunSettings: run_dry, CalibrateSettings: run_calibrate}[type(settings)]
    run(settings)
