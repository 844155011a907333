"""Folders of real scans with captions, as a user has them; and what is wrong with files in real collections."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cca.data.digits import captions_of, load_scans


def write_scans(folder: Path, number: int, first: int = 0) -> Path:
    """PNGs and ``captions.jsonl``; the class is the condition."""
    folder.mkdir(parents=True, exist_ok=True)
    train, _ = load_scans()
    with (folder / "captions.jsonl").open("a", encoding="utf-8") as file:
        for index in range(first, first + number):
            name, label = f"{index:05d}.png", int(train.labels[index])
            Image.fromarray(train.images[index]).save(folder / name)
            line = {"file_name": name, "caption": captions_of(label)[index % 4], "condition": f"digit {label}"}
            file.write(json.dumps(line) + "\n")
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bad_images() -> dict[str, tuple[bytes, str]]:
    """File name -> contents, and what the reason must mention."""
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(256, size=(40, 60, 3), dtype=np.uint8))
    jpeg, png = encoded(photo, "JPEG"), encoded(photo)
    deep = Image.fromarray(random.integers(2**16, size=(9, 9), dtype=np.uint16))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = {"save_all": True, "append_images": frames[1:]}
    return {
        "empty.png": (b"", "empty"),
        "noise.jpg": (random.bytes(500), "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cut short"),
        "cut.png": (png[: len(png) // 2], "cut short"),
        "flipped.png": (png[:200] + bytes([png[200] ^ 1]) + png[201:], "damaged"),
        "cmyk.jpg": (encoded(photo.convert("CMYK"), "JPEG"), "CMYK"),
        "deep.png": (encoded(deep), "16-bit"),
        "moving.webp": (encoded(frames[0], "WEBP", **animation), "animated"),
        "moving.png": (encoded(frames[0], "PNG", **animation), "animated"),
        "huge.png": (encoded(Image.new("1", (20_000, 20_000))), "20000 x 20000"),
        "thin.png": (encoded(Image.new("L", (8, 100))), "aspect ratio"),
    }
