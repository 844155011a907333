"""Evaluation of samples. Here: the metrics, their settings, and the number of images that each needs.

Nothing here imports torch or torch-fidelity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from megatron_cca.errors import UserError
from megatron_cca.io.options import Option, options

METRICS: tuple[str, ...] = ("fid", "inception_score", "kid", "precision", "recall", "sfid")
TITLES = {
    "fid": "FID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "sfid": "sFID",
}
Part = Literal["features", "logits", "spatial"]
# The part of an extractor's output that each metric uses.
PART_OF: dict[str, Part] = {
    "fid": "features",
    "inception_score": "logits",
    "kid": "features",
    "precision": "features",
    "recall": "features",
    "sfid": "spatial",
}


# Metrics that need only a mean and a covariance of the reference.
MOMENT_METRICS = ("fid", "sfid")


@options
class FidelitySettings:
    """How samples are held against a reference.

    Raises:
        UserError: an unknown metric, a number that is too small.
    """

    metrics: Annotated[tuple[str, ...], Option(hidden=True)] = ("fid", "inception_score")
    """of ``METRICS``"""
    kid_subsets: int = 100
    """KID is the mean over so many random subsets"""
    kid_subset_size: int = 1000
    """images in each; both sets must have as many"""
    neighborhood: int = 3
    """k of the k-th nearest neighbour in precision and recall"""
    inception_score_splits: int = 1
    """papers take 10 with 50,000 images; with few images that biases the score"""
    batch_size: int = 64
    """images that the extractor sees together"""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"metrics: {metric!r} is unknown; known: {', '.join(METRICS)}")
        least = {
            "kid_subsets": 1,
            "kid_subset_size": 2,
            "neighborhood": 1,
            "inception_score_splits": 1,
            "batch_size": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name}: must be {bound} or more, found {getattr(self, name)}")


@dataclass(frozen=True)
class Counts:
    """The numbers of images.

    ``moments`` names the parts whose mean and covariance the reference's file has.
    """

    samples: int
    reference: int
    moments: frozenset[str] = frozenset()


class Obstacle(NamedTuple):
    """The reason why a metric cannot be computed.

    ``side`` is samples, reference or extractor. ``reason`` is a text for messages.
    """

    side: str
    reason: str


def obstacle(metric: str, counts: Counts, widths: dict[str, int], settings: FidelitySettings) -> Obstacle | None:
    """Return why a metric cannot be computed, with the number of images that it needs.

    It is None if the metric can be computed.

    Args:
        metric: a member of ``METRICS``.
        counts: the numbers of images.
        widths: widths of the parts that the extractor gives, such as ``{"features": 2048, "logits": 1008}``.
        settings: subset size, neighbourhood and splits.
    """
    part = PART_OF[metric]
    if part not in widths:
        what = "spatial features" if part == "spatial" else part
        return Obstacle("extractor", f"gives no {what}, on which {TITLES[metric]} is computed")
    wanted, how = _wanted(metric, widths[part], settings)
    sides = [("samples", counts.samples)]
    if metric != "inception_score" and not (metric in MOMENT_METRICS and part in counts.moments):
        sides.append(("reference", counts.reference))
    for side, count in sides:
        if count < wanted:
            return Obstacle(side, f"{count} images are too few for {TITLES[metric]} {how}; it wants {wanted} or more")
    return None


def _wanted(metric: str, width: int, settings: FidelitySettings) -> tuple[int, str]:
    if metric in MOMENT_METRICS:
        # With fewer images the covariance is singular. The distance then depends on their number more than on the
        # images.
        return width + 1, f"on {width} features"
    if metric == "kid":
        return settings.kid_subset_size, f"with kid_subset_size {settings.kid_subset_size}"
    if metric == "inception_score":
        splits = settings.inception_score_splits
        return 2 * splits, f"in {splits} splits" if splits > 1 else "of their spread over classes"
    return settings.neighborhood + 1, f"with neighborhood {settings.neighborhood}"
