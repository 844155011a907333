"""Import and export of a random Emu3 at its true size (8.5 billion parameters, bf16, 17 GB), and ``cp -r``.

Or of another model on Hugging Face: ``--model emu3_5-34b --layers 2`` with fewer layers, ``--model janus-pro-7b`` in
its authors' files, which are pickles.

.venv/bin/python benchmarks/convert.py --folder /tmp/convert

It needs 53 GB of disk in the folder, and leaves the files there. convert.md has the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import in_fresh_process, machine, parse_or_measure
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.stored_tensors import ByteProgress
from megatron_cca.config import ModelConfig
from megatron_cca.lab import markdown_table
from megatron_cca.models import family_of, resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import Shapes
from megatron_cca.models.weight_files import num_bytes, row_ranges

COPY = "copy"
PICKLE_BYTES = 10 * 10**9


def main() -> None:
    """Measure all parts.

    A measuring process measures one of them.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="an empty or new folder on the disk to measure")
    parser.add_argument("--model", default="emu3-8b", help="the preset")
    parser.add_argument("--layers", type=int, help="fewer than the model's for a trial")
    parser.add_argument("--logits", action="store_true", help="also compare Megatron's logits with transformers'")
    arguments = parse_or_measure(parser, _measured)
    if arguments.folder is None or (arguments.folder.is_dir() and any(arguments.folder.iterdir())):
        parser.error("--folder: give an empty or new folder")
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure all parts and print the table."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder / "hf", ModelConfig(name=arguments.model, num_layers=arguments.layers))
    size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
    parts = ["copy", "import", "export", "tensors", *(["logits"] if arguments.logits else [])]
    found = {}
    for part in tqdm(parts, desc="measuring", unit="part"):
        _forget_cached_files()
        found[part] = in_fresh_process(__file__, {"part": part, "folder": str(folder)})
    print(f"{machine('cpu')}; {size / 1e9:.2f} GB; file cache dropped before each part")
    header = ["part", "seconds", "GB/s", "time / cp -r", "peak memory GB", "result"]
    copy = found["copy"]["seconds"]
    rows = [
        [
            part,
            f"{row['seconds']:.0f}",
            f"{size / 1e9 / row['seconds']:.2f}",
            f"{row['seconds'] / copy:.2f}",
            f"{row['peak'] / 1e9:.2f}",
            row["result"],
        ]
        for part, row in found.items()
    ]
    print(markdown_table(header, rows))


def prepare(folder: Path, model: ModelConfig) -> None:
    """Write a random model in its original format, in files as large as on the Hub."""
    architecture = resolve_architecture(model)
    family = family_of(model).huggingface
    folder.mkdir()
    template, companions = _janus_companions(architecture) if model.name.startswith("janus") else (None, {})
    naming = family.namings[0]
    shapes = {
        **{naming.on_disk(name): shape for name, shape in family.weights.huggingface_shapes(architecture).items()},
        **companions,
    }
    config = family.write_config(template, architecture, "bfloat16", "original")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    total = sum(num_bytes(shape, torch.bfloat16) for shape in shapes.values())
    with ByteProgress("random weights", total, shown=True) as progress:
        generator = torch.Generator().manual_seed(0)
        tensors = [
            OutgoingTensor(name, shape, torch.bfloat16, progress.watch(_random(shape, generator)))
            for name, shape in shapes.items()
        ]
        if companions:
            _write_pickles(folder, tensors)
        else:
            write_safetensors(folder, tensors)


def _janus_companions(architecture: Architecture) -> tuple[dict, Shapes]:
    """Return a configuration as in deepseek-ai/Janus-Pro-7B, and what travels along: of its size, in fewer tensors."""
    hidden, words = architecture.hidden_size, architecture.num_words
    codes, channels = architecture.vocabulary.output_size, architecture.image_embedding_channels

    def part(cls: str, **params: object) -> dict:
        return {"cls": cls, "params": params}

    projector = {"depth": 2, "projector_type": "mlp_gelu", "n_embed": hidden}
    config = {
        "model_type": "multi_modality",
        "language_config": {"model_type": "llama", "vocab_size": words, "hidden_size": hidden},
        "aligner_config": part("MlpProjector", **projector, input_dim=1024),
        "gen_aligner_config": part("MlpProjector", **projector, input_dim=channels),
        "gen_head_config": part("vision_head", image_token_embed=hidden, image_token_size=codes, n_embed=hidden),
        "gen_vision_config": part("VQ-16", image_token_size=codes, n_embed=channels),
    }
    layer = {"attn.qkv": (3072, 1024), "attn.proj": (1024, 1024), "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
    tower = {
        f"vision_model.vision_tower.blocks.{number}.{name}.weight": shape
        for number in range(24)
        for name, shape in layer.items()
    }
    return config, tower | {
        "language_model.lm_head.weight": (words, hidden),
        "aligner.layers.0.weight": (hidden, 1024),
        "aligner.layers.2.weight": (hidden, hidden),
        "gen_vision_model.decoder.all.weight": (7000, 10_000),
    }


def _write_pickles(folder: Path, tensors: list[OutgoingTensor]) -> None:
    """Write files of 10 GB, with an index, as on the Hub."""
    places, start = {}, 0
    for tensor in tensors:
        places[tensor.name] = start // PICKLE_BYTES
        start += tensor.num_bytes
    count = max(places.values()) + 1
    names = [f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin" for number in range(count)]
    for number, name in enumerate(names):
        own = [tensor for tensor in tensors if places[tensor.name] == number]
        torch.save({tensor.name: torch.cat(list(tensor.pieces)) for tensor in own}, folder / name)
    index = {"metadata": {}, "weight_map": {tensor: names[number] for tensor, number in places.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    for start, stop in row_ranges(shape, torch.bfloat16):
        rows = torch.empty((stop - start, *shape[1:]), dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        # Norms are near one, as in a trained model.
        yield rows if len(shape) > 1 else rows + 1


def _forget_cached_files() -> None:
    subprocess.run(["sync"], check=True)  # noqa: S607
    cache = Path("/proc/sys/vm/drop_caches")
    try:
        cache.write_text("3")
    except OSError:
        print(f"{cache} cannot be written: files may come from memory; run as root for a cold start")


def _measured(settings: dict) -> dict:
    folder = Path(settings["folder"])
    started = time.perf_counter()
    result = _PARTS[settings["part"]](folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / COPY, ignore_errors=True)
    return {"seconds": seconds, "peak": platform.resident_bytes(peak=True), "result": result}


def _copy(folder: Path) -> str:
    subprocess.run(["cp", "-r", folder / "hf", folder / COPY], check=True)  # noqa: S603, S607
    return ""


def _import(folder: Path) -> str:
    from megatron_cca.checkpoint.huggingface import import_checkpoint

    import_checkpoint(folder / "hf", folder / "megatron", progress_bar=False)
    return ""


def _export(folder: Path) -> str:
    from megatron_cca.checkpoint.huggingface import export_checkpoint

    export_checkpoint(folder / "megatron", folder / "exported", progress_bar=False)
    return ""


def _compare_tensors(folder: Path) -> str:
    from megatron_cca.checkpoint.huggingface import compare_tensors, open_both

    both = compare_tensors(*open_both(folder / "exported", folder / "megatron"), progress_bar=False)
    files = sorted(path.name for path in (folder / "hf").glob("*.safetensors"))
    same = all(_same_bytes(folder / "hf" / name, folder / "exported" / name) for name in files)
    result = f"{both.compared} tensors, {len(both.differences)} differ"
    # Of pickles the exported folder has the tensors, not the bytes.
    return f"{result}; exported files {'' if same else 'NOT '}identical" if files else result


def _same_bytes(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", "-s", one, other]).returncode == 0  # noqa: S603, S607


def _compare_logits(folder: Path) -> str:
    from megatron_cca.checkpoint.huggingface import compare_logits, open_both

    found = compare_logits(*open_both(folder / "hf", folder / "megatron"))
    return (
        f"{found.shape}: greatest difference {found.max_absolute:.1e}, {found.max_relative:.1e} of the largest logit, "
        f"top-1 {found.top1_agreement:.1%}"
    )


_PARTS = {
    "copy": _copy,
    "import": _import,
    "export": _export,
    "tensors": _compare_tensors,
    "logits": _compare_logits,
}


if __name__ == "__main__":
    main()
