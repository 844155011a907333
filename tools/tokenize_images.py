"""Convert captioned images to token shards for training, and inspect shards."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_cca import platform
from megatron_cca.config import ModelConfig
from megatron_cca.errors import UserError, one_line
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import name_option, path_option
from megatron_cca.reporting import reported_tool_errors

_EXAMPLES = """examples:
  torchrun --nproc_per_node 8 tools/tokenize_images.py run --source journeydb --output shards/train \\
      --image-tokenizer Emu3-VisionTokenizer --text-tokenizer Emu3-Gen
  python tools/tokenize_images.py run --source my_images --output shards/mine --model emu3-tiny --area 64 \\
      --image-tokenizer runs/data/digits --text-tokenizer runs/data/digits
  python tools/tokenize_images.py run --source extracted --output shards/imagenet384 --model llamagen-l
  python tools/tokenize_images.py inspect shards/train
"""
_PACKAGES = ("datasets", "matplotlib", "PIL", "safetensors", "tiktoken", "transformers")
_LAYOUTS = """where the images and captions are. Layouts (recognised from what lies there; else set --layout):
  captions    captions.jsonl ({"file_name": ..., "caption": ...}), or a .txt or .caption beside each image
  classes     one folder per class, as ImageNet; names from classes.json or LOC_synset_mapping.txt if there is one
  journeydb   JourneyDB's annotation jsonl beside its imgs/ folders
  webdataset  tars
  datasets    what Hugging Face datasets opens from disk: parquet, arrow, imagefolder, save_to_disk
  emu3        Emu3's own JSON list of tokenised .pth files (no image tokenizer needed)
  llamagen    what LlamaGen's own extraction wrote: NAME_codes and NAME_labels (likewise)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, and tokenise or inspect."""
    arguments = _parser().parse_args(argv)
    with reported_tool_errors(_PACKAGES, "data,eval,hf"):
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="run|inspect")
    _add_run(commands)
    _add_inspect(commands)
    return parser


def _add_run(commands) -> None:
    command = _command(
        commands,
        "run",
        _run,
        "tokenize a source into a shard folder; under torchrun on several processes or GPUs; the same command goes on "
        "where an interrupted one stopped (finished parts wait in OUTPUT.parts)",
    )
    path = {"type": path_option, "metavar": "DIR"}
    command.add_argument("--source", **path, required=True, help=_LAYOUTS)
    command.add_argument("--layout", default="auto", metavar="NAME", help="one of the above (default auto)")
    command.add_argument(
        "--caption-field", metavar="NAME", help="JSON key or column of the caption; JourneyDB's is prompt"
    )
    command.add_argument(
        "--caption-of-list",
        choices=("first", "random"),
        help="of an image with a list of captions take the first, or one by chance, the same in every run",
    )
    command.add_argument("--image-field", metavar="NAME", help="column of the image, in datasets")
    command.add_argument("--split", metavar="NAME", help="part of a data set that has several (default train)")
    command.add_argument(
        "--allow-outside",
        **path,
        action="append",
        help="a folder outside --source where images may lie that links or lists of --source name; may be repeated "
        "(default: what leads out of --source is not read)",
    )
    command.add_argument("--output", **path, required=True, help="the shard folder to write; must not exist")
    command.add_argument(
        "--model",
        type=name_option,
        default="emu3-8b",
        metavar="NAME",
        help="preset, or checkpoint folder, whose vocabulary is used (default emu3-8b)",
    )
    command.add_argument(
        "--image-tokenizer",
        **path | {"metavar": "PATH"},
        help="the model's own file or folder (Emu3-VisionTokenizer, an Emu3 in transformers' form), or a folder with "
        "the demo's codebook.npy",
    )
    command.add_argument(
        "--text-tokenizer",
        **path,
        help="folder of the checkpoint: tokenizer.json or emu3.tiktoken; none for a model that takes classes",
    )
    command.add_argument(
        "--grid",
        type=_positive,
        nargs=2,
        metavar=("H", "W"),
        help="codes of an image, for a model that has one size only (default: the preset's); images are cropped to it",
    )
    command.add_argument(
        "--flips", action="store_true", help="tokenize each image mirrored, too: a step sees one of the two"
    )
    command.add_argument(
        "--area",
        type=_positive,
        default=518_400,
        metavar="PIXELS",
        help="target area, aspect ratio kept (default 720*720)",
    )
    command.add_argument(
        "--resize",
        choices=("dali", "authors"),
        default="dali",
        help="who decodes and resizes: dali, in one pass, on a GPU where there is one; or authors, in Pillow, bit for "
        "bit as the programs of the model's authors: take it to train a released model on (default dali)",
    )
    command.add_argument(
        "--clip-meta",
        metavar="TEXT",
        help="what stands between BOI and IMG of a clip, with {frames}, {height}, {width} of the code grid; Emu3's "
        "authors have not published theirs, so clips cannot be trained on without it",
    )
    command.add_argument("--max-caption-tokens", type=_positive, default=1024, metavar="N", help="(default 1024)")
    command.add_argument(
        "--max-skipped",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="of the records; more end the job (default 0.1)",
    )
    command.add_argument(
        "--max-pixels", type=_positive, default=100_000_000, metavar="N", help="of an image (default 100000000)"
    )
    command.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="images encoded together (default 8)"
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="that read and decode")
    command.add_argument(
        "--block",
        type=_positive,
        default=1024,
        metavar="N",
        help="records a killed process repeats at most (default 1024)",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the image tokenizer")


def _add_inspect(commands) -> None:
    command = _command(
        commands,
        "inspect",
        _inspect,
        "check every file of a shard folder against its checksum, print counts and histograms of caption length and "
        "grid, and draw a contact sheet of decoded samples beside their captions",
    )
    command.add_argument("shards", type=path_option, metavar="PREFIX", help="the shard folder")
    command.add_argument("--picture", type=path_option, metavar="PNG", help="the contact sheet (default: PREFIX.png)")
    command.add_argument("--samples", type=_positive, default=16, metavar="N", help="on the sheet (default 16)")
    command.add_argument("--seed", type=_seed, default=0, help="which samples (default 0)")
    command.add_argument(
        "--image-tokenizer", type=path_option, metavar="PATH", help="(default: the one that the manifest names)"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the image tokenizer")


def _command(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text.split(";")[0], description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def _threads() -> int:
    """Return this process's share of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {2**31 - 1}, found {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, found {text!r}")


def _install(choice: platform.DeviceChoice) -> None:
    try:
        platform.install(choice)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def _run(arguments: argparse.Namespace) -> None:
    check_writable(arguments.output)
    _install(arguments.device)
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.data.image_headers import ImageLimits
    from megatron_cca.data.sources import SourceOptions
    from megatron_cca.data.tokenizing import TokenizeSettings, tokenize

    settings = TokenizeSettings(
        source=arguments.source,
        output=arguments.output,
        text_tokenizer=arguments.text_tokenizer,
        image_tokenizer=arguments.image_tokenizer,
        layout=arguments.layout,
        source_options=SourceOptions(
            arguments.caption_field,
            arguments.image_field,
            arguments.split,
            arguments.caption_of_list,
            tuple(arguments.allow_outside) if arguments.allow_outside else None,
        ),
        model=arguments.model,
        sizes=_sizes(arguments.model),
        grid=tuple(arguments.grid) if arguments.grid else None,
        flips=arguments.flips,
        area=arguments.area,
        resize=arguments.resize,
        clip_meta=arguments.clip_meta,
        max_caption_tokens=arguments.max_caption_tokens,
        max_skipped=arguments.max_skipped,
        limits=ImageLimits(max_pixels=arguments.max_pixels),
        batch_size=arguments.batch_size,
        threads=arguments.threads or _threads(),
        block=arguments.block,
    )
    place = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    result = tokenize(settings, *place, platform.device())
    if result is not None:
        skipped = f", {result.skipped} skipped (see skipped.jsonl there)" if result.skipped else ""
        if result.skipped:
            print(f"skipped {one_line(result.reasons)}")
        print(f"wrote {settings.output}: {result.samples} samples{skipped}, {result.images_per_second:.1f} images/s")


def _sizes(model: str) -> ModelConfig | None:
    """Return the sizes in a checkpoint. None if ``model`` is the name of a preset."""
    from megatron_cca.checkpoint import layout
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.models import FAMILIES

    folder = Path(model)
    if any(model in family.presets for family in FAMILIES.values()) or not folder.is_dir():
        return None
    return saved_config(layout.resolve(folder, "--model"), "--model").model


def _inspect(arguments: argparse.Namespace) -> None:
    _install(arguments.device)
    from megatron_cca.data.inspection import decoded_samples, open_for_inspection, report
    from megatron_cca.io.figures import contact_sheet

    picture = _picture(arguments)
    shards = open_for_inspection(arguments.shards)
    print(report(shards), flush=True)
    device = platform.device()
    contact_sheet(
        picture, *decoded_samples(shards, arguments.samples, arguments.seed, arguments.image_tokenizer, device)
    )
    print(f"wrote {picture}")


def _picture(arguments: argparse.Namespace) -> Path:
    """Return the path of the contact sheet. It must end in .png, so that it never replaces a file of the shards."""
    folder = arguments.shards.resolve()
    picture = arguments.picture or folder.with_name(f"{folder.name}.png")
    if picture.suffix.lower() != ".png" or not picture.parent.is_dir() or picture.is_dir():
        raise UserError(f"--picture: {picture} must be a .png in a folder that exists")
    check_writable(picture, "--picture")
    return picture


if __name__ == "__main__":
    main()
