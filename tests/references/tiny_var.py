"""What a run of VAR's tiny model begins with: random weights and codes, through the program's own importer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.models.var import PRESETS
from tests.references import var

# As many as there are digits for other families.
SAMPLES = 1437
# Large weights, so that errors would show.
STD = 0.1


def checkpoint(folder: Path) -> Path:
    """Import random weights with their image tokenizer's frozen tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(var.random_weights(var.TINY, std=STD) | var.buffers(var.TINY), folder / "var.pth")
    torch.save(var.random_quantizer(var.TINY), folder / "vae_ch160v4096z32.pth")
    import_checkpoint(folder / "var.pth", folder / "imported", progress_bar=False)
    return folder / "imported"


def shards(folder: Path) -> Path:
    """Write random codes of ten classes."""
    codes = np.random.default_rng(0).integers(var.TINY.codebook, size=(SAMPLES, 1, var.TINY.tokens))
    samples = [Sample(image, np.array([index % var.TINY.classes])) for index, image in enumerate(codes)]
    write_shards(folder, samples, PRESETS["var-tiny"].vocabulary, None)
    return folder


def settings(folder: Path) -> list[str]:
    """Return the overrides of a run: the model, its weights and its data, which are written to ``folder``."""
    return [
        "model.name=var-tiny",
        f"training.pretrained_checkpoint={checkpoint(folder / 'model')}",
        f"data.path={shards(folder / 'shards')}",
    ]
