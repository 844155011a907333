"""The output files of a sampling job: PNGs, codes, prompts.jsonl, and the .npz that OpenAI's evaluator reads."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, PROMPTS, CODES, SETTINGS, SHEET, NPZ = (
    "images",
    "prompts.jsonl",
    "codes.npy",
    "settings.json",
    "sheet.png",
    "samples.npz",
)
FORMER = frozenset({IMAGES, PROMPTS, CODES, SETTINGS, SHEET, NPZ})


def image_name(index: int) -> str:
    """Return the path of an image inside the output folder."""
    return f"{IMAGES}/{index:06d}.png"


def write_images(folder: Path, indices: Sequence[int], images: np.ndarray) -> None:
    """Write one PNG per image, uint8 ``[N, H, W, 3]``. Each is named by the index of its prompt."""
    for index, image in zip(indices, images, strict=True):
        Image.fromarray(image).save(folder / image_name(index))


def read_image(folder: Path, index: int) -> np.ndarray:
    """Read one written image, uint8 ``[H, W, 3]``."""
    with Image.open(folder / image_name(index)) as image:
        return np.asarray(image.convert("RGB"))


def write_prompts(folder: Path, rows: Sequence[dict]) -> None:
    """Write one JSON object per image: ``file``, ``prompt``, ``label``, ``seed``, and what else a row has."""
    lines = (json.dumps({"file": image_name(index), **row}, ensure_ascii=False) for index, row in enumerate(rows))
    (folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_npz(folder: Path, count: int, labels: Sequence[int] | None) -> None:
    """Write all images in one file: ``arr_0`` uint8 ``[N, H, W, 3]`` and, with labels, ``arr_1`` int64 ``[N]``.

    The evaluator that the CCA authors used reads this file (openai/guided-diffusion, ``evaluations/``). Images are
    written one at a time, so that 50,000 of them need not fit into memory.
    """
    first = read_image(folder, 0)
    with zipfile.ZipFile(folder / NPZ, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(count):
                file.write(np.ascontiguousarray(read_image(folder, index)).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
