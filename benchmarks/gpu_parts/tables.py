"""The tables of ``gpu.md`` from the results of one or several calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from gpu_parts import lines
from gpu_parts.goals import goals
from gpu_parts.lines import MEASURED, Line, milliseconds, peak_bytes
from gpu_parts.settings import BIAS, CALIBRATION, GEMM, HEAD, PLAN, TESTS, TRAINING
from megatron_cca.lab import markdown_table
from megatron_cca.lab.planner.workload import MFU_MEANS

_TITLES = {
    "step": "CCA step, Emu3-8B's layers and vocabulary",
    "llamagen": "CCA step, LlamaGen-3B",
    "lora": "CCA step, Emu3-8B with LoRA",
}


def tables(found: Sequence[Line]) -> str:
    """Return all tables in Markdown, separately for each machine."""
    if not found:
        return "no results"
    ordered = sorted(found, key=_machine)
    return "\n\n".join(_of_one_machine(list(group)) for _, group in groupby(ordered, key=_machine))


def _machine(line: Line) -> tuple[bool, str]:
    return ("rehearsal" in line, line["about"]["card"])


def _of_one_machine(found: list[Line]) -> str:
    about, last = found[-1]["about"], max(line["date"] for line in found)
    names = ("driver", "python", "torch", "cuda", "transformer-engine", "megatron-core", "triton")
    versions = ", ".join(f"{name} {about[name]}" for name in names if about.get(name))
    parts = [f"## {last[:10]}, {about['card']}\n\n{versions}"]
    if "rehearsal" in found[0]:
        parts.append(f"**This is {lines.REHEARSAL}.**")
    makers: dict[str, Callable[[list[Line]], str]] = {
        "Goals": goals,
        "Log-probability head": _head,
        "Tests on the device": _tests,
        **{title: lambda all_lines, part=part: _steps(all_lines, part) for part, title in _TITLES.items()},
        "Bias of references": _bias,
        "The planner beside what was measured": _planner,
        "Without figures": _without_figures,
    }
    for title, make in makers.items():
        text = make(found)
        if text:
            parts.append(f"### {title}\n\n{text}")
    return "\n\n".join(parts)


def measured(found: Sequence[Line], part: str) -> dict[str, Line]:
    """Return the measured lines of a part by setting.

    Overrides of keys belong to the name.
    """
    return {_name(line): line for line in found if line["part"] == part and line["status"] == MEASURED}


def _name(line: Line) -> str:
    return " ".join([line["setting"], *line["overrides"]])


def _digits(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.3g}{unit}" if abs(value) < 100 else f"{value:,.0f}{unit}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.3f}" if value < 2**30 else f"{value / 2**30:.1f}"


def _spread(line: Line) -> list[str]:
    spread = milliseconds(line)
    return [
        _digits(spread["median"]),
        f"{_digits(spread['least'])} to {_digits(spread['most'])}",
        str(line["figures"]["repetitions"]),
    ]


def _ratio(line: Line, name: str) -> str:
    value = line.get("beside", {}).get(name)
    return "" if value is None else f"{value:.2f}"


def _head(found: list[Line]) -> str:
    rows, own = [], measured(found, HEAD)
    rates = next((line["figures"] for line in own.values() if line["setting"] == GEMM), None)
    for name, line in own.items():
        if line["setting"] == GEMM:
            continue
        tflops = line["figures"]["tflops"]
        rate = _share(tflops / rates["head_shape_tflops"]) if rates else ""
        beyond = _gib(peak_bytes(line))
        rows.append([name, *_spread(line), _digits(tflops), rate, _ratio(line, "time"), beyond, _ratio(line, "memory")])
    header = ["way", "ms, forward and backward", "least to most", "repetitions", "TFLOP/s (useful)"]
    header += ["of the measured products", "time / dense", "GiB beside inputs", "memory / dense"]
    texts = [_products(rates)] if rates else []
    return "\n\n".join([*texts, markdown_table(header, rows)] if rows else texts)


def _products(rates: dict) -> str:
    fp8 = rates["fp8"]
    eight = fp8 if isinstance(fp8, str) else " and ".join(f"{fp8[name]:.3g}" for name in _RATES)
    sixteen = " and ".join(f"{rates[name]:.3g}" for name in _RATES)
    return (
        f"Products by themselves, TFLOP/s of {rates['side']:,} x {rates['side']:,} and of the head's shape: "
        f"{rates['dtype']} {sixteen}; FP8 {eight}."
    )


_RATES = ("square_tflops", "head_shape_tflops")


def _tests(found: list[Line]) -> str:
    own = [line for line in found if line["part"] == TESTS and line["status"] != MEASURED]
    counts = {status: [line for line in own if line["status"] == status] for status in (lines.PASSED, lines.SKIPPED)}
    if not own:
        return ""
    other = len(own) - sum(map(len, counts.values()))
    seconds = sum(line.get("seconds", 0) for line in own)
    whole = any(line["part"] == TESTS and line["status"] == MEASURED for line in found)
    text = ", ".join([*(f"{len(some)} {status}" for status, some in counts.items()), f"{other} not passed"])
    reasons: dict[str, int] = {}
    for line in counts[lines.SKIPPED]:
        reasons[line.get("reason", "")] = reasons.get(line.get("reason", ""), 0) + 1
    skipped = "".join(f"\n- skipped {count}: {reason}" for reason, count in reasons.items())
    return f"{text}; {seconds:.0f} s{'' if whole else '; not all of them were reached'}\n{skipped}".rstrip()


def _steps(found: list[Line], part: str) -> str:
    assert part in TRAINING
    header = ["setting", "ms/step", "least to most", "repetitions", "tokens/s", "TFLOP/s", "MFU", "time ratio"]
    header += ["peak GiB", "memory ratio", "planner ms", "planner GiB"]
    rows = []
    for name, line in measured(found, part).items():
        figures, predicted = line["figures"], line["figures"]["predicted"]
        cells = [name, *_spread(line), f"{figures['tokens_per_second']:,.0f}", _digits(figures["tflops"])]
        cells += [_share(figures["mfu"]), _ratio(line, "time"), _gib(figures["peak_bytes"]), _ratio(line, "memory")]
        rows.append([*cells, _digits(predicted["ms"]), _gib(predicted["peak_bytes"])])
    return f"{markdown_table(header, rows)}\n\n{MFU_MEANS} Times are those of whole steps." if rows else ""


def _bias(found: list[Line]) -> str:
    texts = []
    for name, line in measured(found, BIAS).items():
        figures = line["figures"]
        rows = [
            [pair["policy"], pair["reference"], f"{pair['tokens']:,}", f"{pair['rms']:.3g}", _digits(pair["safe_beta"])]
            for pair in figures["pairs"]
        ]
        header = ["policy", "reference", "image tokens", "rms of log-ratios, nats", "beta that is safe, at most"]
        told = f"{name}, on {figures['pictures']}, {figures['rows']} rows."
        texts.append(f"{told}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(texts)


def _planner(found: list[Line]) -> str:
    own, rows = measured(found, PLAN), []
    for name, line in own.items():
        if line["setting"] != CALIBRATION:
            rows.append([name, *_beside(line["figures"])])
    header = ["setting", "measured ms", "predicted ms", "off by", "calibrated ms", "off by"]
    header += ["measured GiB", "predicted GiB", "off by"]
    calibrated = [line["figures"] for line in own.values() if line["setting"] == CALIBRATION]
    texts = [_calibration(figures) for figures in calibrated]
    return "\n\n".join([*texts, markdown_table(header, rows)] if rows else texts)


def _beside(figures: dict) -> list[str]:
    measured_ms, held = figures["measured_ms"], figures["measured_bytes"]
    cells = [_digits(measured_ms)]
    for name in ("predicted_ms", "calibrated_ms"):
        cells += [_digits(figures[name]), _off(figures[name], measured_ms)]
    return [*cells, _gib(held), _gib(figures["predicted_bytes"]), _off(figures["predicted_bytes"], held)]


def _off(predicted: float | None, known: float) -> str:
    return "" if predicted is None or not known else f"{predicted / known - 1:+.0%}"


def _calibration(figures: dict) -> str:
    names = ("matmul_efficiency", "fp8_matmul_efficiency", "attention_efficiency", "memory_efficiency")
    told = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.2f}" for name in names)
    return (
        f"Calibrated here: {told}, {1e3 * figures['microbatch_overhead_seconds']:.3g} ms a microbatch, "
        f"{1e3 * figures['step_overhead_seconds']:.3g} ms a step; short runs predicted from the others are off by "
        f"{figures['relative_error']:.0%}."
    )


def _without_figures(found: list[Line]) -> str:
    kept = (MEASURED, lines.PASSED, lines.SKIPPED)
    rows = [
        [line["part"], _name(line), line["status"], line.get("reason", "").replace("|", "/")]
        for line in found
        if line["status"] not in kept
    ]
    return markdown_table(["part", "setting", "status", "reason"], rows) if rows else ""
