"""Import checkpoints from Hugging Face, export them again, and verify that nothing was lost."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import path_option
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.checkpoint.huggingface import TensorComparison

_EXAMPLES = """examples:
  python tools/convert_checkpoint.py import --hf Emu3-Gen --output checkpoints/emu3_8b
  python tools/convert_checkpoint.py verify --hf Emu3-Gen --checkpoint checkpoints/emu3_8b
  python tools/convert_checkpoint.py export --checkpoint runs/emu3_8b_cca --output Emu3-Gen-CCA
  python tools/convert_checkpoint.py import --hf c2i_L_256.pt --max-position-embeddings 257 --output checkpoints/l_256
  python tools/convert_checkpoint.py import --hf mine.pt --set model.num_attention_heads=8 \\
      --set model.max_position_embeddings=257 --section ema --output checkpoints/mine
"""
_DIFFERENT, _MAX_TOKENS = 3, 10_000
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
_LAYOUT_HELP = "refuse a model that cannot be split so; the output itself loads at any layout (default 1)"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, and convert or verify. ``verify`` exits with status 3 if the two sides differ."""
    arguments = _parser().parse_args(argv)
    with reported_tool_errors(("safetensors", "transformers"), "hf"):
        if "output" in arguments:
            check_writable(arguments.output)
        status = arguments.run(arguments)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="import|export|verify")
    folder = {"type": path_option, "metavar": "DIR"}
    hf = {
        **folder,
        "required": True,
        "help": "Hugging Face folder with safetensors, either form; or the .pt or .safetensors of a family's own",
    }
    checkpoint = {**folder, "required": True, "help": "a run folder, an import's output, or an iter_ folder"}
    output = {**folder, "required": True, "help": "an empty or new folder"}
    exported = {**folder, "required": True, "help": "the same; or the .pt to write, for a family that has such files"}

    command = _command(commands, "import", _import, "Hugging Face -> Megatron distributed checkpoint")
    command.add_argument("--hf", **hf)
    command.add_argument("--output", **output)
    command.add_argument("--overwrite", action="store_true", help="replace a former import in --output")
    command.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="of the model in a .pt, which does not say it: 257 for 256 px, 577 for 384 px (default: the preset's)",
    )
    _add_reading(command)
    for size in _LAYOUT:
        command.add_argument(f"--{size.replace('_', '-')}", type=int, default=1, metavar="N", help=_LAYOUT_HELP)

    command = _command(commands, "export", _export, "Megatron distributed checkpoint -> Hugging Face")
    command.add_argument("--checkpoint", **checkpoint)
    command.add_argument("--output", **exported)
    command.add_argument(
        "--format",
        choices=("transformers", "original"),
        help="transformers: text model and image tokenizer in one folder; original: the decoder alone, as in Emu3's "
        "own repositories (default: the template's, else the form that it was imported from, else original)",
    )
    command.add_argument(
        "--hf-template",
        **folder,
        help="Hugging Face folder whose configuration, tokenizer and image tokenizer go along (default: what was kept "
        "since the import)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a former export in --output, nothing else")

    command = _command(
        commands,
        "verify",
        _verify,
        "compare every tensor bit for bit, then, of a Hugging Face folder, Megatron's logits with transformers' in "
        "fp32, a layer at a time; exit status 3 if they differ; under torchrun Megatron's side is tensor-parallel",
    )
    command.add_argument("--hf", **hf)
    command.add_argument("--checkpoint", **checkpoint)
    _add_reading(command)
    command.add_argument("--rows", type=int, default=2, metavar="N", help="random token sequences (default 2)")
    command.add_argument("--length", type=int, default=64, metavar="N", help="tokens in each (default 64)")
    command.add_argument("--seed", type=int, default=0, help="of the tokens")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of Megatron's side")
    return parser


def _command(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text.split(";")[0], description=text)
    command.set_defaults(run=run)
    return command


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="model.KEY=VALUE",
        help="what a .pt does not say of its model, such as model.num_attention_heads=8; released sizes need none",
    )
    command.add_argument(
        "--section",
        metavar="NAME",
        help="which set of weights to take, such as ema, where a file or folder holds several that differ",
    )
    command.add_argument(
        "--dtype",
        choices=("fp32",),
        help="widen weights in float16 or bfloat16, or in several widths, to float32, which loses nothing (default: "
        "keep the bits; weights in float16 or of several widths are refused)",
    )


def _sizes(settings: Sequence[str]) -> dict[str, float]:
    from megatron_cca.config.load import load_config

    model = load_config(None, settings).model
    keys = [setting.partition("=")[0].strip() for setting in settings]
    for key in keys:
        if not key.startswith("model."):
            raise UserError(f"--set {key}: is no key of the section model, and an import stores no others")
    return {name: getattr(model, name) for name in (key.removeprefix("model.") for key in keys)}


def _must_be_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("import and export run in one process; call them with python instead of torchrun")


def _import(arguments: argparse.Namespace) -> int:
    _must_be_alone()
    from megatron_cca.checkpoint.huggingface import import_checkpoint
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.config.load import load_config
    from megatron_cca.models import sizes_beside_preset

    sizes = {f"parallel.{name}": getattr(arguments, name) for name in _LAYOUT}
    parallel = load_config(None, [f"{key}={value}" for key, value in sizes.items()]).parallel
    positions = arguments.max_position_embeddings
    if positions is not None and (positions < 1 or arguments.hf.is_dir()):
        found = "a folder says it itself" if arguments.hf.is_dir() else f"must be 1 or more, found {positions}"
        raise UserError(f"--max-position-embeddings: {found}")
    said = _sizes(arguments.set)
    folder = import_checkpoint(
        arguments.hf,
        arguments.output,
        overwrite=arguments.overwrite,
        parallel=parallel,
        max_position_embeddings=positions,
        sizes=said,
        section=arguments.section,
        dtype=arguments.dtype,
    )
    model = saved_config(folder, "--output").model
    if arguments.hf.is_file():
        is_said = positions is not None or "max_position_embeddings" in said
        more = "as said" if is_said else "the preset's or the file's; --max-position-embeddings says another"
        print(
            f"{model.name}, model.num_attention_heads {model.num_attention_heads}, model.max_position_embeddings "
            f"{model.max_position_embeddings} ({more})"
        )
    print(f"wrote {folder}; use it as training.pretrained_checkpoint={arguments.output}")
    if own := sizes_beside_preset(model):
        print(f"its runs need its sizes: model: {{{', '.join(f'{key}: {value}' for key, value in own.items())}}}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _must_be_alone()
    from megatron_cca.checkpoint.huggingface import export_checkpoint

    folder = export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        form=arguments.format,
        template=arguments.hf_template,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {folder}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import torch.distributed as dist

    from megatron_cca.checkpoint.huggingface import compare_logits, compare_tensors, open_both
    from megatron_cca.checkpoint.huggingface.reading import Reading

    for option in ("rows", "length"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option}: must be 1 or more, found {getattr(arguments, option)}")
    if arguments.rows * arguments.length > _MAX_TOKENS:
        raise UserError(f"--rows x --length: at most {_MAX_TOKENS} tokens, found {arguments.rows * arguments.length}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed: must be between 0 and 2**63 - 1, found {arguments.seed}")
    try:
        platform.install(arguments.device)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    reading = Reading(_sizes(arguments.set), section=arguments.section, dtype=arguments.dtype)
    source, target = open_both(arguments.hf, arguments.checkpoint, reading)
    is_first = os.environ.get("RANK", "0") == "0"
    identical = is_first and _say_tensors(compare_tensors(source, target))
    if arguments.hf.is_file():
        return _say_verdict(identical) if is_first else 0
    logits = compare_logits(source, target, rows=arguments.rows, length=arguments.length, seed=arguments.seed)
    dist.destroy_process_group()
    if logits is None:
        return 0
    print(
        f"logits:  {' x '.join(map(str, logits.shape))} in fp32, greatest difference {logits.max_absolute:.2e} "
        f"({logits.max_relative:.2e} of the largest logit), top-1 agreement {logits.top1_agreement:.1%}"
    )
    if not logits.finite:
        print("logits:  not all are finite: the weights hold infinities or what is not a number")
    return _say_verdict(identical and logits.agree)


def _say_verdict(good: bool) -> int:
    print(f"verdict: {'the same model' if good else 'NOT the same model'}")
    return 0 if good else _DIFFERENT


def _say_tensors(tensors: TensorComparison) -> bool:
    for difference in tensors.differences[:20]:
        print(f"  {difference}")
    same = tensors.compared - len(tensors.differences)
    print(f"tensors: {same} of {tensors.compared} identical bit for bit", flush=True)
    return tensors.identical


if __name__ == "__main__":
    main()
