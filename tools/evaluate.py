"""Judge sets of images: FID, sFID, Inception Score, KID, precision and recall, class accuracy, CLIP score."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca import platform
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.outputs import check_apart, check_writable
from megatron_cca.io.typed_paths import name_option, path_option, typed_path
from megatron_cca.lab.evaluation.known_metrics import METRICS, FidelitySettings
from megatron_cca.lab.evaluation.listings import WORDS
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
_PACKAGES = ("matplotlib", "PIL", "scipy", "sklearn", "torch_fidelity", "torchvision", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be evaluated, write the report and print the table."""
    arguments = _parser().parse_args(argv)
    with reported_tool_errors(_PACKAGES, "data,eval,hf"):
        _evaluate(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples",
        required=True,
        action="append",
        metavar="[NAME=]PATH",
        help="a set of images to judge; may be repeated, a row each (the name is that of the file or folder)",
    )
    parser.add_argument("--reference", required=True, type=name_option, metavar="PATH", help="the set of real images")
    parser.add_argument("--output", type=path_option, required=True, metavar="DIR", help="an empty or new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a former report in --output, nothing else")
    parser.add_argument(
        "--extractor",
        metavar="NAME",
        help="the network behind the metrics: inception, as in papers; digits, the demo's classifier, trained on the "
        "spot; or FILE.py:FUNCTION, a function that returns a torch module from uint8 [N, 3, H, W] to features and "
        "logits (default: digits where the reference is the digits, else inception)",
    )
    parser.add_argument(
        "--inception-weights", type=path_option, metavar="FILE", help="torch-fidelity's weights file; never downloaded"
    )
    parser.add_argument(
        "--metrics",
        nargs="*",
        metavar="NAME",
        help=f"of {' '.join(METRICS)} (default: all that the images and the extractor allow; what is left out is said; "
        "no name: none of them, only class accuracy and CLIP score)",
    )
    _add_numbers(parser)
    parser.add_argument(
        "--classifier",
        metavar="NAME",
        help="says which class an image shows: digits, the demo's SVM, or FILE.py:FUNCTION from uint8 [N, H, W, 3] to "
        "int64 [N] (default: digits where the reference is the digits and samples of their size have labels)",
    )
    parser.add_argument(
        "--clip",
        type=path_option,
        metavar="FOLDER",
        help="a CLIP in transformers' form; gives the CLIP score 100 * max(cosine, 0) of samples that have prompts",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    numbers = FidelitySettings()
    for name, text in (
        ("kid_subsets", "KID is the mean over so many random subsets"),
        ("kid_subset_size", "images in each; both sets must have as many"),
        ("neighborhood", "k of the k-th nearest neighbour in precision and recall"),
        ("inception_score_splits", "papers take 10 with 50,000 images; with few images that biases the score"),
        ("batch_size", "images that the extractor sees together"),
    ):
        default = getattr(numbers, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default {default})")


def _named(samples: list[str]) -> dict[str, str]:
    """Name -> path."""
    found: dict[str, str] = {}
    for text in samples:
        name, separator, path = text.partition("=")
        is_path = not separator or "/" in name or Path(text).exists()
        with said_of("--samples"):
            path = typed_path(text) if is_path else path and typed_path(path)
        name = Path(path).resolve().name.removesuffix(".npz") if is_path else name
        if not name or not path:
            raise UserError(f"--samples: {text!r} is not of the form [NAME=]PATH")
        if name in found:
            raise UserError(f"--samples: two sets are called {name}; tell them apart with NAME=PATH")
        found[name] = path
    return found


def _settings(arguments: argparse.Namespace) -> EvaluationSettings:
    from megatron_cca.lab.evaluation.planning import EvaluationSettings

    metrics = None if arguments.metrics is None else tuple(dict.fromkeys(arguments.metrics))
    return EvaluationSettings(
        samples=_named(arguments.samples),
        reference=arguments.reference,
        extractor=arguments.extractor or ("digits" if arguments.reference in WORDS else "inception"),
        inception_weights=arguments.inception_weights,
        metrics=metrics,
        numbers=_numbers(arguments, metrics),
        classifier=arguments.classifier,
        clip=arguments.clip,
    )


def _numbers(arguments: argparse.Namespace, metrics: tuple[str, ...] | None) -> FidelitySettings:
    names = [field.name for field in fields(FidelitySettings) if field.name != "metrics"]
    try:
        return FidelitySettings(metrics or (), **{name: getattr(arguments, name) for name in names})
    except UserError as error:
        name, _, problem = str(error).partition(": ")
        raise UserError(f"--{name.replace('_', '-')}: {problem}") from None


def _evaluate(arguments: argparse.Namespace) -> None:
    # Imported late: --help need not wait for it.
    from megatron_cca.lab.evaluation.planning import check
    from megatron_cca.lab.evaluation.report import reserved

    check_writable(arguments.output)
    settings = _settings(arguments)
    check(settings)
    sources = [("--samples", path) for path in settings.samples.values()] + [("--reference", settings.reference)]
    for option, path in sources:
        if Path(path).is_dir():
            check_apart(arguments.output, Path(path), option)
    with reserved(arguments.output, overwrite=arguments.overwrite):
        _run(arguments, settings)


def _run(arguments: argparse.Namespace, settings: EvaluationSettings) -> None:
    try:
        platform.install(arguments.device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    # Imported late: the scans' module imports Megatron-Core, before which the platform must be installed.
    from megatron_cca.lab.evaluation.evaluate import evaluate
    from megatron_cca.lab.evaluation.report import table, write_report

    evaluation = evaluate(settings, platform.device())
    names = write_report(arguments.output, evaluation)
    print(table(evaluation))
    print(f"\nwrote {', '.join(names)} to {arguments.output}")


if __name__ == "__main__":
    main()
