"""Evaluation of samples. Here: its options, the metrics, and the number of images that each needs.

Nothing here imports torch or torch-fidelity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.options import Count, DeviceChoice, File, Folder, Option, PathOrWord, options
from megatron_cca.io.paths import typed_path

METRICS: tuple[str, ...] = ("fid", "inception_score", "kid", "precision", "recall", "sfid")
# Metrics that are computed when they are asked for by name.
ON_REQUEST = ("density", "coverage", "vendi", "cmmd")
TITLES = {
    "cmmd": "CMMD",
    "coverage": "coverage",
    "density": "density",
    "fid": "FID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "sfid": "sFID",
    "vendi": "Vendi score",
}
Part = Literal["features", "logits", "spatial", "clip"]
# The part of an extractor's output that each metric uses.
PART_OF: dict[str, Part] = {
    "cmmd": "clip",
    "coverage": "features",
    "density": "features",
    "fid": "features",
    "inception_score": "logits",
    "kid": "features",
    "precision": "features",
    "recall": "features",
    "sfid": "spatial",
    "vendi": "features",
}
# Metrics of samples alone.
SAMPLE_METRICS = ("inception_score", "vendi")
# Metrics that need only a mean and a covariance of the reference.
MOMENT_METRICS = ("fid", "sfid")
# Words in place of a path: scikit-learn's scans for training, and the others.
DIGITS, HELD_OUT = WORDS = ("digits", "digits-held-out")


def _known_metrics(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names, each once."""
    for name in names or ():
        if name not in TITLES:
            raise UserError(f"metrics: {name!r} is unknown; known: {', '.join((*METRICS, *ON_REQUEST))}")
    return None if names is None else tuple(dict.fromkeys(names))


@options
class FidelitySettings:
    """How samples are held against a reference.

    Raises:
        UserError: an unknown metric, or a number that is too small.
    """

    metrics: Annotated[tuple[str, ...], Option(hidden=True), AfterValidator(_known_metrics)] = (
        "fid",
        "inception_score",
    )
    """of ``METRICS`` and ``ON_REQUEST``"""
    kid_subsets: Count = 100
    """KID is the mean over so many random subsets"""
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    """images in each; both sets must have as many"""
    neighborhood: Count = 3
    """k of the k-th nearest neighbour in precision, recall, density and coverage"""
    inception_score_splits: Count = 1
    """the Inception Score is the mean over so many parts of the samples; papers take 10 with 50,000 images, with few
    images that biases the score"""
    batch_size: Count = 64
    """images that the extractor sees together"""


@options
class EvaluateOptions:
    """The sets that are compared, and where the report goes.

    Raises:
        UserError: two sets have one name, or a metric is unknown.
    """

    samples: Annotated[tuple[str, ...], Option(metavar="[NAME=]PATH")]
    """a set of samples; may be repeated, and is a row of the table each time (default name: that of the file or
    folder)"""
    reference: PathOrWord
    """the set of real images"""
    output: Folder
    """an empty or new folder"""
    overwrite: bool = False
    """replace a former report in --output, nothing else"""
    extractor: Annotated[str, Option(metavar="NAME")] | None = None
    """the network behind the metrics: inception, as in papers; digits, the demo's classifier, trained on the spot;
    FILE.judge, which --judge trained; dinov2:FOLDER or clip:FOLDER, a copy of the published model in transformers'
    form; or FILE.py:FUNCTION, a function that returns a torch module from uint8 [N, 3, H, W] to features and logits
    (default: that of --judge, digits where the reference is the digits, else inception)"""
    judge: Annotated[Path, Option(metavar="FILE.judge")] | None = None
    """a small network for images of one data set, as --extractor and --classifier where these are not given: trained on
    the reference and its labels if the file is not there, and kept in it for evaluations and studies to come"""
    inception_weights: File | None = None
    """torch-fidelity's file of Inception's weights, which --extractor inception needs; never downloaded"""
    metrics: Annotated[
        tuple[str, ...] | None,
        Option(metavar="NAME", values="*"),
        AfterValidator(_known_metrics),
        Field(
            description=f"of {' '.join(METRICS)} (default: all of these that the images and the extractor allow, with "
            f"a line for each that is left out) and of {' '.join(ON_REQUEST)}; without a NAME: none of them, only "
            "class accuracy and scores"
        ),
    ] = None
    numbers: FidelitySettings = field(default_factory=FidelitySettings)
    classifier: Annotated[str, Option(metavar="NAME")] | None = None
    """says which class an image shows: digits, the demo's SVM; FILE.judge, which --judge trained; or FILE.py:FUNCTION
    from uint8 [N, H, W, 3] to int64 [N] (default: that of --judge, or digits where the reference is the digits and
    samples of their size have labels)"""
    clip: Annotated[Folder, Option(metavar="FOLDER")] | None = None
    """a CLIP in transformers' form; gives the CLIP score 100 * max(cosine, 0) of samples that have prompts"""
    detector: Annotated[Folder, Option(metavar="FOLDER")] | None = None
    """a detector of COCO's classes in transformers' form (Mask2Former, DETR, RT-DETR and others); gives GenEval's
    checks of samples drawn with --prompts geneval; colors need --clip"""
    save_statistics: Annotated[Path, Option(metavar="FILE.npz")] | None = None
    """keep mean and covariance of the reference's features, with the extractor and the number and size of its images;
    --reference FILE.npz then stands for the images in FID and sFID"""
    scorer: Annotated[tuple[str, ...], Option(metavar="NAME")] = ()
    """rewards of samples that have prompts, beside FID in the table: clip:FOLDER, pickscore:FOLDER, hpsv2:FILE,
    imagereward:FILE, or FILE.py:FUNCTION of images uint8 [N, H, W, 3] and N prompts; may be repeated"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""

    def __post_init__(self) -> None:
        # Two sets of one name are refused now.
        _ = self.sets
        if self.judge is not None and self.judge.suffix != ".judge":
            raise UserError(f"--judge: {self.judge} must end with .judge")
        if self.save_statistics is not None and self.save_statistics.suffix != ".npz":
            raise UserError(f"--save-statistics: {self.save_statistics} must end with .npz")
        if len(set(self.scorer)) < len(self.scorer):
            raise UserError("--scorer: one is named twice; leave it out")

    @cached_property
    def sets(self) -> dict[str, str]:
        """Path of each set of samples by its name."""
        return named_sets(self.samples)

    @property
    def network(self) -> str:
        """Name of the extractor."""
        own = None if self.judge is None else str(self.judge)
        return self.extractor or own or ("digits" if self.reference in WORDS else "inception")


def named_sets(samples: Sequence[str]) -> dict[str, str]:
    """Return the path of each set by its name.

    Args:
        samples: values of ``--samples``.

    Raises:
        UserError: a value of another form, or two sets of one name.
    """
    found: dict[str, str] = {}
    for text in samples:
        name, separator, path = text.partition("=")
        is_path = not separator or "/" in name or Path(text).exists()
        with error_context("--samples"):
            path = typed_path(text) if is_path else path and typed_path(path)
        name = Path(path).resolve().name.removesuffix(".npz") if is_path else name
        if not name or not path:
            raise UserError(f"--samples: {text!r} is not of the form [NAME=]PATH")
        if name in found:
            raise UserError(f"--samples: two sets are called {name}; tell them apart with NAME=PATH")
        found[name] = path
    return found


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
        metric: a member of ``METRICS`` or ``ON_REQUEST``.
        counts: the numbers of images.
        widths: widths of the parts that the extractor gives, such as ``{"features": 2048, "logits": 1008}``.
        settings: subset size, neighbourhood and splits.
    """
    part = PART_OF[metric]
    if part not in widths:
        what = {"spatial": "spatial features", "clip": "embeddings of a CLIP"}.get(part, part)
        return Obstacle("extractor", f"gives no {what}, on which {TITLES[metric]} is computed")
    wanted, how = _wanted(metric, widths[part], settings)
    sides = [("samples", counts.samples)]
    if metric not in SAMPLE_METRICS and not (metric in MOMENT_METRICS and part in counts.moments):
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
    if metric in ("vendi", "cmmd"):
        return 2, "of a distribution"
    return settings.neighborhood + 1, f"with neighborhood {settings.neighborhood}"
