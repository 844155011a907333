"""Measure how much precision alone makes a policy and its reference differ, and which beta is safe then."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import name_option, path_option
from megatron_cca.reporting import reported_tool_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check the options, measure, and print the table."""
    arguments = _parser().parse_args(argv)
    with reported_tool_errors(("matplotlib",), "eval"):
        _check(arguments)
        try:
            platform.install(arguments.device)
        except ValueError as error:
            raise UserError(f"--device: {error}") from None
        _measure(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python tools/measure_reference_bias.py --checkpoint checkpoints/emu3_8b --data shards/train "
        "--beta 0.0015 --output bias.json. The objective multiplies log-ratios with beta; a training run stops where "
        "precision alone makes that product larger than 0.05 (root mean square over the rows).",
    )
    parser.add_argument("--checkpoint", required=True, type=name_option, help="a run folder or an iter_ folder")
    parser.add_argument("--data", required=True, type=name_option, help="a folder of token shards, or the word digits")
    parser.add_argument(
        "--rows", type=int, default=32, metavar="N", help="half of them images with their captions, half with others"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="measure the first so many image tokens (default: 256, 512, ... 8192 and the whole image)",
    )
    parser.add_argument("--beta", type=float, help="say of every pair whether this is safe (default: the paper's)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        metavar="NAME",
        help="fp32 bf16 fp8-tensorwise fp8-blockwise (default: what this machine can compute); weights kept in FP8 are "
        "measured with each",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the rows, as training.seed does")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output", type=path_option, metavar="FILE.json", help="also write the numbers there, and FILE.png beside it"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.beta is not None and not arguments.beta > 0:
        raise UserError(f"--beta: must be greater than 0, found {arguments.beta}")
    if arguments.seed < 0:
        raise UserError(f"--seed: must be 0 or more, found {arguments.seed}")
    output = arguments.output
    if output is not None and output.suffix != ".json":
        raise UserError(f"--output: {output} must end in .json")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: the folder {output.parent} does not exist")
    if output is not None:
        check_writable(output)
        # Only the end of the program needs it. If it is missing, report it now.
        import matplotlib  # noqa: F401


def _measure(arguments: argparse.Namespace) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.lab.reference_bias import BiasSettings, measure
    from megatron_cca.lab.reference_bias_report import conclusions, table, write

    names = ("checkpoint", "data", "rows", "lengths", "precisions", "seed")
    settings = BiasSettings(**{name: getattr(arguments, name) for name in names})
    pairs = measure(settings)
    print(f"{arguments.rows} rows; policy - reference in nats, over the first tokens of each image")
    print(table(pairs))
    print(*conclusions(pairs, arguments.beta), sep="\n")
    if arguments.output is not None:
        write(arguments.output, settings, pairs)
        print(f"wrote {arguments.output} and {arguments.output.with_suffix('.png')}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
