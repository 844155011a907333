"""Log-ratio of two models with the same weights in different precisions, on real images of up to 8,192 tokens.

.venv/bin/python benchmarks/reference_bias.py

It trains a small model of Emu3's shape on crops of scikit-learn's two photographs. It measures the model with
tools/measure_reference_bias.py. Then it finds the weights that cause the error of FP8. reference_bias.md has the
results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import machine
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab import markdown_table

ROOT = Path(__file__).resolve().parents[1]

CAPTIONS = {"china.jpg": "a temple in China", "flower.jpg": "a flower"}
PATCH = 2
SHORT, LONG = (32, 32), (128, 64)  # grids of tokens
# The model trains on the photographs' columns left of this. The measurement uses those to the right.
BORDER = 440

# Emu3's proportions: four query heads for each key head, and a feed-forward layer 3.5 times as wide as the model.
MODEL = {
    "name": "emu3-tiny",
    "num_layers": 6,
    "hidden_size": 256,
    "ffn_hidden_size": 896,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "max_position_embeddings": 8448,
}


def main() -> None:
    """Train, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the data and the model here, or find them (default: neither)")
    parser.add_argument("--short-steps", type=int, default=320, help="of 4 crops with 1,024 tokens")
    parser.add_argument("--long-steps", type=int, default=60, help="of one crop with 8,192 tokens")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--part-tokens", type=int, default=2048, help="image tokens for the tables after the first")
    parser.add_argument("--output", type=Path, help="also write the tables there, and PNG and JSON beside it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        prepare(folder)
        train(folder, arguments.short_steps, arguments.long_steps)
        tables = measure_parts(folder / "model", folder / "unseen", arguments.rows, arguments.part_tokens)
        print(tables, flush=True)
        tables = f"{measure_whole(folder, arguments.rows, arguments.output)}\n{tables}"
    if arguments.output is not None:
        arguments.output.write_text(f"{machine('cpu')}\n\n{tables}\n")


def measure_whole(folder: Path, rows: int, output: Path | None) -> str:
    """Run the tool on the trained model and return its output."""
    program = [ROOT / "tools" / "measure_reference_bias.py", "--checkpoint", folder / "model"]
    options = ["--data", folder / "unseen", "--rows", rows, "--device", "cpu"]
    if output is not None:
        options += ["--output", output.with_suffix(".json")]
    command = [sys.executable, *map(str, program + options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own script
    print(done.stdout, flush=True)
    return done.stdout


def prepare(folder: Path, device: platform.DeviceChoice = "cpu") -> None:
    """Tokenise crops of the photographs.

    Existing shards stay.
    """
    platform.install(device)
    from megatron_cca.data.codebooks import PatchCodebook
    from megatron_cca.data.shard_writing import Sample, write_shards
    from megatron_cca.data.tokenizers import TOKENIZER_FILE, train_tokenizer
    from megatron_cca.models.emu3 import TINY_CODEBOOK_SIZE, TINY_TEXT_SIZE, tiny_vocabulary

    photographs = _photographs()
    learnt = {caption: image[:, :BORDER] for caption, image in photographs.items()}
    unseen = {caption: image[:, BORDER:] for caption, image in photographs.items()}
    tokenizer = train_tokenizer(CAPTIONS.values(), TINY_TEXT_SIZE)
    patches = np.stack([image for image, _ in _crops(learnt, LONG, 32, seed=0)])
    codebook = PatchCodebook.fit(patches, TINY_CODEBOOK_SIZE, PATCH)

    def write_extras(unfinished: Path) -> None:
        tokenizer.save(str(unfinished / TOKENIZER_FILE))
        codebook.save(unfinished)

    parts = {"short": (learnt, SHORT, 4096, 1), "long": (learnt, LONG, 128, 2), "unseen": (unseen, LONG, 64, 3)}
    for name, (images, grid, number, seed) in parts.items():
        samples = (
            Sample(codebook.encode(image[None])[0], np.array(tokenizer.encode(caption).ids), caption)
            for image, caption in tqdm(_crops(images, grid, number, seed), desc=f"tokenizing {name}", total=number)
        )
        if not (folder / name).exists():
            write_shards(
                folder / name, samples, tiny_vocabulary(), lambda text: tokenizer.encode(text).ids, write_extras
            )


def _photographs() -> dict[str, np.ndarray]:
    """Return grey photographs uint8 ``[427, 640]`` by caption."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    grey = [(image @ [0.299, 0.587, 0.114]).round().astype(np.uint8) for image in found.images]
    return {CAPTIONS[name]: image for name, image in zip(names, grey, strict=True)}


def _crops(
    images: dict[str, np.ndarray], grid: tuple[int, int], number: int, seed: int
) -> Iterator[tuple[np.ndarray, str]]:
    """Yield crops at random places, half of them mirrored, each with its caption.

    The images alternate.
    """
    random = np.random.default_rng(seed)
    height, width = (PATCH * side for side in grid)
    captions = list(images)
    for index in range(number):
        image = images[captions[index % len(captions)]]
        top, left = (
            int(random.integers(have - want + 1)) for have, want in zip(image.shape, (height, width), strict=True)
        )
        crop = image[top : top + height, left : left + width]
        yield (crop[:, ::-1] if random.random() < 0.5 else crop), captions[index % len(captions)]


def train(folder: Path, short_steps: int, long_steps: int, device: str = "cpu") -> None:
    """Train on next-token likelihood with the project's own program.

    It takes short crops first, then a few long ones.
    """
    short = {"data.path": folder / "short", "global_batch_size": 4, "micro_batch_size": 4, "train_iters": short_steps}
    _train(folder / "model_short", {**short, "lr": 1e-3, "warmup": 20}, device)
    long = {"data.path": folder / "long", "global_batch_size": 1, "micro_batch_size": 1, "train_iters": long_steps}
    settings = {**long, "lr": 3e-4, "warmup": 3, "pretrained_checkpoint": folder / "model_short"}
    _train(folder / "model", settings, device)


def _train(output: Path, settings: dict, device: str) -> None:
    if (output / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
        return
    keys = {
        **{f"model.{name}": value for name, value in MODEL.items()},
        "objective.name": "next_token",
        "data.path": settings.pop("data.path"),
        "data.condition_dropout": 0.1,
        "optimizer.lr": settings.pop("lr"),
        "optimizer.lr_warmup_iters": settings.pop("warmup"),
        "optimizer.min_lr": 2e-5,
        "optimizer.lr_decay_style": "cosine",
        "optimizer.weight_decay": 0.01,
        "training.precision": "fp32",
        "training.output_dir": output,
        **{f"training.{name}": value for name, value in settings.items()},
    }
    empty = output.with_suffix(".yaml")
    empty.write_text("{}\n")
    overrides = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    program = [ROOT / "examples" / "pretrain_cca_emu3.sh", "--config", empty, "--device", device, *overrides]
    subprocess.run([sys.executable, *map(str, program)], check=True)  # noqa: S603 - our own script, no shell


def measure_parts(checkpoint: Path, data: Path, number: int, tokens: int) -> str:
    """Measure which weights cause the error, and the error that FP8 products would add.

    The log-ratios are to the exact model.
    """
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.config import Config
    from megatron_cca.lab.reference_bias.measure import prefix_logps, training_rows
    from megatron_cca.models import resolve_architecture
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.reference import head_options
    from megatron_cca.training.setup import build_chunks

    config = Config()
    newest = next((checkpoint / "checkpoints").glob("iter_*"))
    training = replace(config.training, micro_batch_size=1, global_batch_size=number // 2)
    settings = replace(config.data, path=str(data), condition_dropout=0.0)
    config = replace(config, model=saved_config(newest, "model").model, data=settings, training=training)
    architecture = resolve_architecture(config.model)
    rows = [_cut(row, tokens) for row in training_rows(config, open_data(config))]
    initialize_distributed(config)
    lengths = [2**power for power in range(8, 14) if 2**power <= tokens]
    head = head_options(config, architecture.vocabulary)
    bar = tqdm(total=len(rows) * (len(WEIGHTS) + len(ARITHMETIC) + 2), desc="parts", unit="row")

    def logps(chunks):
        return prefix_logps(chunks, rows, lengths, head, bar)

    def model(precision):
        settings = replace(training, precision=precision)
        return build_chunks(config, architecture, settings, str(checkpoint), "--folder")

    chunks = model("fp32")
    exact, shares = logps(chunks), []
    for name, (kinds, rounded) in WEIGHTS.items():
        with _replaced_weights(chunks[0], kinds, rounded):
            shares.append((name, logps(chunks) - exact))
    chunks = model("bf16")
    bf16, products = logps(chunks), []
    for name, scales in ARITHMETIC.items():
        with _fp8_products(chunks[0], scales):
            products.append((name, logps(chunks) - bf16))
    return _parts_tables(shares, products, lengths)


def _parts_tables(shares: list, products: list, lengths: list[int]) -> str:
    whole = next(_rms(ratios[:, -1]) for name, ratios in shares if name == WHOLE)
    first = [
        [name, f"{ratios[:, -1].mean():.3g}", f"{_rms(ratios[:, -1]):.3g}", f"{(_rms(ratios[:, -1]) / whole) ** 2:.0%}"]
        for name, ratios in shares
    ]
    second = [[name, *(f"{_rms(ratios[:, at]):.3g}" for at in range(len(lengths)))] for name, ratios in products]
    return "\n".join(
        [
            f"weights rounded, fp32 products, {lengths[-1]:,} tokens:\n",
            markdown_table(["rounded", "mean", "rms", "rms squared / that of all"], first),
            "\nbf16 with FP8 products (simulated) against bf16, rms:\n",
            markdown_table(["scales", *(f"{length:,} tokens" for length in lengths)], second),
        ]
    )


def _rms(ratios) -> float:
    return float(ratios.square().mean().sqrt())


def _cut(row, tokens: int):
    """Return the row, cut after ``tokens`` image tokens."""
    end = int(row.mask[0].nonzero()[tokens - 1]) + 1
    return replace(row, tokens=row.tokens[:, :end], targets=row.targets[:, :end], mask=row.mask[:, :end])


def _fp8_rows(weight: torch.Tensor) -> torch.Tensor:
    from megatron_cca.models.frozen_weights import dequantize_rows, quantize_rows

    return dequantize_rows(*quantize_rows(weight), weight.dtype)


def _int8_rows(weight: torch.Tensor) -> torch.Tensor:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scales).round() * scales


PROJECTIONS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
WHOLE = "all of these (`fp8_param`)"
WEIGHTS = {
    **{name: ((name,), _fp8_rows) for name in ("word_embeddings", *PROJECTIONS)},
    WHOLE: (("word_embeddings", *PROJECTIONS), _fp8_rows),
    "the LM head, which `fp8_param` spares": (("output_layer",), _fp8_rows),
    "all of these as INT8, one scale a row": (("word_embeddings", *PROJECTIONS), _int8_rows),
}


@contextmanager
def _replaced_weights(model: torch.nn.Module, kinds: Sequence[str], rounded) -> Iterator[None]:
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in kinds]
    former = [module.weight.data for module in modules]
    for module in modules:
        module.weight.data = rounded(module.weight.data)
    yield
    for module, weight in zip(modules, former, strict=True):
        module.weight.data = weight


def _per_tensor(tensor: torch.Tensor, is_weight: bool) -> torch.Tensor:
    return _to_e4m3(tensor, tensor.abs().amax())


def _per_block(tensor: torch.Tensor, is_weight: bool) -> torch.Tensor:
    """Round to E4M3 with one scale for each block, as Transformer Engine's Float8BlockScaling does.

    A block is 128 x 128 of a weight, or 128 channels of a token.
    """
    rows = 128 if is_weight else 1
    blocks = tensor.reshape(tensor.size(0) // rows, rows, -1, 128) if is_weight else tensor.unflatten(-1, (-1, 128))
    peak = blocks.abs().amax(dim=(1, 3) if is_weight else -1, keepdim=True)
    return _to_e4m3(blocks, peak).view_as(tensor)


def _to_e4m3(tensor: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    scale = peak.clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn).float() * scale


ARITHMETIC = {"one a tensor (tensorwise)": _per_tensor, "one a block of 128 (blockwise)": _per_block}


@contextmanager
def _fp8_products(model: torch.nn.Module, rounded) -> Iterator[None]:
    """Simulate FP8 products in all projections inside the context.

    Both factors are rounded to E4M3. The product is in fp32, its result in bf16.
    """
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]

    def forward(module: torch.nn.Module, tokens: torch.Tensor):
        weight = rounded(module.weight.float(), is_weight=True)
        product = torch.nn.functional.linear(rounded(tokens.float(), is_weight=False), weight)
        return product.to(tokens.dtype), None

    for module in modules:
        module.forward = partial(forward, module)
    yield
    for module in modules:
        del module.forward


if __name__ == "__main__":
    main()
