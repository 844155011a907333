"""Judge sets of images: FID, sFID, Inception Score, KID, precision and recall, class accuracy, CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_cca.errors import UserError, error_context
from megatron_cca.io.options import DeviceChoice, File, Folder, Option, PathOrWord, options
from megatron_cca.io.output_folders import check_apart
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.paths import typed_path
from megatron_cca.lab.evaluation import METRICS, FidelitySettings
from megatron_cca.programs.parsing import parse, spelled_as_options
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.lab.evaluation.planning import EvaluationSettings

_EXAMPLES = """examples:
  python tools/evaluate.py --samples base=runs/samples/base --samples cca=runs/samples/cca --reference digits \\
      --output runs/evaluation
  python tools/evaluate.py --samples cca=samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception-weights weights-inception-2015-12-05-6726825d.pth --output runs/evaluation

Sets of images are folders of PNG or JPEG files (there or one level below), output folders of tools/generate.py, .npz
files with arr_0 uint8 [N, H, W, 3] and perhaps labels in arr_1, or the words digits (the training scans) and
digits-held-out. An .npz that holds mu and sigma (and mu_s, sigma_s) beside its images, as OpenAI's reference batches
do, gives FID and sFID to those, with --extractor inception.

Written to the output folder: metrics.json, table.md, samples-NAME.png, fid_is.png where there are several sets, and
class_accuracy.png where there are labels and a classifier.
"""
_PACKAGES = ("matplotlib", "PIL", "scipy", "sklearn", "torch-fidelity", "torchvision", "transformers")


@options
class EvaluateOptions:
    """The sets that are compared, and where the report goes."""

    samples: Annotated[tuple[str, ...], Option(metavar="[NAME=]PATH")]
    """a set of images to judge; may be repeated, a row each (the name is that of the file or folder)"""
    reference: PathOrWord
    """the set of real images"""
    output: Folder
    """an empty or new folder"""
    overwrite: bool = False
    """replace a former report in --output, nothing else"""
    extractor: Annotated[str, Option(metavar="NAME")] | None = None
    """the network behind the metrics: inception, as in papers; digits, the demo's classifier, trained on the spot; or
    FILE.py:FUNCTION, a function that returns a torch module from uint8 [N, 3, H, W] to features and logits (default:
    digits where the reference is the digits, else inception)"""
    inception_weights: File | None = None
    """torch-fidelity's weights file; never downloaded"""
    metrics: Annotated[
        tuple[str, ...] | None,
        Option(metavar="NAME", values="*"),
        Field(
            description=f"of {' '.join(METRICS)} (default: all that the images and the extractor allow; what is left "
            "out is said; no name: none of them, only class accuracy and CLIP score)"
        ),
    ] = None
    numbers: FidelitySettings = field(default_factory=FidelitySettings)
    classifier: Annotated[str, Option(metavar="NAME")] | None = None
    """says which class an image shows: digits, the demo's SVM, or FILE.py:FUNCTION from uint8 [N, H, W, 3] to int64 [N]
    (default: digits where the reference is the digits and samples of their size have labels)"""
    clip: Annotated[Folder, Option(metavar="FOLDER")] | None = None
    """a CLIP in transformers' form; gives the CLIP score 100 * max(cosine, 0) of samples that have prompts"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""


OPTIONS = EvaluateOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be evaluated, write the report and print the table."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    with reported_tool_errors(_PACKAGES):
        _evaluate(given)


def named_sets(samples: Sequence[str]) -> dict[str, str]:
    """Return the path of each set by its name. Two sets of one name are a :class:`UserError`."""
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


def settings_of(given: EvaluateOptions) -> EvaluationSettings:
    """Return the settings of the evaluation that the options ask for.

    Raises:
        UserError: two sets have one name, or a metric is unknown.
    """
    from megatron_cca.lab.evaluation.image_sets import WORDS
    from megatron_cca.lab.evaluation.planning import EvaluationSettings

    metrics = None if given.metrics is None else tuple(dict.fromkeys(given.metrics))
    with spelled_as_options(FidelitySettings):
        numbers = replace(given.numbers, metrics=metrics or ())
    return EvaluationSettings(
        samples=named_sets(given.samples),
        reference=given.reference,
        extractor=given.extractor or ("digits" if given.reference in WORDS else "inception"),
        inception_weights=given.inception_weights,
        metrics=metrics,
        numbers=numbers,
        classifier=given.classifier,
        clip=given.clip,
    )


def _evaluate(given: EvaluateOptions) -> None:
    # Imported late: --help need not wait for it.
    from megatron_cca.lab.evaluation.planning import check
    from megatron_cca.lab.evaluation.report import reserved

    check_writable(given.output)
    settings = settings_of(given)
    check(settings)
    sources = [("--samples", path) for path in settings.samples.values()] + [("--reference", settings.reference)]
    for option, path in sources:
        if Path(path).is_dir():
            check_apart(given.output, Path(path), option)
    with reserved(given.output, overwrite=given.overwrite):
        _run(given, settings)


def _run(given: EvaluateOptions, settings: EvaluationSettings) -> None:
    from megatron_cca import platform

    platform.install_option(given.device)
    # Imported late: this imports Megatron-Core, before which the platform must be installed.
    from megatron_cca.lab.evaluation.report import evaluate, table, write_report

    evaluation = evaluate(settings, platform.device())
    names = write_report(given.output, evaluation)
    print(table(evaluation))
    print(f"\nwrote {', '.join(names)} to {given.output}")
