"""Turn captioned images into token shards for training, and look at shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.config import ModelConfig
from megatron_cca.data.tokenizing import InspectSettings, TokenizeSettings
from megatron_cca.errors import UserError, one_line
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.data.tokenizing.job import TokenizingResult

OPTIONS = {"run": TokenizeSettings, "inspect": InspectSettings}
_EXAMPLES = """examples:
  torchrun --nproc_per_node 8 -m megatron_cca tokenize run --source journeydb --output shards/train \\
      --image-tokenizer Emu3-VisionTokenizer --text-tokenizer Emu3-Gen
  megatron-cca tokenize run --source my_images --output shards/mine --model emu3-tiny --area 64 \\
      --image-tokenizer runs/data/digits --text-tokenizer runs/data/digits
  megatron-cca tokenize run --source extracted --output shards/imagenet384 --model llamagen-l
  megatron-cca tokenize inspect shards/train
"""
_PACKAGES = ("datasets", "matplotlib", "PIL", "safetensors", "tiktoken", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, then tokenise or inspect."""
    settings = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    with reported_tool_errors(_PACKAGES):
        _inspect(settings) if isinstance(settings, InspectSettings) else _tokenize(settings)


def _tokenize(settings: TokenizeSettings) -> None:
    check_writable(settings.output)
    # Imported late: --help need not wait for it. Megatron-Core must not be imported before the platform is installed.
    from megatron_cca import platform

    platform.install_option(settings.device)
    from megatron_cca.data.tokenizing.job import tokenize

    settings = replace(settings, sizes=_sizes(settings.model))
    place = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    result = tokenize(settings, *place, platform.device())
    if result is not None:
        if result.skipped:
            print(f"skipped {one_line(result.reasons)}")
        print(f"wrote {settings.output}: {_summary(result)}")


def _summary(result: TokenizingResult) -> str:
    pairs = f" in {result.pairs} pairs" if result.pairs else ""
    skipped = f", {result.skipped} skipped (see skipped.jsonl there)" if result.skipped else ""
    # A record of preferences has several images.
    unit = "records" if result.pairs else "images"
    return f"{result.samples} samples{pairs}{skipped}, {result.records_per_second:.1f} {unit}/s"


def _sizes(model: str) -> ModelConfig | None:
    """Return the ``model`` section of a checkpoint, or None for the name of a preset."""
    from megatron_cca.checkpoint import layout
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.models import FAMILIES

    folder = Path(model)
    if any(model in family.presets for family in FAMILIES.values()) or not folder.is_dir():
        return None
    return saved_config(layout.resolve(folder, "--model"), "--model").model


def _inspect(settings: InspectSettings) -> None:
    from megatron_cca import platform

    platform.install_option(settings.device)
    from megatron_cca.data.inspection import decoded_samples, open_for_inspection, report
    from megatron_cca.io.figures import contact_sheet

    picture = _picture(settings)
    shards = open_for_inspection(settings.shards)
    print(report(shards), flush=True)
    device = platform.device()
    contact_sheet(picture, *decoded_samples(shards, settings.samples, settings.seed, settings.image_tokenizer, device))
    print(f"wrote {picture}")


def _picture(settings: InspectSettings) -> Path:
    """Return the path of the contact sheet, which is never a file of the shards."""
    folder = settings.shards.resolve()
    picture = settings.picture or folder.with_name(f"{folder.name}.png")
    if picture.suffix.lower() != ".png" or not picture.parent.is_dir() or picture.is_dir():
        raise UserError(f"--picture: {picture} must be a .png in a folder that exists")
    check_writable(picture, "--picture")
    return picture
