"""The settings to measure, their order, and the time that each needs. Nothing here imports torch or Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_parts.lines import MEASURED, Line

HEAD, TESTS, STEP, LLAMAGEN, LORA, BIAS, PLAN = "head", "tests", "step", "llamagen", "lora", "bias", "plan"
# The parts in the order in which they run, with their shares of the time: about the seconds that each needs on an H100.
WEIGHTS = {HEAD: 90, TESTS: 150, STEP: 150, LLAMAGEN: 50, LORA: 60, BIAS: 110, PLAN: 70}
TRAINING = (STEP, LLAMAGEN, LORA)

GEMM, DENSE, OURS = "products", "dense", "ours, main_grad"
PEERS = ("ours", "megatron", "torch, chunked", "cut-cross-entropy", "Liger")
EMU3_TOKENS, EMU3_VOCABULARY, EMU3_WIDTH = 8192, 184_622, 4096
CALIBRATION = "calibration"

# Runs with four and with two layers. The difference is the time of the layers alone, without the head.
BF16, FP8 = "bf16, resident", "fp8, resident"
MORE_LAYERS, FEW_LAYERS = 4, 2
BF16_FEW, FP8_FEW = (f"{name}, {FEW_LAYERS} layers" for name in (BF16, FP8))

_OFFLOAD, _FP8_PARAM = {"reference.strategy": "offload"}, {"reference.fp8_param": "true"}
_TENSORWISE = {"training.precision": "fp8", "training.fp8_recipe": "tensorwise"}
_LOCAL = {"model.transformer_impl": "local"}
_IMAGE = {"objective.normalization": "image"}
_SIZES = ("micro", "global")


@dataclass(frozen=True)
class Setting:
    """One measurement.

    Attributes:
        name: unique within its part.
        values: the arguments of the part's measuring function; plain data.
        seconds: the time that it needs on a GPU; it does not start with less.
        limit: after so many seconds it counts as hanging.
        baseline: the setting of the same part whose time and memory the ratios refer to.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    limit: float = 600.0
    baseline: str | None = None


def settings_of(part: str, rehearses: bool, lines: Sequence[Line]) -> list[Setting]:
    """Return all settings of a part, the most important first.

    The list is empty for the tests, which pytest collects.

    Args:
        part: a key of ``WEIGHTS``.
        rehearses: whether the sizes are tiny.
        lines: earlier results, which the planner is compared with.
    """
    makers = {HEAD: _head, STEP: _step, LLAMAGEN: _llamagen, LORA: _lora, BIAS: _bias}
    if part == PLAN:
        return _plan(rehearses, lines)
    return makers[part](rehearses) if part in makers else []


def head_name(peer: str, tokens: int, chunk: int | None = None) -> str:
    """Return the name of a setting of the head."""
    return f"{peer}, {tokens:,} tokens" + (f", chunks of {chunk:,}" if chunk else "")


def head_tokens(rehearses: bool) -> tuple[int, int]:
    """Return the number of tokens of one image's row, and of two."""
    return (64, 128) if rehearses else (EMU3_TOKENS, 2 * EMU3_TOKENS)


def _head(rehearses: bool) -> list[Setting]:
    sizes = {"hidden_size": EMU3_WIDTH, "vocabulary": EMU3_VOCABULARY, "dtype": "bfloat16"}
    chunks = (1024, 2048, 4096, 8192)
    if rehearses:
        sizes, chunks = {"hidden_size": 32, "vocabulary": 1000, "dtype": "float32"}, (16, 32)
    few, many = head_tokens(rehearses)

    def one(peer: str, tokens: int, chunk: int | None = None) -> Setting:
        values = {**sizes, "peer": peer, "tokens": tokens, "chunk_size": chunk}
        seconds = 0 if rehearses else 4
        return Setting(head_name(peer, tokens, chunk), values, seconds, 60, head_name(DENSE, tokens))

    side = 128 if rehearses else 8192
    return [
        Setting(GEMM, {**sizes, "tokens": few, "side": side}, 0 if rehearses else 4, 60),
        one(DENSE, few),
        one(OURS, few),
        *(one(OURS, few, chunk) for chunk in chunks),
        *(one(peer, few) for peer in PEERS),
        one(OURS, many),
        *(one(OURS, many, chunk) for chunk in chunks),
        one(DENSE, many),
    ]


def _training(
    name: str, keys: dict[str, Any], grid: int, *, rehearses: bool, seconds: float, baseline: str, repeats: int = 5
) -> Setting:
    values = {
        "overrides": [f"{key}={value}" for key, value in keys.items()],
        "grid": grid,
        "repeats": 3 if rehearses else repeats,
    }
    return Setting(name, values, 0 if rehearses else seconds, 4 * seconds + 60, baseline)


def _step(rehearses: bool) -> list[Setting]:
    common, grid = _emu3(rehearses)

    def one(name: str, *keys: dict[str, Any], layers: int = MORE_LAYERS) -> Setting:
        merged = {**common, "model.num_layers": layers}
        for more in keys:
            merged |= more
        if merged["objective.name"] == "next_token":
            # The same rows: each row of a pair is a sample of its own.
            merged |= {f"training.{size}_batch_size": 2 * common["training.micro_batch_size"] for size in _SIZES}
        return _training(name, merged, grid, rehearses=rehearses, seconds=12, baseline=BF16)

    return [
        one(BF16),
        one(FP8, _TENSORWISE),
        one(BF16_FEW, layers=FEW_LAYERS),
        one(FP8_FEW, _TENSORWISE, layers=FEW_LAYERS),
        one("bf16, resident, image words", _IMAGE),
        one("fp8, resident, image words", _TENSORWISE, _IMAGE),
        one("bf16, resident, weights in FP8", _FP8_PARAM),
        one("bf16, offload", _OFFLOAD),
        one("fp8, resident, weights in FP8", _TENSORWISE, _FP8_PARAM),
        one("fp8, offload", _TENSORWISE, _OFFLOAD),
        one("bf16, no reference", {"objective.name": "next_token"}),
        one("bf16, offload, weights in FP8", _OFFLOAD, _FP8_PARAM),
        one("fp8, offload, weights in FP8", _TENSORWISE, _OFFLOAD, _FP8_PARAM),
        one("fp8 blockwise, resident", {"training.precision": "fp8", "training.fp8_recipe": "blockwise"}),
        one("fp8 delayed, resident", {"training.precision": "fp8", "training.fp8_recipe": "delayed"}),
        one("bf16, local layers", _LOCAL),
    ]


def _emu3(rehearses: bool) -> tuple[dict[str, Any], int]:
    """Return keys of a run with Emu3's true width and vocabulary, and its grid; or those of the tiny model."""
    common = {
        "model.name": "emu3-tiny" if rehearses else "emu3-8b",
        "objective.name": "cca",
        "data.pad_to_multiple_of": 128,
        "data.loader": "torch",
        "optimizer.lr": 1e-6,
        "training.precision": "bf16",
        **{f"training.{size}_batch_size": 1 for size in _SIZES},
    }
    return common, 6 if rehearses else 90


def _llamagen(rehearses: bool) -> list[Setting]:
    common, _ = _emu3(rehearses)
    common |= {"model.name": "llamagen-tiny" if rehearses else "llamagen-3b"}
    common |= {f"training.{size}_batch_size": 2 if rehearses else 4 for size in _SIZES}
    variants = {BF16: {}, "bf16, local layers": _LOCAL, "bf16, offload": _OFFLOAD}
    return [
        _training(name, {**common, **keys}, 4 if rehearses else 24, rehearses=rehearses, seconds=14, baseline=BF16)
        for name, keys in variants.items()
    ]


def _lora(rehearses: bool) -> list[Setting]:
    common, grid = _emu3(rehearses)
    common |= {"lora.dim": 2 if rehearses else 16, "reference.strategy": "shared"}
    recompute = {"training.recompute_granularity": "full"}
    variants = {
        "bf16, shared, full recomputation": recompute,
        "bf16, shared": {},
        "fp8, shared, full recomputation": {**recompute, **_TENSORWISE},
    }
    first = next(iter(variants))
    return [
        _training(name, {**common, **keys}, grid, rehearses=rehearses, seconds=22, baseline=first, repeats=3)
        for name, keys in variants.items()
    ]


def _bias(rehearses: bool) -> list[Setting]:
    values = {"short": (32, 32), "long": (128, 64), "short_steps": 320, "long_steps": 60, "rows": 12}
    if rehearses:
        values = {"short": (4, 4), "long": (8, 8), "short_steps": 2, "long_steps": 1, "rows": 2}
    return [Setting("a small model, trained here", values, 0 if rehearses else 90, 400)]


def _plan(rehearses: bool, lines: Sequence[Line]) -> list[Setting]:
    common, grid = _emu3(rehearses)
    overrides = [f"{key}={value}" for key, value in common.items()]
    values = {"overrides": overrides, "grid": grid, "repeats": 2 if rehearses else 3}
    first = Setting(CALIBRATION, values, 0 if rehearses else 50, 300)
    measured = [
        line
        for line in lines
        if line["part"] in TRAINING and line["status"] == MEASURED and ("rehearsal" in line) == rehearses
    ]
    done = [one for one in lines if (one["part"], one["setting"], one["status"]) == (PLAN, CALIBRATION, MEASURED)]
    text = done[-1]["figures"]["calibration"] if done else None
    return [
        first,
        *(
            Setting(f"{line['part']}: {line['setting']}", {"line": line, "calibration": text}, 0, 60)
            for line in measured
        ),
    ]
