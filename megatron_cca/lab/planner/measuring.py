"""What the device at hand reaches: products, attention, memory, each by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca import platform
from megatron_cca.lab.planner.flops import Product

# Seconds that a measurement takes, and repetitions, at least.
_ENOUGH_SECONDS = 0.2
_ENOUGH_REPEATS = 20


def seconds_of(work: Callable[[], object]) -> float:
    """The fastest of many repetitions, after one that does not count: what else the machine does only adds."""
    work()
    platform.synchronize()
    found: list[float] = []
    while sum(found) < _ENOUGH_SECONDS or len(found) < _ENOUGH_REPEATS:
        started = time.perf_counter()
        work()
        platform.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def peak_flops(dtype: torch.dtype, side: int = 1024) -> float:
    """FLOP/s of a large product; what a device without a data sheet is measured by."""
    left, right = (torch.randn(side, side, device=platform.device()).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right)


def products_seconds(products: Sequence[Product], tokens: int, dtype: torch.dtype) -> float:
    """Of a layer's projections for so many tokens, one after another."""
    total = 0.0
    for product in products:
        inputs = torch.randn(tokens, product.inputs, device=platform.device()).to(dtype)
        weight = torch.randn(product.outputs, product.inputs, device=platform.device()).to(dtype)
        total += seconds_of(lambda inputs=inputs, weight=weight: inputs @ weight.t())
    return total


def fp8_products_seconds(products: Sequence[Product], tokens: int) -> float:
    """:func:`products_seconds` in FP8 E4M3 with one scale a tensor, bf16 out; making FP8 of the factors not included.

    Args:
        products: all of whose sides are multiples of 16.
        tokens: a multiple of 16.
    """
    device, scale = platform.device(), torch.ones((), device=platform.device())
    total = 0.0
    for product in products:
        inputs = torch.randn(tokens, product.inputs, device=device).to(torch.float8_e4m3fn)
        weight = torch.randn(product.outputs, product.inputs, device=device).to(torch.float8_e4m3fn)
        total += seconds_of(
            lambda inputs=inputs, weight=weight: torch._scaled_mm(
                inputs, weight.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
            )
        )
    return total


def attention_seconds(rows: int, heads: int, seq_length: int, channels: int, dtype: torch.dtype) -> float:
    """Of causal attention, forward."""
    shape = (rows, heads, seq_length, channels)
    query, key, value = (torch.randn(shape, device=platform.device()).to(dtype) for _ in range(3))
    return seconds_of(lambda: scaled_dot_product_attention(query, key, value, is_causal=True))


def memory_bandwidth(num_bytes: int) -> float:
    """Bytes/s of a copy, what is read and what is written together."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=platform.device())
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source))


def host_memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
