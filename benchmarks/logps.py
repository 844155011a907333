"""Time and memory of log-probabilities at Emu3's vocabulary, forward and backward, of this project and of others.

.venv/bin/python benchmarks/logps.py --tokens 1024 8192 --hidden-size 1024

logps.md has the results. Other programs call :func:`measure`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from logps_peers import DENSE, MAIN_GRAD, PADDED_PEERS, PEERS
from measuring import in_fresh_process, machine, parse_or_measure
from torch import Tensor
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab import markdown_table

# The rows of a head are padded to a multiple of this, as in Megatron on one rank.
PADDING = 128
# The products of a pass without recomputation: the logits, and the gradients of the hidden states and of the weight.
PRODUCTS = 3


@dataclass(frozen=True)
class Shape:
    """The inputs of a peer.

    Attributes:
        tokens: T; the mask selects all of them.
        hidden_size: H.
        vocabulary: V.
        dtype: dtype of the hidden states and of the weight; a torch name.
        device: ``"cpu"`` or ``"cuda"``.
        chunk_size: tokens in a tile of ours; None means the default of the device.
    """

    tokens: int
    hidden_size: int
    vocabulary: int = 184_622
    dtype: str = "float32"
    device: str = "cpu"
    chunk_size: int | None = None

    @property
    def useful_flops(self) -> float:
        """FLOPs of three matrix products, even if a peer recomputes some."""
        return 2.0 * PRODUCTS * self.tokens * self.hidden_size * self.vocabulary


def main() -> None:
    """Measure each peer at each length.

    A measuring process measures one of them.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--hidden-size", type=int, default=1024, help="Emu3's is 4096; needs much memory on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", choices=list(PEERS), default=None, help="default: those of the device")
    parser.add_argument("--chunk-size", type=int, default=None, help="for ours; default: that of the device")
    parser.add_argument("--repetitions", type=int, default=3, help="after a small pass that is not timed")
    arguments = parse_or_measure(parser, _measured)
    sizes = {name: getattr(arguments, name) for name in ("hidden_size", "dtype", "device", "chunk_size")}
    shapes = [Shape(tokens, **sizes) for tokens in arguments.tokens]
    compare(shapes, arguments.ways or default_peers(arguments.device), arguments.repetitions)


def _measured(settings: dict) -> dict:
    return measure(Shape(**settings["shape"]), [settings["peer"]], settings["repetitions"])[0]


def default_peers(device: str) -> list[str]:
    """Return the names of the peers that run on a device.

    They need not be installed.
    """
    return [name for name, peer in PEERS.items() if device in peer.devices]


def compare(shapes: Sequence[Shape], peers: Sequence[str], repetitions: int) -> None:
    """Measure each case in a fresh process, and print its row of the table."""
    first = shapes[0]
    print(
        f"{machine(first.device)}; vocabulary {first.vocabulary}, hidden size {first.hidden_size}, {first.dtype}, "
        f"medians of {repetitions}"
    )
    print(table([]), flush=True)
    results = []
    for shape, peer in tqdm([(shape, peer) for shape in shapes for peer in peers], desc="measuring", unit="case"):
        case = {"shape": asdict(shape), "peer": peer, "repetitions": repetitions}
        found = in_fresh_process(__file__, case)
        results.append(found if "peer" in found else _without_figures(shape, peer, "out of memory"))
        # Print it at once. The last case must not lose an hour of results.
        tqdm.write(table(results).splitlines()[-1], file=sys.stdout)


def measure(
    shape: Shape, peers: Sequence[str] | None = None, repetitions: int = 5, *, seconds: float = math.inf
) -> list[dict]:
    """Measure peers in this process, one after the other.

    A peer that is not installed, that runs out of memory or that fails has a result, too. The next one follows. On a
    CPU, memory that an earlier peer freed may count as a later one's. Measure one peer in each process there.

    Args:
        shape: the inputs, the same for each peer.
        peers: names in ``PEERS``; None means those that run on the device.
        repetitions: number of timed forward and backward passes, after a small one that is not timed.
        seconds: time after which no pass begins; a peer without a timed pass has a note.

    Returns:
        For each peer a dict of plain data: the fields of ``shape``, ``peer``, and either ``note`` (why there are no
        figures) or ``forward_ms``, ``backward_ms``, ``total_ms`` (each ``median``, ``least``, ``most``),
        ``repetitions`` (as many as were timed), ``tflops`` (of the median; recomputed products are not counted),
        ``extra_bytes`` (the peak beyond inputs and gradient tensors), ``sum``, ``hidden_norm``, ``weight_norm`` (what
        was computed), ``version`` (of the peer's package).
    """
    platform.install(shape.device)
    deadline = time.monotonic() + seconds
    return [_measure_peer(shape, peer, repetitions, deadline) for peer in peers or default_peers(shape.device)]


def table(results: Iterable[dict]) -> str:
    """Return the results of :func:`measure` as a Markdown table.

    Ratios are to the dense peer at the same shape.
    """
    results = list(results)
    dense = {_shape_key(row): row for row in results if row["peer"] == DENSE and "note" not in row}
    return markdown_table(_HEADER, [_cells(row, dense.get(_shape_key(row))) for row in results])


_HEADER = [
    *("tokens", "way", "forward ms", "backward ms", "total ms", "least to most", "TFLOP/s", "time / dense"),
    *("extra GiB", "extra / dense", "differs by"),
]


def _cells(row: dict, dense: dict | None) -> list[str]:
    head = [str(row["tokens"]), row["peer"]]
    if "note" in row:
        return [*head, row["note"], *[""] * (len(_HEADER) - 3)]
    total = row["total_ms"]
    cells = [
        *head,
        *(_digits(row[name]["median"]) for name in ("forward_ms", "backward_ms", "total_ms")),
        f"{_digits(total['least'])} to {_digits(total['most'])}",
        _digits(row["tflops"]),
        "",
        f"{row['extra_bytes'] / 2**30:.3f}",
        *("", ""),
    ]
    if dense is not None:
        cells[7] = f"{total['median'] / dense['total_ms']['median']:.2f}"
        cells[9] = f"{row['extra_bytes'] / max(dense['extra_bytes'], 1):.3f}"
        names = ("sum", "hidden_norm", "weight_norm")
        cells[10] = f"{max(abs(row[name] / dense[name] - 1) for name in names):.0e}"
    return cells


def _digits(value: float) -> str:
    """Format a number with three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _shape_key(row: dict) -> tuple:
    return tuple(row[name] for name in ("tokens", "hidden_size", "vocabulary", "dtype", "device"))


def _without_figures(shape: Shape, peer: str, note: str) -> dict:
    return {**asdict(shape), "peer": peer, "note": note}


def _measure_peer(shape: Shape, peer: str, repetitions: int, deadline: float) -> dict:
    """Measure one peer; return its figures, or why there are none."""
    try:
        figures = _figures(shape, peer, repetitions, deadline)
    except ImportError as error:
        return _without_figures(shape, peer, f"not installed ({error})")
    except torch.OutOfMemoryError:
        return _without_figures(shape, peer, "out of memory")
    except Exception as error:
        return _without_figures(shape, peer, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if figures is None:
        return _without_figures(shape, peer, "no time was left")
    return {**asdict(shape), "peer": peer, **figures}


def _figures(shape: Shape, peer: str, repetitions: int, deadline: float) -> dict | None:
    if time.monotonic() >= deadline:
        return None
    function, version = PEERS[peer].load(), PEERS[peer].version()
    # Run a small pass first. It starts thread pools, kernels and the workspaces of libraries.
    _pass(function, shape, _inputs(peer, Shape(**{**asdict(shape), "tokens": min(256, shape.tokens)})))
    inputs = _inputs(peer, shape)
    before = platform.memory_bytes()
    platform.reset_peak_memory()
    passes = []
    while len(passes) < repetitions and time.monotonic() < deadline:
        _clear_gradients(*inputs[:2])
        passes.append(_pass(function, shape, inputs))
    if not passes:
        return None
    extra = platform.peak_memory_bytes() - before
    forward, backward, totals = zip(*passes, strict=True)
    whole = [sum(pair) for pair in zip(forward, backward, strict=True)]
    return {
        **{
            f"{name}_ms": {
                "median": 1e3 * statistics.median(values),
                "least": 1e3 * min(values),
                "most": 1e3 * max(values),
            }
            for name, values in (("forward", forward), ("backward", backward), ("total", whole))
        },
        "repetitions": len(passes),
        "tflops": shape.useful_flops / statistics.median(whole) / 1e12,
        "extra_bytes": extra,
        "version": version,
        "sum": totals[-1],
        **_gradient_norms(*inputs[:2]),
    }


def _inputs(peer: str, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states ``[T, 1, H]``, weight, targets and mask, with gradient tensors that a pass adds to."""
    generator = torch.Generator(shape.device).manual_seed(0)
    kind = {"dtype": getattr(torch, shape.dtype), "device": shape.device, "generator": generator}
    hidden = torch.randn(shape.tokens, 1, shape.hidden_size, **kind).requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (1, shape.tokens), device=shape.device, generator=generator)
    # The other peers cannot use padding rows. A slice without them would cost a copy.
    rows = math.ceil(shape.vocabulary / PADDING) * PADDING if peer in PADDED_PEERS else shape.vocabulary
    weight = torch.randn(rows, shape.hidden_size, **kind).mul_(2 * shape.hidden_size**-0.5).requires_grad_()
    mask = torch.ones(1, shape.tokens, dtype=torch.bool, device=shape.device)
    hidden.grad = torch.empty_like(hidden)
    if peer == MAIN_GRAD:
        weight.main_grad = torch.empty(weight.shape, dtype=torch.float32, device=shape.device)
    else:
        weight.grad = torch.empty_like(weight)
    # Write to them before the memory count. Their pages exist then.
    _clear_gradients(hidden, weight)
    return hidden, weight, targets, mask


def _clear_gradients(hidden: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        hidden.grad.fill_(1).zero_()
        if hasattr(weight, "main_grad"):
            weight.main_grad.fill_(1).zero_()
            # Megatron's hook does so after each backward.
            weight.grad = None
        else:
            weight.grad.fill_(1).zero_()


def _gradient_norms(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    gradient = getattr(weight, "main_grad", weight.grad)
    # Add up slices. A float64 copy of the whole gradient would be the largest tensor of all.
    squares = sum(part.double().square().sum().item() for part in gradient.split(4096))
    return {"hidden_norm": hidden.grad.double().norm().item(), "weight_norm": squares**0.5}


def _pass(function: Callable[..., Tensor], shape: Shape, inputs: tuple) -> tuple[float, float, float]:
    """Run forward and backward; return the seconds of each, and the sum of all log-probabilities."""
    platform.synchronize()
    started = time.perf_counter()
    total = function(shape, *inputs).sum()
    platform.synchronize()
    middle = time.perf_counter()
    total.backward()
    platform.synchronize()
    return middle - started, time.perf_counter() - middle, total.item()


if __name__ == "__main__":
    main()
