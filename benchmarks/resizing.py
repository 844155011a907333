"""DALI's resizing and the authors', on real photographs: pixels, and the share of codes that differ.

.venv/bin/pip install scikit-image    # for its photographs
.venv/bin/python benchmarks/resizing.py

The weights of the released tokenizers are not available. resizing.md has the results. It says what replaces the
weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
import torch
from measuring import machine
from torch import Tensor
from tqdm import tqdm

from megatron_cca.data.image_headers import ImageLimits, Rejected
from megatron_cca.data.resizing import RESIZINGS, centre
from megatron_cca.lab import markdown_table

CPU = torch.device("cpu")
AREA = 720 * 720
NAMES = (
    *(
        f"{name}.png"
        for name in ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon")
    ),
    *("motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg"),
)
# Name, side of the square (None: Emu3's area), pixels per code, codes.
SETTINGS = (
    ("LlamaGen, 256 x 256", 256, 16, 16_384),
    ("LlamaGen, 384 x 384", 384, 16, 16_384),
    ("Emu3, area 720 x 720", None, 8, 32_768),
)
IN_COLOUR = ("coffee.png", "retina.jpg", "astronaut.png", "rocket.jpg", "chelsea.png", "motorcycle_left.png")
PARTS = ("pixels", "networks")
# The side of the part of an image that Emu3's network encodes. The whole image at Emu3's area takes minutes on a core.
EMU3_WINDOW = 256
# The number of rows whose distances to a codebook are in memory at the same time.
ROWS = 1024

Way = dict[str, Tensor]


def main() -> None:
    """Measure the parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument(
        "--networks",
        type=int,
        nargs=2,
        default=(2, 2),
        metavar="N",
        help="photographs for LlamaGen's and Emu3's network",
    )
    arguments = parser.parse_args()
    photographs = {name: (files("skimage.data") / name).read_bytes() for name in NAMES}
    pixels = {
        setting[0]: {name: prepared(photographs, name, *setting[1:3]) for name in RESIZINGS} for setting in SETTINGS
    }
    print(f"{machine('cpu')}; {len(photographs)} photographs of scikit-image", flush=True)
    if "pixels" in arguments.parts:
        header = ["size", "PSNR in dB: least, median, most", "largest difference", "pixels that differ"]
        print("\n" + markdown_table(header, [[name, *pixel_row(**ways)] for name, ways in pixels.items()]), flush=True)
    columns = ["size", "codes", "codes that differ", "per photograph: least, median, most"]
    if "networks" in arguments.parts:
        title = "The released networks' shape with random weights"
        print_table(title, columns, network_rows(pixels, *arguments.networks))


def print_table(title: str, columns: list[str], rows: Iterator[list[str]]) -> None:
    """Print a table, each row as soon as it is known."""
    print(f"\n{title}\n\n{markdown_table(columns, [])}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def prepared(photographs: dict[str, bytes], way: str, side: int | None, factor: int) -> Way:
    """Resize each photograph as tokenize_images.py does, to uint8 ``[H, W, 3]``."""
    resizing = RESIZINGS[way](CPU, 2, ImageLimits())
    found = {}
    for name, data in photographs.items():
        size = resizing.check_image(data)
        plan = resizing.to_area(*size, AREA, factor) if side is None else resizing.to_cover(*size, side)
        (image,) = resizing.decode([data], [plan])
        if isinstance(image, Rejected):
            sys.exit(f"{name}: {image}")
        found[name] = image if side is None else centre(image, side, side)
    return found


def pixel_row(dali: Way, authors: Way) -> list[str]:
    """Return how far the pixels of two ways differ, in decibels and levels."""
    differences = [dali[name].int() - authors[name].int() for name in dali]
    decibels = sorted(10 * np.log10(255**2 / max(float(each.double().square().mean()), 1e-9)) for each in differences)
    changed = np.mean([float((each != 0).any(-1).double().mean()) for each in differences])
    most = max(int(each.abs().max()) for each in differences)
    return [spread(decibels, "{:.1f}"), str(most), f"{changed:.1%}"]


def spread(numbers: list[float], form: str) -> str:
    """Format the least, the median and the most."""
    return ", ".join(form.format(each) for each in (min(numbers), float(np.median(numbers)), max(numbers)))


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest vector for each point, int64 ``[M]``."""
    squares = codebook.square().sum(1)
    return torch.cat([(squares - 2 * part @ codebook.T).argmin(1) for part in points.split(ROWS)])


def network_rows(pixels: dict[str, dict[str, Way]], llamagen: int, emu3: int) -> Iterator[list[str]]:
    """Yield the rows of each network: the codes of its latents that differ.

    The codebook is drawn from a Gaussian with the mean and the covariance of the latents.
    """
    for name, side, _, size in SETTINGS:
        latents_of, number = (emu3_latents, emu3) if side is None else (llamagen_latents, llamagen)
        photos = IN_COLOUR[:number]
        with tqdm(total=2 * number, desc=f"encoding, {name}", unit="image") as bar:
            found = {
                way: latents_of({photo: images[photo] for photo in photos}, bar) for way, images in pixels[name].items()
            }
        codebook = gaussian(torch.cat([each for of in found.values() for each in of.values()]).double(), size)
        codes = {
            way: {photo: nearest(each.double(), codebook) for photo, each in of.items()} for way, of in found.items()
        }
        yield [name, f"{size:,}", *shares(**codes)]


def gaussian(points: Tensor, number: int) -> Tensor:
    """Draw float64 ``[number, D]`` with the mean and the covariance of points ``[M, D]``."""
    factor = torch.linalg.cholesky(torch.cov(points.T) + 1e-12 * torch.eye(points.shape[1]))
    noise = torch.randn(number, points.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return points.mean(0) + noise @ factor.T


@torch.no_grad()
def llamagen_latents(images: Way, bar: tqdm) -> Way:
    """Return the vectors that VQ-16 compares with its codebook, float32 ``[h * w, 8]``, of unit length."""
    from megatron_cca.models.vq_directions import DirectionTokenizer
    from megatron_cca.models.vq_network import VqNetwork, VqSizes

    torch.manual_seed(0)
    sizes = VqSizes(128, (128, 128, 256, 256, 512), 2, 256, 16_384, 8)
    tokenizer = DirectionTokenizer(VqNetwork(sizes), torch.randn(16_384, 8), sizes, "random")
    found = {}
    for name, image in images.items():
        vectors = tokenizer.latents(image[None])[0].movedim(0, -1).reshape(-1, 8)
        found[name] = torch.nn.functional.normalize(vectors, dim=-1)
        bar.update()
    return found


@torch.no_grad()
def emu3_latents(images: Way, bar: tqdm) -> Way:
    """Return what Emu3's tokenizer compares with its codebook, float32 ``[h * w, 4]``, for each image's centre."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from megatron_cca.models.emu3.image_tokenizer import Emu3ImageTokenizer

    torch.manual_seed(0)
    # The released sizes are transformers' defaults. The codebook is not used here.
    model, seen = Emu3VQVAE(Emu3VQVAEConfig(codebook_size=8)), []
    model.quantize.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokenizer, found = Emu3ImageTokenizer(model, [0.5] * 3, [0.5] * 3, "random"), {}
    for name, image in images.items():
        tokenizer.encode(centre(image, EMU3_WINDOW, EMU3_WINDOW)[None])
        found[name] = seen.pop()[0].movedim(1, -1).reshape(-1, 4)
        bar.update()
    return found


def shares(dali: Way, authors: Way) -> list[str]:
    """Return the share of codes that differ, over all and by photograph."""
    each = [float((dali[name] != authors[name]).double().mean()) for name in dali]
    differing = sum(int((dali[name] != authors[name]).sum()) for name in dali)
    total = sum(len(codes) for codes in dali.values())
    return [f"{differing / total:.1%}", spread(each, "{:.1%}")]


if __name__ == "__main__":
    main()
