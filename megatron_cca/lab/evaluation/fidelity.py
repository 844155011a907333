"""FID, sFID, Inception Score, KID, precision and recall by torch-fidelity, and others, on one extractor's features.

Images pass through the extractor once for all metrics. torch-fidelity would choose a network for each metric, download
it, and cache features in files. None of this is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch_fidelity import (
    KEY_METRIC_FID,
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation import (
    MOMENT_METRICS,
    PART_OF,
    SAMPLE_METRICS,
    Counts,
    FidelitySettings,
    obstacle,
)
from megatron_cca.lab.evaluation.extractors import OnProgress, check_images, extract, widths
from megatron_cca.lab.evaluation.manifolds import cmmd, density_and_coverage, vendi_score
from megatron_cca.lab.evaluation.shares import ALONE, Share

_DEFAULTS = FidelitySettings()
_SFID_CHANNELS = 7
# The number of rows of the distance matrix that precision and recall hold at the same time.
_DISTANCE_ROWS = 1000


class ReferenceImages:
    """Real images with the extractor's features.

    The features are kept, so that many sample sets use them.

    Args:
        images: uint8 ``[N, H, W]`` or ``[N, H, W, 3]``.
        extractor: see :func:`fidelity`.
        moments: mean ``[D]`` and covariance ``[D, D]`` of parts, over more images than these. FID ("features") and sFID
            ("spatial") use them if they are given, as OpenAI's evaluator does.

    Raises:
        UserError: images of another type or shape.
    """

    def __init__(
        self,
        images: np.ndarray,
        extractor: nn.Module,
        moments: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        check_images("reference", images)
        if not len(images) and not moments:
            raise UserError("reference: holds no images")
        self.images, self.extractor = images, extractor
        self.given = frozenset(moments or ())
        self._moments = {part: {"mu": mu, "sigma": sigma} for part, (mu, sigma) in (moments or {}).items()}
        self._parts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def parts(
        self,
        names: Iterable[str],
        batch_size: int = 64,
        on_progress: OnProgress | None = None,
        share: Share = ALONE,
    ) -> dict:
        """Return the named parts, float32 ``[N, D]``.

        The extractor runs only if some of them are not known yet.
        """
        names = set(names)
        if not names <= self._parts.keys():
            self._parts |= extract("reference", self.images, self.extractor, names, batch_size, on_progress, share)
        return self._parts

    def moments(self, part: str) -> dict[str, np.ndarray]:
        """Return ``mu`` float64 ``[D]`` and ``sigma`` float64 ``[D, D]`` of a part.

        They are the given ones, or those of the extracted images.
        """
        if part not in self._moments:
            self._moments[part] = fid_features_to_statistics(self._parts[part].double())
        return self._moments[part]


def fidelity(
    samples: np.ndarray,
    reference: np.ndarray | ReferenceImages,
    extractor: nn.Module,
    settings: FidelitySettings = _DEFAULTS,
    on_progress: OnProgress | None = None,
    share: Share = ALONE,
) -> dict[str, float]:
    """Measure the quality of samples, alone and against real images.

    FID is arXiv 1706.08500, Inception Score 1606.03498, KID 1801.01401 (unbiased, cubic kernel), precision and recall
    1904.06991, and sFID 2103.03841. torch-fidelity computes them. The features are converted to float64 first.

    Args:
        samples: uint8 ``[N, H, W]`` or ``[N, H, W, 3]``, grey levels or RGB from 0 to 255.
        reference: the same for real images, or a :class:`ReferenceImages` of the same extractor.
        extractor: maps uint8 ``[N, 3, H, W]`` to features ``[N, D]``, class logits ``[N, C]`` and, for sFID, spatial
            features ``[N, S]``. Its output is a tuple in this order or a dict with these keys. It runs on the device of
            its parameters.
        settings: the metrics and their parameters.
        on_progress: called with the number of images that have just passed through the extractor.
        share: the process's part. All processes of a job call this together.

    Returns:
        Each metric under its name; ``kid_std``, and ``inception_score_std`` where there are several splits. Nothing on
        other ranks than 0.

    Raises:
        UserError: images of another type or shape, too few images for a metric, or an extractor with another output or
            with values that are not finite.
    """
    check_images("samples", samples)
    if not isinstance(reference, ReferenceImages):
        reference = ReferenceImages(reference, extractor)
    assert reference.extractor is extractor, "the reference remembers another extractor's answers"
    counts = Counts(len(samples), len(reference), reference.given)
    found = widths(extractor, samples if len(samples) else reference.images)
    for metric in settings.metrics:
        problem = obstacle(metric, counts, found, settings)
        if problem is not None:
            raise UserError(f"{problem.side}: {problem.reason}")
    for part in reference.given & found.keys():
        if len(reference.moments(part)["mu"]) != found[part]:
            raise UserError(
                f"reference: its mean of {part} has {len(reference.moments(part)['mu'])} numbers, the extractor's "
                f"{part} have {found[part]}"
            )
    ours = extract(
        "samples",
        samples,
        extractor,
        {PART_OF[name] for name in settings.metrics},
        settings.batch_size,
        on_progress,
        share,
    )
    reference.parts(_wanted_of_reference(settings, reference.given), settings.batch_size, on_progress, share)
    return {} if share.rank else _compute(ours, reference, settings)


def _wanted_of_reference(settings: FidelitySettings, given: frozenset[str]) -> set[str]:
    binary = [name for name in settings.metrics if name not in SAMPLE_METRICS]
    return {PART_OF[name] for name in binary if not (name in MOMENT_METRICS and PART_OF[name] in given)}


def _compute(ours: dict[str, Tensor], reference: ReferenceImages, settings: FidelitySettings) -> dict[str, float]:
    found: dict[str, float] = {}
    if "inception_score" in settings.metrics:
        splits = settings.inception_score_splits
        score = isc_features_to_metric(ours["logits"], splits)
        found["inception_score"] = score[KEY_METRIC_ISC_MEAN]
        if splits > 1:
            found["inception_score_std"] = score[KEY_METRIC_ISC_STD]
    for name in MOMENT_METRICS:
        if name in settings.metrics:
            part = PART_OF[name]
            moments = fid_features_to_statistics(ours[part].double())
            found[name] = fid_statistics_to_metric(moments, reference.moments(part), verbose=False)[KEY_METRIC_FID]
    if {"kid", "precision", "recall"} & {*settings.metrics}:
        pair = ours["features"].double(), reference.parts({"features"})["features"].double()
        found |= _compare(*pair, settings)
    if {"density", "coverage"} & {*settings.metrics}:
        pair = ours["features"], reference.parts({"features"})["features"]
        found["density"], found["coverage"] = density_and_coverage(*pair, settings.neighborhood)
    if "vendi" in settings.metrics:
        found["vendi"] = vendi_score(ours["features"])
    if "cmmd" in settings.metrics:
        found["cmmd"] = cmmd(ours["clip"], reference.parts({"clip"})["clip"])
    order = [name for metric in settings.metrics for name in (metric, f"{metric}_std")]
    return {name: float(found[name]) for name in order if name in found}


def _compare(ours: Tensor, theirs: Tensor, settings: FidelitySettings) -> dict[str, float]:
    found = {}
    if "kid" in settings.metrics:
        subsets = {"kid_subsets": settings.kid_subsets, "kid_subset_size": settings.kid_subset_size}
        kid = kid_features_to_metric(ours, theirs, **subsets, verbose=False)
        found |= {"kid": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}
    if {"precision", "recall"} & {*settings.metrics}:
        options = {"prc_neighborhood": settings.neighborhood, "prc_batch_size": _DISTANCE_ROWS}
        manifolds = prc_features_to_metric(ours, theirs, **options, save_cpu_ram=True, verbose=False)
        found |= {"precision": manifolds[KEY_METRIC_PRECISION], "recall": manifolds[KEY_METRIC_RECALL]}
    return found


class InceptionV3(nn.Module):
    """torch-fidelity's copy of the Inception network of TensorFlow's FID, with weights from a file.

    It maps uint8 ``[N, 3, H, W]`` of any size to ``features`` ``[N, 2048]``, ``logits`` ``[N, 1008]`` and ``spatial``
    ``[N, 2023]``. The logits have no bias, as in the code of the Inception Score's authors. sFID uses the spatial
    features. They are the first 7 channels of ``mixed_6/conv`` in TensorFlow's graph, in its order ``[17, 17, 7]``.

    Args:
        weights: a file that :func:`megatron_cca.lab.evaluation.extractors.open_extractor` has checked.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=str(weights)
        )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._kept = output

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute features, logits and spatial features of RGB images with values from 0 to 255."""
        features, logits = self.network(images)
        spatial = self._kept[:, :_SFID_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._kept = None
        return {"features": features, "logits": logits, "spatial": spatial}
