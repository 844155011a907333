"""FID (arXiv 1706.08500) and Inception Score (arXiv 1606.03498) by torch-fidelity, on any feature extractor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from megatron_cca.errors import UserError

_NAME = "megatron-cca-extractor"
_LAYERS = ("features", "logits")


class _Extractor(FeatureExtractorBase):
    """Hands torch-fidelity the network of the current call."""

    network: nn.Module

    def __init__(self, name: str, features_list: list[str], **_unused) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return _LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        return None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = dict(zip(_LAYERS, self.network(images), strict=True))
        return tuple(outputs[name] for name in self.features_list)


class _Images(Dataset):
    """uint8 ``[N, 3, H, W]`` as torch-fidelity takes it."""

    def __init__(self, images: np.ndarray) -> None:
        grey = images.ndim == 3
        self.images = torch.from_numpy(np.repeat(images[:, None], 3, axis=1) if grey else images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity(samples: np.ndarray, reference: np.ndarray, network: nn.Module) -> dict[str, float]:
    """Inception Score of the samples, and their FID to the reference.

    Args:
        samples: uint8 ``[N, H, W]`` or ``[N, 3, H, W]``.
        reference: the same of real images.
        network: maps uint8 ``[N, 3, H, W]`` to features ``[N, D]`` and class logits ``[N, C]``.

    Returns:
        ``inception_score`` (in one split: with few samples, splits of a tenth would bias it) and ``fid``.

    Raises:
        UserError: images of another type or shape, or no more samples than feature dimensions.
    """
    for name, images in (("samples", samples), ("reference", reference)):
        _check(name, images, network)
    _Extractor.network = network
    metrics = calculate_metrics(
        input1=_Images(samples),
        input2=_Images(reference),
        feature_extractor=_NAME,
        isc=True,
        fid=True,
        isc_splits=1,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=500,
    )
    return {
        "inception_score": float(metrics["inception_score_mean"]),
        "fid": float(metrics["frechet_inception_distance"]),
    }


def _check(name: str, images: np.ndarray, network: nn.Module) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[1] != 3):
        raise UserError(f"{name}: expected uint8 [N, H, W] or [N, 3, H, W], found {images.dtype} {list(images.shape)}")
    with torch.no_grad():
        width = network(_Images(images[:1]).images)[0].shape[-1] if len(images) else 1
    if len(images) <= width:
        raise UserError(f"{name}: {len(images)} images are too few for FID on {width} features; give more than {width}")


register_feature_extractor(_NAME, _Extractor)
