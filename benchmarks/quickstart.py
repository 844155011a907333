"""Run the quickstart with several seeds and print means and spreads.

.venv/bin/python benchmarks/quickstart.py --seeds 1 2 3

quickstart.md has the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megatron_cca.lab import markdown_table

RUN = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "run.py"
COLUMNS = (("accuracy", "accuracy", ".3f"), ("inception_score", "IS", ".2f"), ("fid", "FID", ".2f"))


def main() -> None:
    """Print one Markdown table over all seeds, and for each seed a line with the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_quickstart"))
    arguments = parser.parse_args()
    reports = [_report(seed, arguments.output / f"seed{seed}") for seed in arguments.seeds]
    print(f"\nmean (standard deviation) of seeds {', '.join(map(str, arguments.seeds))}\n")
    print(_table(reports))
    for seed, report in zip(arguments.seeds, reports, strict=True):
        print(f"seed {seed}: {_verdict(report)}")


def _report(seed: int, output: Path) -> list[dict]:
    started = time.perf_counter()
    command = [sys.executable, str(RUN), "--seed", str(seed), "--output", str(output)]
    subprocess.run(command, check=True)  # noqa: S603 - our own script, no shell
    print(f"seed {seed}: {time.perf_counter() - started:.0f} s")
    return json.loads((output / "report.json").read_text())["models"]


def _table(reports: list[list[dict]]) -> str:
    rows = []
    for models in zip(*reports, strict=True):
        cells = []
        for key, _, form in COLUMNS:
            values = np.array([model[key] for model in models])
            cells.append(f"{values.mean():{form}} ({values.std(ddof=1) if len(values) > 1 else 0:{form}})")
        rows.append([models[0]["name"], str(models[0]["forwards_per_token"]), *cells])
    return markdown_table(["model", "forwards/token", "accuracy", "IS", "FID"], rows)


def _verdict(models: list[dict]) -> str:
    by_name = {model["name"]: model for model in models}
    cca = by_name["cca"]
    best = min((model for model in models if model["guidance_scale"] > 0), key=lambda model: model["fid"])
    over = {
        "base": _beats(cca, by_name["base"], ("accuracy", "inception_score", "fid")),
        "control": _beats(cca, by_name["control"], ("accuracy", "inception_score", "fid")),
        f"{best['name']} (FID-best)": _beats(cca, best, ("accuracy", "fid")),
    }
    return "CCA guidance-free against " + "; ".join(f"{name}: {verdict}" for name, verdict in over.items())


def _beats(ours: dict, other: dict, keys: tuple[str, ...]) -> str:
    lost = [key for key in keys if (ours[key] < other[key]) != (key == "fid")]
    return "better on all of " + ", ".join(keys) if not lost else "worse on " + ", ".join(lost)


if __name__ == "__main__":
    main()
