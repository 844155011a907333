"""The comparison of the project's goals on a GPU with the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpu_parts.lines import MEASURED, Line, milliseconds
from gpu_parts.settings import BF16, BF16_FEW, DENSE, FP8, FP8_FEW, GEMM, HEAD, STEP, head_name, head_tokens
from megatron_cca.lab import markdown_table

BF16_MFU, FP8_SPEEDUP, HEAD_SHARE, DENSE_SHARE = 0.45, 1.25, 0.5, 1.0


def goals(found: Sequence[Line]) -> str:
    """Return a table of the goals that have figures, in Markdown.

    Without figures it is empty.
    """
    rows = [
        [what, f"{'at least' if more else 'below'} {goal:.2f}", f"{value:.3f}", "yes" if _is_met(*rest) else "**no**"]
        for what, *rest in _figures(found)
        for goal, value, more in [rest]
    ]
    return markdown_table(["goal", "wanted", "found", "met"], rows) if rows else ""


def _is_met(goal: float, value: float, more: bool) -> bool:
    return value >= goal if more else value < goal


def _figures(found: Sequence[Line]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield the name, the goal, the figure, and whether more is better."""
    one = {(line["part"], line["setting"]): line for line in found if line["status"] == MEASURED}

    def step(name: str) -> Line | None:
        return one.get((STEP, name))

    bf16, fp8 = step(BF16), step(FP8)
    if bf16 and bf16["figures"]["mfu"] is not None:
        yield "MFU of a bf16 step", BF16_MFU, bf16["figures"]["mfu"], True
    layers = {name: layers_alone(step(more), step(few)) for name, more, few in _PAIRS}
    if layers["bf16"] and bf16["figures"]["mfu"] is not None:
        milliseconds_alone, tflop = layers["bf16"]
        peak = bf16["figures"]["peak_tflops"]
        yield "MFU of bf16 layers outside the head", BF16_MFU, tflop / milliseconds_alone * 1e3 / peak, True
    if layers["bf16"] and layers["fp8"]:
        yield "layers outside the head, bf16 time / FP8", FP8_SPEEDUP, layers["bf16"][0] / layers["fp8"][0], True
    if bf16 and fp8:
        ratio = milliseconds(bf16)["median"] / milliseconds(fp8)["median"]
        yield "whole step, bf16 time / FP8 (no goal by itself)", 1.0, ratio, True
    yield from _head_figures(one, rehearses=any("rehearsal" in line for line in found))


_PAIRS = (("bf16", BF16, BF16_FEW), ("fp8", FP8, FP8_FEW))


def layers_alone(more: Line | None, few: Line | None) -> tuple[float, float] | None:
    """Return the milliseconds and useful TFLOP by which a step with more layers exceeds one with few.

    It is None without both. It is also None if noise makes the difference zero or negative.
    """
    if more is None or few is None:
        return None
    longer = milliseconds(more)["median"] - milliseconds(few)["median"]
    tflop = more["figures"]["model_tflop"] - few["figures"]["model_tflop"]
    return (longer, tflop) if longer > 0 else None


def _head_figures(one: dict[tuple[str, str], Line], *, rehearses: bool) -> Iterator[tuple[str, float, float, bool]]:
    products = one.get((HEAD, GEMM))
    ours = [
        line
        for (part, name), line in one.items()
        if part == HEAD and line["settings"].get("peer", "").startswith("ours")
    ]
    for tokens in head_tokens(rehearses):
        same = [line for line in ours if line["settings"]["tokens"] == tokens]
        if not same:
            continue
        best = min(same, key=lambda line: milliseconds(line)["median"])
        note = f"head, {best['setting']} (the fastest)"
        if products:
            share = best["figures"]["tflops"] / products["figures"]["head_shape_tflops"]
            yield f"{note}, of the measured products", HEAD_SHARE, share, True
        dense = one.get((HEAD, head_name(DENSE, tokens)))
        if dense:
            ratio = milliseconds(best)["median"] / milliseconds(dense)["median"]
            yield f"{note}, time / dense", DENSE_SHARE, ratio, False
