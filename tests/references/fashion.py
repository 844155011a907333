"""What the studies of Fashion-MNIST need: as many samples, of random codes, and a judge of as many classes."""

import json

import numpy as np

from megatron_cca.config import ModelConfig
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.lab.evaluation.judges import ensure_judge
from megatron_cca.models import resolve_architecture

NUMBER, CLASSES, SIDE = 10_000, 10, 7


def written(folder):
    """Write shards by class and by caption, and the judge."""
    random = np.random.default_rng(0)
    codes, labels = random.integers(256, size=(NUMBER, 1, SIDE, SIDE)), np.arange(NUMBER) % CLASSES
    sizes = {"llamagen-tiny": {"codebook_size": 256, "num_classes": CLASSES}, "emu3-tiny": {"codebook_size": 256}}
    for name, model in zip(("fashion", "fashion_captions"), sizes, strict=True):
        vocabulary = resolve_architecture(ModelConfig(name=model, **sizes[model])).vocabulary
        samples = (Sample(*one) for one in zip(codes, labels[:, None], map(str, labels), strict=True))
        path = folder / "shards" / name
        write_shards(path, samples, vocabulary, lambda text: [1, 2, 1])
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "model": {"name": model, **sizes[model]}}))
    images = random.integers(256, size=(20 * CLASSES, 2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    ensure_judge(folder / "fashion.judge", images, labels[: len(images)])
