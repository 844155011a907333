"""Time and memory of log-probabilities at Emu3's vocabulary, forward and backward, beside the ways one would else take.

.venv/bin/python benchmarks/logps.py --tokens 1024 8192 --hidden-size 1024

Results are kept in logps.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from measuring import in_fresh_process, machine, markdown_table
from torch import Tensor
from tqdm import tqdm

from megatron_cca import platform

VOCABULARY = 184_622
# As Megatron pads it for one rank.
PADDED = 184_704


def main() -> None:
    """Measure every way at every length, or, inside a measuring process, one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--hidden-size", type=int, default=1024, help="Emu3's is 4096; needs much memory on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=None)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
    else:
        ways = arguments.ways or [way for way in WAYS if way != "cut-cross-entropy" or arguments.device == "cuda"]
        compare(ways, arguments.tokens, arguments.hidden_size, arguments.dtype, arguments.device)


def compare(ways: list[str], tokens: list[int], hidden_size: int, dtype: str, device: str) -> None:
    """Print the table; every way's values and gradients are checked against the dense way's."""
    print(f"{machine(device)}; vocabulary {VOCABULARY}, hidden size {hidden_size}, {dtype}")
    cases = [(length, way) for length in tokens for way in ways]
    results = {}
    for length, way in tqdm(cases, desc="measuring", unit="case"):
        settings = {"way": way, "tokens": length, "hidden_size": hidden_size, "dtype": dtype, "device": device}
        results[length, way] = in_fresh_process(__file__, settings)
    print(markdown_table(_HEADER, [_row(length, way, results) for length, way in cases]))


_HEADER = ["tokens", "way", "forward s", "backward s", "time / dense", "extra GiB", "extra / dense", "differs by"]


def _row(length: int, way: str, results: dict) -> list[str]:
    found, dense = results[length, way], results.get((length, "dense"), {"out_of_memory": True})
    if "out_of_memory" in found:
        return [str(length), way, "out of memory", *[""] * 5]
    cells = [f"{found['forward']:.2f}", f"{found['backward']:.2f}", "", f"{found['extra'] / 2**30:.3f}", "", ""]
    if "out_of_memory" not in dense:
        seconds, dense_seconds = (result["forward"] + result["backward"] for result in (found, dense))
        differences = [abs(found[name] / dense[name] - 1) for name in ("sum", "hidden_norm", "weight_norm")]
        cells[2], cells[4] = f"{seconds / dense_seconds:.2f}", f"{found['extra'] / dense['extra']:.3f}"
        cells[5] = f"{max(differences):.0e}"
    return [str(length), way, *cells]


def measure(way: str, tokens: int, hidden_size: int, dtype: str, device: str) -> dict:
    """One forward and backward pass in this process.

    Inputs and both gradient tensors exist beforehand, since every way needs them; ``extra`` is the peak beyond them.
    """
    platform.install(device)
    function = WAYS[way]
    # A small pass first: thread pools, kernels, the libraries' own workspaces.
    _pass(function, *_inputs(way, 256, hidden_size, dtype, device))
    inputs = _inputs(way, tokens, hidden_size, dtype, device)
    before = platform.memory_bytes()
    platform.reset_peak_memory()
    forward, backward, total = _pass(function, *inputs)
    extra = platform.peak_memory_bytes() - before
    hidden, weight = inputs[:2]
    weight_grad = getattr(weight, "main_grad", weight.grad)
    return {
        "forward": forward,
        "backward": backward,
        "extra": extra,
        "sum": total,
        "hidden_norm": hidden.grad.double().norm().item(),
        # In slices: a float64 copy of the whole would be the largest tensor of all.
        "weight_norm": sum(part.double().square().sum().item() for part in weight_grad.split(4096)) ** 0.5,
    }


def _inputs(way: str, tokens: int, hidden_size: int, dtype: str, device: str):
    generator = torch.Generator(device).manual_seed(0)
    kind = {"dtype": getattr(torch, dtype), "device": device, "generator": generator}
    hidden = torch.randn(tokens, 1, hidden_size, **kind).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (1, tokens), device=device, generator=generator)
    # The other ways have no use for padding rows: cutting them off would cost a copy.
    rows = PADDED if way in PADDED_WAYS else VOCABULARY
    weight = (torch.randn(rows, hidden_size, **kind).mul_(2 * hidden_size**-0.5)).requires_grad_()
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    hidden.grad = torch.ones_like(hidden).zero_()  # written to, so that its pages are there
    if way == MAIN_GRAD_WAY:
        weight.main_grad = torch.ones(weight.shape, dtype=torch.float32, device=device).zero_()
    else:
        weight.grad = torch.ones_like(weight).zero_()
    return hidden, weight, targets, mask


def _pass(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, float, float]:
    """Seconds of forward and backward, and the sum of all log-probabilities."""
    platform.synchronize()
    started = time.perf_counter()
    total = function(*inputs).sum()
    platform.synchronize()
    middle = time.perf_counter()
    total.backward()
    platform.synchronize()
    return middle - started, time.perf_counter() - middle, total.item()


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    from megatron_cca.parallel import sequence_logps

    return sequence_logps(hidden, weight, targets, mask, vocab_size=VOCABULARY)


def _dense(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The authors' way, with no tensor kept longer than autograd needs it."""
    logits = (hidden.transpose(0, 1) @ weight.t()).float()
    logps = torch.log_softmax(logits, dim=-1)
    del logits
    return (logps.gather(-1, targets[..., None]).squeeze(-1) * mask).sum(1)


def _megatron(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _join_alone()
    logits = (hidden @ weight.t()).float()
    losses = vocab_parallel_cross_entropy(logits, targets.t().contiguous())
    return -(losses.t() * mask).sum(1)


def _join_alone() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group(**platform.process_group_options())
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden.transpose(0, 1), weight, targets, reduction="none")
    return -(losses * mask).sum(1)


# The head's gradient goes into a main_grad, as under Megatron's data parallelism.
MAIN_GRAD_WAY = "ours, main_grad"
PADDED_WAYS = ("ours", MAIN_GRAD_WAY)
WAYS: dict[str, Callable[..., Tensor]] = {
    "dense": _dense,
    "ours": _ours,
    MAIN_GRAD_WAY: _ours,
    "megatron": _megatron,
    "cut-cross-entropy": _cut_cross_entropy,
}


if __name__ == "__main__":
    main()
