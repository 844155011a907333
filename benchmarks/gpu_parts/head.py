"""The log-probability head alone, and the rate of the card's own matrix products, which it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import logps
import torch
from logps import Shape

from gpu_parts.lines import DeviceMemory, MissingPackage
from gpu_parts.settings import GEMM
from megatron_cca import platform
from megatron_cca.lab.planner.measuring import fp8_products_seconds, peak_flops, products_seconds
from megatron_cca.lab.planner.workload import Product

REPETITIONS = 10


def measure(values: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure one peer at one shape, or plain products."""
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
    """Measure the TFLOP/s of a large square product and of a product with the head's shape.

    Both are in the head's precision and in FP8.
    """
    dtype, side, tokens = getattr(torch, values["dtype"]), values["side"], values["tokens"]
    words = -(-values["vocabulary"] // logps.PADDING) * logps.PADDING
    head = [Product(GEMM, values["hidden_size"], words, splits_outputs=True)]
    return {
        "dtype": values["dtype"],
        "side": side,
        "square_tflops": peak_flops(dtype, side) / 1e12,
        "head_shape_tflops": _flops(head, tokens) / products_seconds(head, tokens, dtype) / 1e12,
        "fp8": _fp8_products(side, tokens, head),
    }


def _fp8_products(side: int, tokens: int, head: Sequence[Product]) -> dict[str, float] | str:
    """Measure the TFLOP/s in FP8 with one scale for each tensor and results in bf16.

    If that fails, return the reason.
    """
    square = [Product(GEMM, side, side, splits_outputs=True)]
    try:
        return {
            name: _flops(shape, rows) / fp8_products_seconds(shape, rows) / 1e12
            for name, shape, rows in (("square_tflops", square, side), ("head_shape_tflops", head, tokens))
        }
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0]


def _flops(products: Sequence[Product], tokens: int) -> float:
    return sum(2.0 * tokens * product.weights for product in products)
