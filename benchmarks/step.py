"""A whole CCA step of a small Emu3 with the true vocabulary: this project, and plain transformers with PyTorch.

.venv/bin/python benchmarks/step.py

Both start from the same weights, read the same tokens and take the same optimizer steps. step.md has the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from measuring import in_fresh_process, machine, parse_or_measure
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab import markdown_table

# Emu3's proportions: four query heads for each key head, and a feed-forward layer 3.5 times as wide as the model.
HEADS = {"num_layers": 4, "num_attention_heads": 8, "num_query_groups": 2}
FFN_RATIO = 3.5


def main() -> None:
    """Measure both ways.

    A measuring process measures one of them.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, default=24, help="image tokens on a side (the paper: 24)")
    parser.add_argument("--samples", type=int, default=2, help="images in a step; each is two rows")
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parse_or_measure(parser, lambda settings: _PARTS[settings.pop("part")](**settings))
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, folder)


def compare(arguments: argparse.Namespace, folder: str) -> None:
    """Measure both ways and print the table."""
    if find_spec("transformers") is None:
        sys.exit("benchmarks/step.py: transformers is not installed; pip install -e '.[hf]'")
    overrides = _overrides(arguments, folder)
    settings = {"overrides": overrides, "folder": folder, "device": arguments.device, "steps": arguments.steps}
    results = {}
    for part in tqdm(_PARTS, desc="preparing and measuring", unit="part"):
        results[part] = in_fresh_process(__file__, {"part": part, **settings})
    prepared, plain = results.pop("prepare"), results["transformers"]
    print(
        f"{machine(arguments.device)}; {prepared['parameters'] / 1e6:.0f} M parameters, "
        f"{2 * arguments.samples} rows of {prepared['seq_length']} tokens, fp32"
    )
    header = ["way", "s/step", "time ratio", "peak GiB", "memory ratio", *(f"loss {i}" for i in range(arguments.steps))]
    print(markdown_table(header, [_row(way, found, plain) for way, found in results.items()]))


def _row(way: str, found: dict, plain: dict) -> list[str]:
    if "out_of_memory" in found:
        return [way, "out of memory"]
    cells = [way, f"{_seconds(found):.2f}", "", f"{found['peak'] / 2**30:.2f}", ""]
    if "out_of_memory" not in plain:
        cells[2], cells[4] = f"{_seconds(found) / _seconds(plain):.2f}", f"{found['peak'] / plain['peak']:.2f}"
    return [*cells, *(f"{loss:.7f}" for loss in found["losses"])]


def _seconds(found: dict) -> float:
    return sum(found["seconds"][1:]) / len(found["seconds"][1:])


def _overrides(arguments: argparse.Namespace, folder: str) -> list[str]:
    width = arguments.hidden_size
    sizes = {**HEADS, "hidden_size": width, "ffn_hidden_size": int(FFN_RATIO * width)}
    keys = {
        "model.name": "emu3-8b",
        **{f"model.{name}": size for name, size in sizes.items()},
        "model.max_position_embeddings": arguments.grid * (arguments.grid + 1) + 64,
        "objective.beta": 0.02,
        "objective.negative_weight": 3.0,
        "data.path": f"{folder}/shards",
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.1,
        "training.global_batch_size": arguments.samples,
        "training.micro_batch_size": arguments.samples,
        "training.train_iters": arguments.steps,
        "training.output_dir": f"{folder}/run",
    }
    shards = {"grid": arguments.grid, "samples": arguments.samples * arguments.steps}
    (Path(folder) / "shards.json").write_text(json.dumps(shards))
    return [f"{key}={value}" for key, value in keys.items()]


def prepare(overrides: list[str], folder: str, device: str, steps: int) -> dict:
    """Write random shards, the tokens of each step, and the initial weights in transformers' format."""
    platform.install(device)
    from safetensors.torch import save_file

    from megatron_cca.checkpoint.huggingface import export_checkpoint
    from megatron_cca.checkpoint.saver import save
    from megatron_cca.checkpoint.summary import summarize
    from megatron_cca.config.load import load_config
    from megatron_cca.data.shard_writing import Sample, write_shards
    from megatron_cca.models import resolve_architecture
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data, training_batches
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, overrides)
    architecture = resolve_architecture(config.model)
    shape = json.loads((Path(folder) / "shards.json").read_text())
    random = np.random.default_rng(0)
    samples = (
        Sample(
            codes=random.integers(architecture.vocabulary.codebook_size, size=(shape["grid"], shape["grid"])),
            caption=random.integers(architecture.vocabulary.text_size, size=random.integers(10, 30)),
        )
        for _ in range(shape["samples"])
    )
    write_shards(Path(config.data.path), samples, architecture.vocabulary, lambda text: [ord(c) for c in text])
    batches = training_batches(config, open_data(config), with_pairs=True)
    tensors = {}
    for step in range(steps):
        (rows,) = batches.build(step, 0, 1).microbatches
        parts = {"tokens": rows.tokens, "targets": rows.targets, "mask": rows.mask, "flags": rows.negative_is_positive}
        tensors |= {f"{step}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    save_file(tensors, f"{folder}/batches.safetensors")
    initialize_distributed(config)
    (chunk,) = build_chunks(config, architecture, config.training, None, "training.pretrained_checkpoint")
    save(Path(folder) / "start", 0, [chunk], None, summarize(config))
    export_checkpoint(f"{folder}/start", f"{folder}/transformers", progress_bar=False)
    parameters = sum(parameter.numel() for parameter in chunk.parameters())
    return {"parameters": parameters, "seq_length": tensors["0.tokens"].size(1)}


def measure_transformers(overrides: list[str], folder: str, device: str, steps: int) -> dict:
    """Measure losses, seconds and peak memory of the plain way."""
    import plain_transformers

    from megatron_cca.config.load import load_config

    config = load_config(None, overrides)
    optimizer = config.optimizer
    settings = {
        "beta": config.objective.beta,
        "negative_weight": config.objective.negative_weight,
        "lr": optimizer.lr,
        "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
        "eps": optimizer.adam_eps,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": optimizer.clip_grad,
        "device": device,
    }
    return plain_transformers.train(f"{folder}/transformers", f"{folder}/batches.safetensors", settings)


def measure_ours(overrides: list[str], folder: str, device: str, steps: int) -> dict:
    """Measure losses, seconds and peak memory of this project in one process."""
    platform.install(device)
    from megatron_cca.config.load import load_config
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.setup import set_up
    from megatron_cca.training.step import train_step

    config = load_config(None, overrides)
    initialize_distributed(config)
    run = set_up(config, open_data(config))
    losses, seconds = [], []
    for _ in range(steps):
        platform.synchronize()
        started = time.perf_counter()
        losses.append(train_step(run).metrics["loss"])
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds, "peak": platform.peak_memory_bytes()}


_PARTS = {"prepare": prepare, "transformers": measure_transformers, "megatron_cca": measure_ours}


if __name__ == "__main__":
    main()
