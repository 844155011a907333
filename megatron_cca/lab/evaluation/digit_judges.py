"""Independent judges of handwritten digits: an SVM for accuracy, a CNN for IS and FID.

They are trained on real scans only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError

FEATURES = 64
SIZE = (8, 8)
# The number of channels, of the last convolution's 64, in the spatial features. As with Inception, few channels are
# enough to show positions. Their FID then needs fewer images.
_SPATIAL_CHANNELS = 4
_CONVOLUTIONS = 4
_EPOCHS = 30
_BATCH = 64


class DigitCNN(nn.Module):
    """A CNN for uint8 images ``[N, 1 or 3, 8, 8]``.

    Its outputs are features ``[N, 64]``, class logits ``[N, 10]`` and spatial features ``[N, 256]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of grey levels 0 to 255; of three equal channels only the first is read.

        Raises:
            UserError: images of another size.
        """
        check_size(images.shape[2:])
        maps = self.trunk[:_CONVOLUTIONS](images[:, :1].float() / 255)
        features = self.trunk[_CONVOLUTIONS:](maps)
        return features, self.head(features), maps[:, :_SPATIAL_CHANNELS].flatten(1)


@dataclass(frozen=True)
class DigitJudges:
    """Both judges; all images are uint8 ``[N, 8, 8]``."""

    svm: SVC
    cnn: DigitCNN

    @classmethod
    def train(cls, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> DigitJudges:
        """Train the judges on real scans.

        The result depends only on the scans and on ``seed``. The caller's random state does not change.
        """
        svm = SVC(gamma=0.001, C=10.0).fit(_pixels(images), labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cnn = _train_cnn(torch.from_numpy(images)[:, None], torch.from_numpy(labels))
        return cls(svm, cnn.eval().requires_grad_(False))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the SVM's digits, int64 ``[N]``."""
        return self.svm.predict(_pixels(images)).astype(np.int64)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images in which the SVM sees the requested digit."""
        return float(self.svm.score(_pixels(images), labels))


@cache
def standard_judges() -> DigitJudges:
    """Return the judges of the 1,437 training scans with seed 0.

    Each process trains them once.
    """
    train, _ = load_scans()
    return DigitJudges.train(train.images, train.labels)


def check_size(size: tuple[int, ...]) -> None:
    """Refuse images whose height and width differ from the scans'.

    Raises:
        UserError: names the size found.
    """
    if tuple(size) != SIZE:
        raise UserError(f"the digits' judges take images of 8 x 8 pixels, found {' x '.join(map(str, size))}")


def _pixels(images: np.ndarray) -> np.ndarray:
    """Return the SVM's inputs: grey levels 0 to 16, as in scikit-learn."""
    return images.reshape(len(images), -1) * (16 / 255)


def _train_cnn(images: Tensor, labels: Tensor) -> DigitCNN:
    cnn = DigitCNN()
    optimizer = torch.optim.Adam(cnn.parameters(), lr=1e-3)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            cross_entropy(cnn(images[rows])[1], labels[rows]).backward()
            optimizer.step()
    return cnn
