"""Evaluate sets of images: FID, sFID, Inception Score, KID, precision and recall, class accuracy, CLIP score."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.io.output_folders import check_apart
from megatron_cca.io.outputs import check_writable
from megatron_cca.lab.evaluation import EvaluateOptions
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.lab.evaluation.shares import Share

_EXAMPLES = """examples:
  megatron-cca evaluate --samples base=runs/samples/base --samples cca=runs/samples/cca --reference digits \\
      --output runs/evaluation
  megatron-cca evaluate --samples cca=samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception-weights weights-inception-2015-12-05-6726825d.pth --output runs/evaluation
  torchrun --nproc_per_node 8 -m megatron_cca evaluate --samples cca=out/cca --reference imagenet.npz \\
      --extractor dinov2:dinov2-large --scorer hpsv2:HPS_v2.1_compressed.pt --output runs/evaluation

Sets of images are folders of PNG or JPEG files (there or one level below), output folders of megatron-cca generate,
.npz files with arr_0 uint8 [N, H, W, 3] and perhaps labels in arr_1, folders of MNIST's IDX files (train; or the file
t10k-images-idx3-ubyte itself), shard folders, whose codes are decoded, or the words digits (the training scans) and
digits-held-out. An .npz that holds mu and sigma (and mu_s, sigma_s) beside its images, as OpenAI's reference batches
do, gives FID and sFID to those, with --extractor inception. A reference may be statistics alone: an .npz of
--save-statistics, or EDM's .npz or .pkl.

Written to the output folder: metrics.json, table.md, samples-NAME.png, fid_is.png where there are several sets, and
class_accuracy.png where there are labels and a classifier.
"""
_PACKAGES = ("matplotlib", "PIL", "scipy", "sklearn", "torch-fidelity", "torchvision", "transformers")

OPTIONS = EvaluateOptions


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be evaluated, write the report and print the table."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    with reported_tool_errors(_PACKAGES):
        _evaluate(given)


def _evaluate(given: EvaluateOptions) -> None:
    # Imported late: --help need not wait for it.
    from megatron_cca import platform

    platform.install_option(given.device)
    # These import Megatron-Core, before which the platform must be installed.
    from megatron_cca.lab.evaluation.checks import check
    from megatron_cca.lab.evaluation.measuring import evaluate
    from megatron_cca.lab.evaluation.shares import joined_job

    if os.environ.get("RANK", "0") == "0":
        check_writable(given.output)
    check(given)
    with joined_job() as share:
        if share.rank:
            evaluate(given, platform.device(), share)
        else:
            _write(given, share)


def _write(given: EvaluateOptions, share: Share) -> None:
    from megatron_cca import platform
    from megatron_cca.lab import reserved_folder
    from megatron_cca.lab.evaluation.measuring import evaluate
    from megatron_cca.lab.evaluation.report import former_files, table, write_report

    sources = [("--samples", path) for path in given.sets.values()] + [("--reference", given.reference)]
    for option, path in sources:
        if Path(path).is_dir():
            check_apart(given.output, Path(path), option)
    with reserved_folder(given.output, former_files(given.output), overwrite=given.overwrite):
        evaluation = evaluate(given, platform.device(), share)
        names = write_report(given.output, evaluation)
        print(table(evaluation))
        print(f"\nwrote {', '.join(names)} to {given.output}")
