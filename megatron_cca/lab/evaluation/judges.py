"""A judge: a small CNN that was trained once on real images with labels, and is kept in a file.

It says which class an image shows. Its last hidden layer gives the features that FID and similar metrics compare. So
images of any data set can be evaluated without Inception's weights. Its figures compare sets of one data set with each
other, and are not those of papers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.outputs import file_system_errors, whole_file
from megatron_cca.io.pickles import load_tensors

JUDGE, SUFFIX = "--judge", ".judge"
WIDTHS = {"features": 64, "spatial": 256}
_MOST_CLASSES, _LARGEST_SIDE = 1 << 16, 1 << 14
_HELD_OUT, _LEAST_IMAGES = 0.1, 100
# Images seen in training, all epochs together, in at most so many epochs.
_SEEN, _MOST_EPOCHS, _BATCH = 200_000, 30, 128
_LARGEST_LOOKED_AT, _MAP_SIDE = 64, 14
_SPATIAL_CHANNELS, _SPATIAL_SIDE = 4, 8


class Judge(nn.Module):
    """A CNN for uint8 images ``[N, 3, height, width]``.

    Its outputs are features ``[N, 64]``, class logits ``[N, classes]`` and spatial features ``[N, 256]``.

    Attributes:
        accuracy: the share of held-out real images whose class it finds.
    """

    def __init__(self, height: int, width: int, classes: int, accuracy: float = 0.0) -> None:
        super().__init__()
        self.height, self.width, self.classes, self.accuracy = height, width, classes, accuracy
        self.maps = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(_MAP_SIDE),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.trunk = nn.Sequential(nn.Linear(64 * 16, WIDTHS["features"]), nn.ReLU())
        self.head = nn.Linear(WIDTHS["features"], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of levels 0 to 255.

        Raises:
            UserError: images of another size.
        """
        if images.shape[2:] != (self.height, self.width):
            found = " x ".join(map(str, images.shape[2:]))
            raise UserError(f"the judge takes images of {self.height} x {self.width} pixels, found {found}")
        # Large images are looked at from afar.
        side = (min(self.height, _LARGEST_LOOKED_AT), min(self.width, _LARGEST_LOOKED_AT))
        maps = self.maps(adaptive_avg_pool2d(images.float() / 255, side))
        features = self.trunk(adaptive_avg_pool2d(maps, 4).flatten(1))
        spatial = adaptive_avg_pool2d(maps[:, :_SPATIAL_CHANNELS], _SPATIAL_SIDE)
        return features, self.head(features), spatial.flatten(1)

    @torch.no_grad()
    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the classes that it sees in images uint8 ``[N, H, W, 3]``, int64 ``[N]``."""
        batches = (_pixels(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH))
        return torch.cat([self(batch)[1].argmax(1) for batch in batches]).numpy()


def is_judge(name: str) -> bool:
    """Return whether a name is that of a judge's file."""
    return name.endswith(SUFFIX)


def ensure_judge(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Train a judge on real images and keep it in a file, unless the file is there. Say its accuracy.

    Args:
        path: of the file.
        images: uint8 ``[N, H, W, 3]``.
        labels: int64 ``[N]``. A tenth of the images is held out for the accuracy.

    Raises:
        UserError: no labels, too few images, or a file that cannot be written.
    """
    if not path.exists():
        with error_context(JUDGE):
            judge, held_out = train_judge(images, labels)
        size = {"height": judge.height, "width": judge.width, "classes": judge.classes, "accuracy": judge.accuracy}
        with file_system_errors(path), whole_file(path) as partial:
            torch.save({**size, "weights": judge.state_dict()}, partial)
        print(f"trained {path}: accuracy {judge.accuracy:.3f} on {held_out} held-out real images", flush=True)


def train_judge(images: np.ndarray, labels: np.ndarray | None, seed: int = 0) -> tuple[Judge, int]:
    """Return a trained judge, and the number of images that its accuracy is over.

    The result depends only on the images and on ``seed``. The caller's random state does not change.

    Raises:
        UserError: no labels, labels below 0, or too few images.
    """
    if labels is None:
        raise UserError("the reference has no labels to train on; take one with labels, or a file that is there")
    if len(labels) < _LEAST_IMAGES or not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise UserError(
            f"needs {_LEAST_IMAGES} images or more, with labels of 0 to {_MOST_CLASSES - 1}; the reference has "
            f"{len(labels)}, with labels of {labels.min()} to {labels.max()}"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, rows = np.split(order, [int(_HELD_OUT * len(labels))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = _trained(images, labels, rows)
    judge.accuracy = float((judge.classify(images[held_out]) == labels[held_out]).mean())
    return judge, len(held_out)


def open_judge(path: Path) -> Judge:
    """Read a judge from its file.

    Raises:
        UserError: a missing, damaged or foreign file; names it.
    """
    if not path.is_file():
        raise UserError(f"the file {path} does not exist; megatron-cca evaluate {JUDGE} {path} trains one")
    try:
        found = load_tensors(path)
        sizes = found["height"], found["width"], found["classes"]
        if not all(type(size) is int and 0 < size <= _LARGEST_SIDE for size in sizes):
            raise ValueError("its sizes are not possible")
        judge = Judge(*sizes, float(found["accuracy"]))
        judge.load_state_dict(found["weights"])
    # torch.load and load_state_dict promise no closed set for damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path} is damaged or no judge ({type(error).__name__}: {reason}); remove it") from None
    return judge.eval().requires_grad_(False)


def _trained(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Judge:
    judge = Judge(*images.shape[1:3], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(min(_MOST_EPOCHS, -(-_SEEN // len(rows)))):
        for places in torch.randperm(len(rows)).split(_BATCH):
            chosen = rows[places.numpy()]
            optimizer.zero_grad()
            cross_entropy(judge(_pixels(images[chosen]))[1], torch.from_numpy(labels[chosen])).backward()
            optimizer.step()
    return judge.eval().requires_grad_(False)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
