"""The quickstart: pretrain a tiny Emu3-shaped model on real digits, fine-tune it with CCA, and look.

Three runs of examples/pretrain_cca_emu3.sh on two processes, as a user would start them, then report.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.paths import path_option, retyped
from megatron_cca.reporting import reported_errors
from megatron_cca.terminal import launcher_environment

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
PROCESSES = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages; those that were finished before are skipped."""
    arguments = _parser().parse_args(argv)
    started = time.perf_counter()
    output = arguments.output
    with reported_errors():
        check_writable(output)
        _train("1/4 pretrain the base, DP 2", EXAMPLES / "emu3_tiny_base.yaml", output / "base", arguments.seed)
        from_base = [f"training.pretrained_checkpoint={retyped(output / 'base')}"]
        _train("2/4 control: more of the same", HERE / "control.yaml", output / "control", arguments.seed, from_base)
        tensor_parallel = [*from_base, f"parallel.tensor_model_parallel_size={PROCESSES}"]
        cca = EXAMPLES / "emu3_tiny_cca.yaml"
        _train("3/4 CCA, TP 2, from the same base", cca, output / "cca", arguments.seed, tensor_parallel)
        print("\n== 4/4 sample and judge", flush=True)
        platform.install("cpu")
        from report import write_report  # it imports Megatron-Core, which the platform must precede

        write_report(output, arguments.seed, arguments.samples)
        seconds = time.perf_counter() - started
        print(f"\ndone in {seconds:.0f} s; open {output / 'samples.png'} and {output / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=path_option, default=Path("runs/quickstart"), help="folder for all results")
    parser.add_argument("--seed", type=int, default=1234, help="of training and sampling")
    parser.add_argument("--samples", type=int, default=2000, help="images drawn per model and guidance scale")
    return parser


def _train(title: str, config: Path, output: Path, seed: int, overrides: list[str] | None = None) -> None:
    print(f"\n== {title}", flush=True)
    settings = [f"training.output_dir={retyped(output)}", f"training.seed={seed}", *(overrides or [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command += [str(EXAMPLES / "pretrain_cca_emu3.sh"), "--device", "cpu", "--config", str(config)]
    command += [argument for setting in settings for argument in ("--set", setting)]
    environment = {**os.environ, **launcher_environment(), "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, env=environment, check=False).returncode != 0:  # noqa: S603 - our own script, no shell
        raise UserError(f"stage {title!r} failed; its message is above")


if __name__ == "__main__":
    main()
