"""The results of :mod:`megatron_cca.lab.reference_bias` as a table, sentences, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_cca import platform
from megatron_cca.io.outputs import write_json
from megatron_cca.lab import markdown_table
from megatron_cca.lab.reference_bias import IN_FP8, PairBias, Variant
from megatron_cca.lab.reference_bias_settings import BiasSettings
from megatron_cca.training.log_ratio_gate import DEFAULT_ALLOWED, LogRatioSpread

# The CCA paper (arXiv 2410.09347) uses beta 0.02 for images of 576 tokens.
_PAPER_BETA_TIMES_TOKENS = 0.02 * 576


def table(pairs: Sequence[PairBias]) -> str:
    """Return all numbers as a Markdown table.

    A pair that is 0 at all lengths has one line.
    """
    header = ("policy", "reference", "tokens", "mean", "sd", "rms", "worst", "safe beta")
    lines = []
    for group in _by_pair(pairs):
        names = (str(group[0].policy), str(group[0].reference))
        if not any(pair.spread.worst for pair in group):
            lines.append((*names, "all", *("exactly 0",) * 4, "any"))
            continue
        lines += [(*names, f"{pair.tokens:,}", *_numbers(pair.spread), _beta(pair.safe_beta)) for pair in group]
    return markdown_table(header, lines)


def _numbers(spread: LogRatioSpread) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in (spread.mean, spread.std, spread.root_mean_square, spread.worst))


def _by_pair(pairs: Sequence[PairBias]) -> list[list[PairBias]]:
    groups: dict[tuple[Variant, Variant], list[PairBias]] = {}
    for pair in pairs:
        groups.setdefault((pair.policy, pair.reference), []).append(pair)
    return list(groups.values())


def _beta(value: float) -> str:
    """Format beta with two digits, rounded down.

    It is an upper limit.
    """
    if math.isinf(value):
        return "any"
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return f"{math.floor(value * scale) / scale:.2g}"


def conclusions(pairs: Sequence[PairBias], beta: float | None) -> list[str]:
    """Return a sentence for each policy and reference, about the longest measured images.

    Args:
        pairs: the result of :func:`measure`.
        beta: beta of the objective; None takes the paper's beta, scaled with 1 / tokens.
    """
    return [_conclusion(group[-1], beta, all(not pair.spread.worst for pair in group)) for group in _by_pair(pairs)]


def _conclusion(pair: PairBias, beta: float | None, is_zero: bool) -> str:
    reference = f"{Variant(pair.reference.precision)} reference" + (IN_FP8 if pair.reference.fp8_param else "")
    who = f"{pair.policy} policy, {reference}"
    if is_zero:
        return f"{who}: exactly 0, safe at any beta"
    mine = _PAPER_BETA_TIMES_TOKENS / pair.tokens if beta is None else beta
    name = f"the paper's, scaled to that: {mine:.2g}," if beta is None else f"{mine:g}"
    verdict = f"{name} is {'safe' if mine <= pair.safe_beta else 'not safe'}"
    line = f"{who}: safe up to beta {_beta(pair.safe_beta)} at {pair.tokens:,} tokens ({verdict})"
    if pair.policy == pair.reference:
        line += "; not 0 although both are the same: the layers are not deterministic here"
    return line


def write(path: Path, settings: BiasSettings, pairs: Sequence[PairBias]) -> None:
    """Write all numbers as JSON, and a plot of them.

    The plot lies beside the JSON file. It has the same name with ``.png``.
    """
    found = [
        {
            "policy": str(pair.policy),
            "reference": str(pair.reference),
            "tokens": pair.tokens,
            **asdict(pair.spread),
            "root_mean_square": pair.spread.root_mean_square,
            "safe_beta": None if math.isinf(pair.safe_beta) else pair.safe_beta,
        }
        for pair in pairs
    ]
    facts = {**asdict(settings), "device": platform.device_name(), "torch": torch.__version__}
    write_json(path, {**facts, "allowed": DEFAULT_ALLOWED, "pairs": found})
    _draw(path.with_suffix(".png"), _lines(pairs))


def _lines(pairs: Sequence[PairBias]) -> list[list[PairBias]]:
    """Return the pairs to draw, the largest first.

    Zeros are left out, because a logarithmic axis has none. Of two pairs with exchanged variants, one is left out.
    """
    found: dict[frozenset[Variant], list[PairBias]] = {}
    for group in _by_pair(pairs):
        if all(pair.spread.worst for pair in group):
            found.setdefault(frozenset((group[0].policy, group[0].reference)), group)
    return sorted(found.values(), key=lambda group: -group[-1].spread.root_mean_square)


def _draw(path: Path, groups: Sequence[Sequence[PairBias]]) -> None:
    # Imported late: the measurement needs no matplotlib.
    from matplotlib.figure import Figure

    from megatron_cca.io.figures import COLOURS, LEGEND, TITLE, save, style_axes

    figure = Figure(figsize=(9, 4.6), dpi=150)
    axis = figure.subplots()
    axis.set_prop_cycle(color=COLOURS)
    for group in groups:
        errors = [pair.spread.root_mean_square for pair in group]
        line = "--" if group[0].reference.fp8_param else "-"
        label = f"{group[0].policy} / {group[0].reference}"
        axis.plot([pair.tokens for pair in group], errors, line, marker="o", markersize=3.5, linewidth=1.5, label=label)
    if groups:
        _guides(axis, groups)
        axis.legend(title="policy / reference", loc="center left", bbox_to_anchor=(1, 0.5), **LEGEND)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    tokens = [pair.tokens for pair in groups[0]] if groups else []
    axis.set_xticks(tokens, [f"{number:,}" for number in tokens])
    axis.minorticks_off()
    axis.set_title("log-ratio of models with the same weights", **TITLE)
    style_axes(axis, across="image tokens", up="root mean square, nats per image")
    save(figure, path)


def _guides(axis, groups: Sequence[Sequence[PairBias]]) -> None:
    """Draw the growth of independent errors, and of errors that all have the same sign."""
    from megatron_cca.io.figures import GREY

    first, last = groups[0][0].tokens, groups[0][-1].tokens
    if first == last:
        return
    logs = [math.log(group[0].spread.root_mean_square) for group in groups]
    start = math.exp(sum(logs) / len(logs))
    for power, name in ((0.5, "√n"), (1.0, "n")):
        end = start * (last / first) ** power
        axis.plot([first, last], [start, end], color=GREY, linewidth=0.7, zorder=0)
        axis.annotate(name, (last, end), xytext=(3, 0), textcoords="offset points", fontsize=8, color=GREY)
