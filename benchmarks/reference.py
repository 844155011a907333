"""The cost of the frozen reference by strategy and precision: peak memory and time of a step, against fine-tuning.

.venv/bin/python benchmarks/reference.py

On a GPU the layers are those of the 8B model, as many as --layers says. On a CPU they are an eighth as wide. Both are
measured with two numbers of layers. The line through the two results gives the value for the 8B model's 32 layers.
Columns with such values say so. reference.md has the results of memory, and gpu.md those from a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from eight_b_memory import computed_table
from measuring import in_fresh_process, machine, parse_or_measure
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab import markdown_table
from megatron_cca.lab.planner.hardware import gpu_named, name_of_device
from megatron_cca.lab.planner.observer import LiveBytes
from megatron_cca.lab.planner.workload import MFU_MEANS, Workload, average_peak, flops_by_precision, mfu

WIDE = {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8}
NARROW = {"hidden_size": 512, "ffn_hidden_size": 1792, "num_attention_heads": 4, "num_query_groups": 1}
FULL_LAYERS = 32

PLAIN, LORA = "objective.name=next_token", ["lora.dim=16"]
OFFLOAD, CACHED, SHARED = (f"reference.strategy={name}" for name in ("offload", "cached", "shared"))
IN_FP8 = "reference.fp8_param=true"
VARIANTS = {
    "no reference (next-token)": [PLAIN],
    "resident": [],
    "resident, weights in FP8": [IN_FP8],
    "offload": [OFFLOAD],
    "offload, weights in FP8": [OFFLOAD, IN_FP8],
    "cached": [CACHED],
    "LoRA, no reference": [*LORA, PLAIN],
    "LoRA, resident": LORA,
    "LoRA, shared": [*LORA, SHARED],
}


def main() -> None:
    """Measure all variants, each in its own process.

    Such a process measures one of them.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), metavar=("FEW", "MORE"))
    parser.add_argument("--grid", type=int, default=90 if cuda else 32, help="image tokens on a side")
    parser.add_argument("--samples", type=int, default=1, help="in a microbatch; each is two rows")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16", "fp8"), default=["bf16", "fp8"] if cuda else ["bf16"]
    )
    parser.add_argument("--recompute", nargs="+", choices=("none", "full"), default=["none", "full"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    arguments = parse_or_measure(parser, lambda settings: _PARTS[settings.pop("part")](**settings))
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, folder)


def report(arguments: argparse.Namespace, folder: str) -> None:
    """Measure all cases and print a table for each precision and recomputation."""
    cases = [(precision, recompute) for precision in arguments.precisions for recompute in arguments.recompute]
    bar = tqdm(total=len(cases) * len(arguments.layers) * (len(VARIANTS) + 1), desc="measuring", unit="part")
    print(f"{machine(arguments.device)}; {2 * arguments.samples} rows of {arguments.grid}^2 image tokens a microbatch")
    for precision, recompute in cases:
        found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
        for layers in arguments.layers:
            common = _common(arguments, f"{folder}/{precision}-{recompute}-{layers}", layers, precision, recompute)
            settings = {"device": arguments.device, "folder": folder, "steps": arguments.steps}
            in_fresh_process(__file__, {"part": "prepare", "overrides": common, **settings})
            bar.update()
            for name, overrides in VARIANTS.items():
                whole = [*common, *overrides]
                if PLAIN in overrides:
                    # The same rows: each row of a pair is a sample of its own.
                    whole += [f"training.{key}={2 * size}" for key, size in _batch(arguments).items()]
                if CACHED in overrides:
                    whole.append(f"reference.cache={_folder(common)}/cache")
                found[name].append(in_fresh_process(__file__, {"part": "measure", "overrides": whole, **settings}))
                bar.update()
        print(f"\n{precision}, {'full' if recompute == 'full' else 'no'} recomputation:\n")
        print(_table(arguments, found))
    if arguments.device == "cuda":
        print(f"\n{MFU_MEANS}")
    bar.close()
    print(f"\nthe 8B model on one GPU without activations, computed from its shapes:\n\n{computed_table()}")


def _batch(arguments: argparse.Namespace) -> dict[str, int]:
    return {"micro_batch_size": arguments.samples, "global_batch_size": arguments.samples * arguments.microbatches}


def _folder(overrides: list[str]) -> str:
    return next(text.partition("=")[2] for text in overrides if text.startswith("training.output_dir="))


def _common(arguments: argparse.Namespace, folder: str, layers: int, precision: str, recompute: str) -> list[str]:
    wide = arguments.device == "cuda"
    keys = {
        # Take the small model's vocabulary. The true one would be much larger than narrow layers.
        "model.name": "emu3-8b" if wide else "emu3-tiny",
        **{f"model.{name}": size for name, size in (WIDE if wide else NARROW).items()},
        "model.num_layers": layers,
        "model.max_position_embeddings": arguments.grid * (arguments.grid + 1) + 192,
        "data.path": f"{folder}/shards",
        "data.condition_dropout": 0.0,
        "data.pad_to_multiple_of": 128,
        "optimizer.lr": 1e-6,
        "training.precision": precision,
        **{f"training.{key}": size for key, size in _batch(arguments).items()},
        "training.train_iters": arguments.steps + 1,
        "training.output_dir": folder,
        "reference.allow_bias": 1e9,
    }
    if recompute == "full":
        keys["training.recompute_granularity"] = "full"
    (Path(folder)).mkdir(parents=True)
    (Path(folder) / "grid.json").write_text(json.dumps(arguments.grid))
    return [f"{key}={value}" for key, value in keys.items()]


def _table(arguments: argparse.Namespace, found: dict[str, list[dict]]) -> str:
    few, more = arguments.layers
    header = [
        "reference",
        *(f"peak MiB, {layers} layers" for layers in arguments.layers),
        "ratio",
        "bytes a weight",
        f"ratio at {FULL_LAYERS} layers (extrapolated)",
        "s/step",
        "time ratio",
    ]
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        header += ["tokens/s", "MFU"]
    rows = []
    for name, (small, large) in found.items():
        plain = found["LoRA, no reference" if name.startswith("LoRA") else "no reference (next-token)"]
        if "out_of_memory" in large or "out_of_memory" in plain[1]:
            rows.append([name, "out of memory", *[""] * (len(header) - 2)])
            continue
        whole, plain_whole = (_line(few, a["peak"], more, b["peak"]) for a, b in ((small, large), plain))
        cells = [
            name,
            *(f"{one['peak'] / 2**20:.1f}" for one in (small, large)),
            f"{large['peak'] / plain[1]['peak']:.3f}",
            f"{large['state'] / large['weights']:.2f}",
            f"{whole / plain_whole:.3f}",
            f"{large['seconds']:.3f}",
            f"{large['seconds'] / plain[1]['seconds']:.2f}",
        ]
        if on_gpu:
            tokens = large["tokens"] / large["seconds"]
            cells += [f"{tokens:,.0f}", _mfu(large)]
        rows.append(cells)
    return markdown_table(header, rows)


def _line(few: int, at_few: float, more: int, at_more: float) -> float:
    return at_few + (at_more - at_few) / (more - few) * (FULL_LAYERS - few)


def _mfu(found: dict) -> str:
    name = name_of_device(torch.cuda.get_device_name())
    if name is None:
        return "unknown GPU"
    peak = average_peak(found["flops"], gpu_named(name).peak_flops)
    return f"{mfu(sum(found['flops'].values()), found['seconds'], peak):.1%}"


def prepare(overrides: list[str], folder: str, device: str, steps: int) -> dict:
    """Write random shards, and the cache for ``cached``."""
    platform.install(device)
    from megatron_cca.config.load import load_config
    from megatron_cca.data.shard_writing import Sample, write_shards
    from megatron_cca.models import resolve_architecture
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.caching import cache_reference

    config = load_config(None, overrides)
    vocabulary = resolve_architecture(config.model).vocabulary
    grid = json.loads((Path(config.training.output_dir) / "grid.json").read_text())
    random = np.random.default_rng(0)
    samples = [
        # Captions have the same length. All rows are then equally long.
        Sample(random.integers(vocabulary.codebook_size, size=(grid, grid)), random.integers(256, size=20))
        for _ in range(4 * config.training.global_batch_size)
    ]
    write_shards(Path(config.data.path), samples, vocabulary, lambda text: [ord(c) for c in text])
    cache_reference(config, open_data(config), Path(config.training.output_dir) / "cache", 0, steps + 1)
    return {}


def measure(overrides: list[str], folder: str, device: str, steps: int) -> dict:
    """Measure one variant: bytes, seconds of a step, tokens, and FLOPs by precision."""
    platform.install(device)
    from megatron_cca.config.load import load_config
    from megatron_cca.models import resolve_architecture
    from megatron_cca.models.num_parameters import num_parameters
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.setup import set_up
    from megatron_cca.training.step import train_step

    config = load_config(None, overrides)
    initialize_distributed(config)
    data = open_data(config)
    with nullcontext() if device == "cuda" else _without_host_memory() as counter:
        run = set_up(config, data)
        train_step(run)
        platform.synchronize()
        state = _held(counter)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            train_step(run)
            platform.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = _peak(counter)
    architecture = resolve_architecture(config.model)
    weights = num_parameters(architecture)
    batch = run.loader.get(run.iteration)
    run.loader.close()
    tokens = sum(microbatch.tokens.numel() for microbatch in batch.microbatches)
    grid = json.loads((Path(config.training.output_dir) / "grid.json").read_text())
    of_a_sample = flops_by_precision(config, architecture, Workload(batch.seq_length, grid**2))
    return {
        "peak": peak,
        "state": state,
        "seconds": statistics.median(seconds),
        "tokens": tokens,
        "weights": weights,
        "flops": {name: config.training.global_batch_size * one for name, one in of_a_sample.items()},
    }


def _held(counter: LiveBytes | None) -> int:
    if counter is not None:
        counter.reset_peak()
        return counter.now
    platform.reset_peak_memory()
    return platform.memory_bytes()


def _peak(counter: LiveBytes | None) -> int:
    return counter.peak if counter is not None else platform.peak_memory_bytes()


@contextmanager
def _without_host_memory() -> Iterator[LiveBytes]:
    """Count live tensors without those that a GPU would keep in host memory.

    On a CPU all tensors are in host memory.
    """
    from megatron_cca.platform.operations import DeviceOperations, operating_by

    class Counted(DeviceOperations):
        def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
            return counter.discount(super().host_copy(tensor))

    counter = LiveBytes()
    with operating_by(Counted()), counter:
        yield counter


_PARTS = {"prepare": prepare, "measure": measure}


if __name__ == "__main__":
    main()
