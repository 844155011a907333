"""The networks whose features FID and similar metrics compare, and the extraction of these features in batches.

They are Inception, a small network for the digits, which is trained here on real scans, and networks of the user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.paths import typed_path
from megatron_cca.io.pickles import load_tensors
from megatron_cca.lab.evaluation.classifiers import check_digit_size, failures_said, is_function_spec, load_function
from megatron_cca.lab.evaluation.judges import is_judge, open_judge
from megatron_cca.lab.evaluation.named_networks import EXTRACTOR_KINDS, check_folder, folder_of, kind_of, open_network
from megatron_cca.lab.evaluation.shares import ALONE, Share

EXTRACTOR, WEIGHTS = "--extractor", "--inception-weights"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
# The name of the published file ends with the first digits of its SHA-256.
PUBLISHED_SHA256 = "6726825d"
# The widths are known before the networks are built. Impossible metrics are refused early.
WIDTHS = {
    "digits": {"features": 64, "logits": 10, "spatial": 256},
    "inception": {"features": 2048, "logits": 1008, "spatial": 2023},
}
# A tuple has the first two or three. Only a CLIP gives the last.
_PARTS = ("features", "logits", "spatial", "clip")
# The digits' network: the number of channels, of the last convolution's 64, in the spatial features. As with Inception,
# few channels are enough to show positions. Their FID then needs fewer images.
_SPATIAL_CHANNELS = 4
_CONVOLUTIONS = 4
_EPOCHS = 30
_BATCH = 64

OnProgress = Callable[[int], object]


class Extractor(nn.Module):
    """A network for :func:`megatron_cca.lab.evaluation.fidelity.fidelity`.

    Attributes:
        name: the name that the user gave.
        origin: the source of its weights, for the record.
    """

    def __init__(self, network: nn.Module, name: str, origin: dict[str, str]) -> None:
        super().__init__()
        self.network, self.name, self.origin = network.eval().requires_grad_(False), name, origin

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Map images to features ``[N, D]``, class logits ``[N, C]`` and perhaps spatial features ``[N, S]``.

        The images are uint8 ``[N, 3, H, W]``.
        """
        if not is_function_spec(self.name):
            return self.network(images)
        with failures_said(self.name, EXTRACTOR):
            return self.network(images)


def open_extractor(name: str, weights: Path | None = None) -> Extractor:
    """Build an extractor on the CPU.

    Nothing is downloaded.

    Args:
        name: ``digits`` for the demo's classifier, which is trained here on the real training scans; ``inception`` for
            the network of the published FIDs; ``FILE.judge`` for a trained judge; ``dinov2:FOLDER`` or ``clip:FOLDER``
            for a published model, see :mod:`megatron_cca.lab.evaluation.named_networks`; or ``FILE.py:FUNCTION`` for a
            function without arguments that returns a torch module.
        weights: the file of the Inception weights.

    Raises:
        UserError: see :func:`check_extractor`; a function that fails or returns something else; damaged weights.
    """
    check_extractor(name, weights)
    if name == "digits":
        return Extractor(standard_digit_cnn(), name, {"trained_on": "digits"})
    if name == "inception":
        return _inception(Path(weights))
    if kind_of(name, EXTRACTOR_KINDS) is not None:
        network, origin = open_network(name, EXTRACTOR)
        return Extractor(network, name, origin)
    if is_judge(name):
        with error_context(EXTRACTOR):
            judge = open_judge(Path(typed_path(name)))
        return Extractor(judge, name, {"sha256": _sha256(Path(typed_path(name))), "accuracy": f"{judge.accuracy:.4f}"})
    network = load_function(name, EXTRACTOR)()
    if not isinstance(network, nn.Module):
        raise UserError(f"{EXTRACTOR}: {name} must return a torch module, found {type(network).__name__}")
    return Extractor(network, name, {"sha256": _sha256(Path(typed_path(name.rpartition(":")[0])))})


def check_extractor(name: str, weights: Path | None) -> None:
    """Refuse a name that is no extractor, and Inception without its file.

    Nothing is loaded.

    Raises:
        UserError: says where to get the file and which option names it.
    """
    kind = kind_of(name, EXTRACTOR_KINDS)
    if kind is not None:
        check_folder(kind, folder_of(name, EXTRACTOR), EXTRACTOR)
    elif name not in WIDTHS and not is_judge(name) and not is_function_spec(name):
        raise UserError(
            f"{EXTRACTOR}: {name!r} is none of digits, inception, dinov2:FOLDER, clip:FOLDER, FILE.py:FUNCTION and "
            "FILE.judge"
        )
    if name != "inception":
        if weights is not None:
            raise UserError(f"{WEIGHTS}: only {EXTRACTOR} inception reads them, found {EXTRACTOR} {name}")
        return
    if weights is None:
        raise UserError(f"{EXTRACTOR}: inception needs its weights; {_remedy()}")
    if not Path(weights).is_file():
        raise UserError(f"{WEIGHTS}: the file {weights} does not exist; {_remedy()}")


def _remedy() -> str:
    return f"download {INCEPTION_URL} and name the file with {WEIGHTS} FILE"


def _inception(weights: Path) -> Extractor:
    from megatron_cca.lab.evaluation.fidelity import InceptionV3

    try:
        # torch-fidelity unpickles any contents of a file. This call proves that the file has only tensors.
        with weights.open("rb") as file:
            load_tensors(file)
        network = InceptionV3(weights)
    except OSError:
        raise
    except Exception as error:  # torch.load and load_state_dict promise no closed set for damaged files
        reason = " ".join(str(error).split())[:80]
        raise UserError(
            f"{WEIGHTS}: {weights} is damaged or holds other weights ({type(error).__name__}: {reason}); {_remedy()}"
        ) from None
    return Extractor(network, "inception", {"weights": str(weights), "sha256": _sha256(weights)})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def widths(extractor: nn.Module, images: np.ndarray) -> dict[str, int]:
    """Return the width of each part of an extractor's output.

    The first of the images passes through it.
    """
    return {name: part.shape[1] for name, part in _run(extractor, _batch(images[:1], _device(extractor))).items()}


def check_images(name: str, images: np.ndarray) -> None:
    """Refuse anything but uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.

    Raises:
        UserError: begins with ``name``, which says whose images they are.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise UserError(f"{name}: expected uint8 [N, H, W] or [N, H, W, 3], found {images.dtype} {list(images.shape)}")


def extract(
    who: str,
    images: np.ndarray,
    extractor: nn.Module,
    names: set[str],
    batch_size: int,
    on_progress: OnProgress | None,
    share: Share = ALONE,
) -> dict[str, Tensor]:
    """Return the named parts of an extractor's output, float32 ``[N, D]`` on the CPU.

    On other ranks than 0 they are those of the process's own rows.

    Args:
        who: the name of the images, for messages.
        images: uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.
        extractor: see :func:`megatron_cca.lab.evaluation.fidelity.fidelity`.
        names: the names of parts; without names the extractor does not run.
        batch_size: number of images in one batch.
        on_progress: called with the number of images just done, by all processes.
        share: the process's part.

    Raises:
        UserError: the extractor has another output, or values that are not finite.
    """
    device, kept = _device(extractor), {name: [] for name in names}
    for start in share.starts(len(images), batch_size) if names else ():
        batch = _batch(images[start : start + batch_size], device)
        answer = _run(extractor, batch)
        for name in names:
            kept[name].append(answer[name].float().cpu())
            if not kept[name][-1].isfinite().all():
                last = start + len(batch) - 1
                raise UserError(f"{who}: the extractor's {name} of images {start} to {last} are not all finite numbers")
        if on_progress is not None:
            on_progress(share.done(start, len(images), batch_size))
    # All processes send in one order.
    return {
        name: share.gathered(torch.cat(kept[name]) if kept[name] else torch.empty(0), len(images), batch_size)
        for name in sorted(names)
    }


def _device(extractor: nn.Module) -> torch.device:
    tensor = next(chain(extractor.parameters(), extractor.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _batch(images: np.ndarray, device: torch.device) -> Tensor:
    """Return the images as uint8 ``[N, 3, H, W]``."""
    pixels = torch.tensor(images).to(device)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@torch.no_grad()
def _run(extractor: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    answer = extractor(batch)
    if isinstance(answer, tuple | list):
        answer = dict(zip(_PARTS, answer, strict=False)) if len(answer) in (2, 3) else None
    good = isinstance(answer, Mapping) and all(
        name in _PARTS and isinstance(part, Tensor) and part.ndim >= 2 and len(part) == len(batch)
        for name, part in answer.items()
    )
    if not good or not answer:
        raise UserError(
            "extractor: must give features [N, D], logits [N, C] and perhaps spatial features [N, S], as a tuple of 2 "
            "or 3 tensors or a dict with the keys features, logits and spatial"
        )
    return {name: part.flatten(1) for name, part in answer.items()}


class DigitCnn(nn.Module):
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
            nn.Linear(64 * 16, WIDTHS["digits"]["features"]),
            nn.ReLU(),
        )
        self.head = nn.Linear(WIDTHS["digits"]["features"], 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of grey levels 0 to 255; of three equal channels only the first is read.

        Raises:
            UserError: images of another size.
        """
        check_digit_size(images.shape[2:])
        maps = self.trunk[:_CONVOLUTIONS](images[:, :1].float() / 255)
        features = self.trunk[_CONVOLUTIONS:](maps)
        return features, self.head(features), maps[:, :_SPATIAL_CHANNELS].flatten(1)


def train_digit_cnn(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> DigitCnn:
    """Train a network on real scans of digits, uint8 ``[N, 8, 8]``, with labels int64 ``[N]``.

    The result depends only on the scans and on ``seed``. The caller's random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cnn = _trained(torch.from_numpy(images)[:, None], torch.from_numpy(labels))
    return cnn.eval().requires_grad_(False)


@cache
def standard_digit_cnn() -> DigitCnn:
    """Return the network of the 1,437 training scans with seed 0. Each process trains it once."""
    # Imported late: only the digits need scikit-learn.
    from megatron_cca.data.digits import load_scans

    train, _ = load_scans()
    return train_digit_cnn(train.images, train.labels)


def _trained(images: Tensor, labels: Tensor) -> DigitCnn:
    cnn = DigitCnn()
    optimizer = torch.optim.Adam(cnn.parameters(), lr=1e-3)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            cross_entropy(cnn(images[rows])[1], labels[rows]).backward()
            optimizer.step()
    return cnn
