"""Self-play by Direct Discriminative Optimization (arXiv 2503.01103): draw, train against the drawn images, repeat.

In each round the newest model draws an image for every sample of the data, guidance-free. Then it is trained to tell
the real images from these, with itself as the reference. The result begins the next round. It ends after so many
rounds, or when the FID does not fall.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable, write_json
from megatron_cca.io.paths import path_option, retyped
from megatron_cca.reporting import reported_errors
from megatron_cca.terminal import launcher_environment

HERE = Path(__file__).resolve().parent
DRAWN, MODEL, SAMPLES, JUDGED = "drawn", "model", "samples", "judged"
ROUNDS = "rounds.json"


class Round(NamedTuple):
    """A round: the model before it, and what it leaves in its folder.

    Attributes:
        number: from 1 on. Round 0 is the base, which is only judged.
        start: the checkpoint that draws, that the training begins with, and that is its reference.
        folder: of its results.
    """

    number: int
    start: Path
    folder: Path

    @property
    def result(self) -> Path:
        """The checkpoint after it."""
        return self.folder / MODEL if self.number else self.start


def main(argv: Sequence[str] | None = None) -> None:
    """Run all rounds; what was finished before is not done again."""
    options = _parser().parse_args(argv)
    with reported_errors():
        check_writable(options.output)
        _check_same_base(options)
        results, start = [], options.base
        for number in range(options.rounds + 1):
            one = Round(number, start, options.output / f"round_{number}")
            if number:
                _draw(one, options)
                _train(one, options)
            results.append({"round": number, "checkpoint": str(one.result), **_judge(one, options)})
            write_json(options.output / ROUNDS, results)
            print(table(results), flush=True)
            if number and results[-1]["fid"] >= results[-2]["fid"]:
                print(f"round {number}: the FID does not fall; the best model is {results[-2]['checkpoint']}")
                return
            start = one.result
        print(f"the best model is {results[-1]['checkpoint']}")


def table(results: Sequence[dict]) -> str:
    """Return the rounds so far as a table in Markdown."""
    names = [name for name in ("fid", "inception_score", "class_accuracy") if name in results[0]]
    rows = [["round", *names], ["---:"] * (1 + len(names))]
    rows += [[str(row["round"]), *(f"{row[name]:.4g}" for name in names)] for row in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=path_option, required=True, help="the run or checkpoint to begin with")
    add("--config", type=path_option, default=HERE / "ddo.yaml", help="of a round's training (default: of the digits)")
    add("--output", type=path_option, default=Path("runs/self_play"), help="folder for all rounds")
    add("--rounds", type=int, default=2, help="at most")
    add("--prompts", type=path_option, help="JSON lines to judge with (default: all classes of the model)")
    add("--images-per-prompt", type=int, default=200, help="images to judge with, for each prompt or class")
    add("--reference", type=path_option, default="digits", help="real images to compare with, as evaluate takes them")
    add("--extractor", default="digits", help="features, as evaluate takes them")
    add("--processes", type=int, default=1, help="of torchrun, for drawing and training")
    return parser


def _check_same_base(options: argparse.Namespace) -> None:
    path = options.output / ROUNDS
    first = json.loads(path.read_text())[0]["checkpoint"] if path.is_file() else str(options.base)
    if first != str(options.base):
        raise UserError(f"--output: {options.output} holds rounds that began with {first}; give another folder")


def _draw(one: Round, options: argparse.Namespace) -> None:
    # It imports Megatron-Core, which a bad option need not wait for.
    from megatron_cca.data.digits import data_folders

    output, config = one.folder / DRAWN, load_config(options.config)
    if not output.exists():
        folders = list(data_folders(config))
        if len(folders) != 1:
            raise UserError(f"data.path: {len(folders)} folders in {options.config}; a round draws for one")
        drawing = ["--checkpoint", one.start, "--like", folders[0], "--shards", output, "--seed", one.number]
        _run(f"round {one.number}: draw", ["generate", *drawing], options.processes)


def _train(one: Round, options: argparse.Namespace) -> None:
    settings = {
        "data.partner_path": one.folder / DRAWN,
        "training.pretrained_checkpoint": one.start,
        "training.output_dir": one.result,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={retyped(value)}")]
    _run(f"round {one.number}: train", ["train", "--config", options.config, *words], options.processes)


def _judge(one: Round, options: argparse.Namespace) -> dict[str, float]:
    samples, judged = one.folder / SAMPLES, one.folder / JUDGED
    if not (judged / "metrics.json").is_file():
        prompts = ["--prompts", options.prompts] if options.prompts is not None else ["--classes", "all"]
        drawing = ["--checkpoint", one.result, *prompts, "--images-per-prompt", options.images_per_prompt]
        _run(f"round {one.number}: draw to judge", ["generate", *drawing, "--overwrite", "--output", samples], 1)
        judging = ["--samples", f"round={samples}", "--reference", options.reference, "--extractor", options.extractor]
        judging += ["--classifier", "digits"] if options.reference == "digits" else []
        _run(f"round {one.number}: judge", ["evaluate", *judging, "--output", judged], 1)
    (metrics,) = json.loads((judged / "metrics.json").read_text())["sets"]
    return metrics


def _run(title: str, words: Sequence[object], processes: int) -> None:
    print(f"\n== {title}", flush=True)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "megatron_cca", *map(str, words)]
    environment = {**os.environ, **launcher_environment()}
    if subprocess.run(command, env=environment, check=False).returncode != 0:  # noqa: S603 - our own program, no shell
        raise UserError(f"{title!r} failed; its message is above")


if __name__ == "__main__":
    main()
