"""The log-probability head by itself, and the rate of the card's own matrix products that it is held to."""

from __future__ import annotations

from typing import Any

import logps
import torch
from logps import Shape

from gpu_parts.failures import DeviceMemory, MissingPackage
from gpu_parts.settings import GEMM
from megatron_cca import platform
from megatron_cca.planner.flops import Product
from megatron_cca.planner.measuring import peak_flops, products_seconds, seconds_of

REPETITIONS = 10


def measure(values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Figures of one peer at one shape, or of plain products."""
    if "side" in values:
        return _products(values)
    device = platform.device().type
    sizes = {name: values[name] for name in ("tokens", "hidden_size", "vocabulary", "dtype", "chunk_size")}
    (row,) = logps.measure(Shape(**sizes, device=device), [values["peer"]], REPETITIONS, seconds=seconds - 1)
    note = row.get("note")
    if note is None:
        return row
    if note.startswith("not installed"):
        raise MissingPackage(note)
    if note == "no time was left":
        raise TimeoutError(note)
    raise (DeviceMemory if note == "out of memory" else RuntimeError)(note)


def _products(values: dict[str, Any]) -> dict[str, Any]:
    """TFLOP/s of a large square product, and of the head's own shape, in 16 and 8 bits."""
    dtype, side = getattr(torch, values["dtype"]), values["side"]
    tokens, width, words = values["tokens"], values["hidden_size"], -(-values["vocabulary"] // 128) * 128
    flops = 2.0 * tokens * width * words
    shape = [Product(GEMM, width, words, splits_outputs=True)]
    return {
        "dtype": values["dtype"],
        "side": side,
        "square_tflops": peak_flops(dtype, side) / 1e12,
        "head_shape_tflops": flops / products_seconds(shape, tokens, dtype) / 1e12,
        "fp8": _fp8_products(side, tokens, width, words),
    }


def _fp8_products(side: int, *head: int) -> dict[str, float] | str:
    """TFLOP/s with one scale a tensor, results in bf16; or why there are none."""
    try:
        return {
            name: 2.0 * rows * inner * columns / _fp8_seconds(rows, inner, columns) / 1e12
            for name, (rows, inner, columns) in {"square_tflops": (side,) * 3, "head_shape_tflops": head}.items()
        }
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0]


def _fp8_seconds(rows: int, inner: int, columns: int) -> float:
    left, right = (
        torch.randn(outer, inner, device=platform.device()).to(torch.float8_e4m3fn) for outer in (rows, columns)
    )
    one = torch.ones((), device=platform.device())
    return seconds_of(
        lambda: torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )
