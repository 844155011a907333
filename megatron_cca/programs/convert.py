"""Bring checkpoints in from Hugging Face and out again, and prove that nothing was lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_cca.errors import UserError
from megatron_cca.io.options import Count, DeviceChoice, Folder, Option, Seed, options
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.checkpoint.huggingface import TensorComparison

_EXAMPLES = """examples:
  megatron-cca convert import --hf Emu3-Gen --output checkpoints/emu3_8b
  megatron-cca convert verify --hf Emu3-Gen --checkpoint checkpoints/emu3_8b
  megatron-cca convert export --checkpoint runs/emu3_8b_cca --output Emu3-Gen-CCA
  megatron-cca convert import --hf c2i_L_256.pt --max-position-embeddings 257 --output checkpoints/l_256
  megatron-cca convert import --hf var_d16.pth --image-tokenizer vae_ch160v4096z32.pth --output checkpoints/var_d16
  megatron-cca convert import --hf mine.pt --set model.num_attention_heads=8 \\
      --set model.max_position_embeddings=257 --section ema --output checkpoints/mine
"""
_DIFFERENT, _MAX_TOKENS = 3, 10_000
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)


@options
class ReadingOptions:
    """Weights in another format, and facts that their files do not contain."""

    _: KW_ONLY
    hf: Annotated[Folder, Option(metavar="PATH")]
    """Hugging Face folder, of transformers or of the authors, or a family's own .pt or .safetensors"""
    overrides: Annotated[tuple[str, ...], Option(metavar="model.KEY=VALUE", name="--set")] = ()
    """a size that a .pt does not contain, such as model.num_attention_heads=8; released models need none"""
    section: Annotated[str, Option(metavar="NAME")] | None = None
    """which set of weights to take, such as ema, where a file or folder holds several that differ"""
    dtype: Literal["fp32"] | None = None
    """widen weights in float16, bfloat16 or several types to float32, which loses nothing (default: keep the bits;
    weights in float16 or of several types are refused)"""
    image_tokenizer: Annotated[Folder, Option(metavar="FILE")] | None = None
    """image tokenizer of a VAR, whose codebook and convolutions its model reads (default: the one in a file of VAR's
    trainer, else vae_ch160v4096z32.pth beside the weights)"""


@options
class ImportOptions(ReadingOptions):
    """Hugging Face -> Megatron distributed checkpoint."""

    _: KW_ONLY
    output: Folder
    """an empty or new folder"""
    overwrite: bool = False
    """replace a former import in --output"""
    max_position_embeddings: Count | None = None
    """positions of the model in a .pt, which does not contain their number: 257 for 256 px, 577 for 384 px (default:
    the preset's)"""
    tensor_model_parallel_size: int = 1
    """refuse a model that so many tensor-parallel ranks cannot share; the output itself loads at any layout"""
    pipeline_model_parallel_size: int = 1
    """likewise, for pipeline stages"""
    virtual_pipeline_model_parallel_size: int = 1
    """likewise, for model chunks of a stage"""


@options
class ExportOptions:
    """Megatron distributed checkpoint -> Hugging Face."""

    _: KW_ONLY
    checkpoint: Folder
    """a run folder, an import's output, or an iter_ folder"""
    output: Folder
    """an empty or new folder, or the .pt to write, for a family that has such files"""
    format: Literal["transformers", "original", "llama"] | None = None
    """transformers: text model and image tokenizer in one folder; original: the authors', which for Emu3 is the decoder
    alone; llama: the decoder of an Emu3 or Emu3.5 as a plain Llama or Qwen3 for stock engines, with image_grammar.json
    (default: the template's, else the form that it was imported from, else original)"""
    hf_template: Folder | None = None
    """Hugging Face folder whose configuration, tokenizer and image tokenizer go along (default: what was kept since the
    import)"""
    overwrite: bool = False
    """replace a former export in --output, nothing else"""


@options
class VerifyOptions(ReadingOptions):
    """Compare every tensor bit for bit. For a Hugging Face folder, also compare Megatron's logits with transformers' in
    fp32, a layer at a time. The exit status is 3 if they differ. Under torchrun Megatron's side is tensor-parallel.
    """

    _: KW_ONLY
    checkpoint: Folder
    """a run folder, an import's output, or an iter_ folder"""
    rows: Count = 2
    """number of random token sequences to compare the logits of"""
    length: Count = 64
    """tokens in each"""
    seed: Seed = 0
    """seed of the tokens"""
    device: DeviceChoice = "auto"
    """device of Megatron's side; auto takes a GPU where there is one"""

    def __post_init__(self) -> None:
        if self.rows * self.length > _MAX_TOKENS:
            raise UserError(f"--rows x --length: at most {_MAX_TOKENS} tokens, found {self.rows * self.length}")


OPTIONS = {"import": ImportOptions, "export": ExportOptions, "verify": VerifyOptions}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, then convert or verify. ``verify`` exits with 3 if the two sides differ."""
    given = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    run = {ImportOptions: _import, ExportOptions: _export, VerifyOptions: _verify}[type(given)]
    with reported_tool_errors(("safetensors", "transformers")):
        if not isinstance(given, VerifyOptions):
            check_writable(given.output)
        status = run(given)
    sys.exit(status)


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


def _import(given: ImportOptions) -> int:
    _must_be_alone()
    from megatron_cca.checkpoint.huggingface import import_checkpoint
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.config.load import load_config
    from megatron_cca.models import family_of
    from megatron_cca.models.written_sizes import sizes_beside_preset

    sizes = {f"parallel.{name}": getattr(given, name) for name in _LAYOUT}
    parallel = load_config(None, [f"{key}={value}" for key, value in sizes.items()]).parallel
    positions = given.max_position_embeddings
    if positions is not None and given.hf.is_dir():
        raise UserError("--max-position-embeddings: a folder says it itself")
    said = _sizes(given.overrides)
    folder = import_checkpoint(
        given.hf,
        given.output,
        overwrite=given.overwrite,
        parallel=parallel,
        max_position_embeddings=positions,
        sizes=said,
        section=given.section,
        dtype=given.dtype,
        image_tokenizer=given.image_tokenizer,
    )
    model = saved_config(folder, "--output").model
    if given.hf.is_file():
        is_said = positions is not None or "max_position_embeddings" in said
        is_open = "max_position_embeddings" in family_of(model).weights_file.not_in_shapes
        more = "the preset's or the file's; --max-position-embeddings says another" if is_open else "the file's"
        more = "as said" if is_said else more
        print(
            f"{model.name}, model.num_attention_heads {model.num_attention_heads}, model.max_position_embeddings "
            f"{model.max_position_embeddings} ({more})"
        )
    print(f"wrote {folder}; use it as training.pretrained_checkpoint={given.output}")
    if own := sizes_beside_preset(model):
        print(f"its runs need its sizes: model: {{{', '.join(f'{key}: {value}' for key, value in own.items())}}}")
    return 0


def _export(given: ExportOptions) -> int:
    _must_be_alone()
    from megatron_cca.checkpoint.huggingface import export_checkpoint

    folder = export_checkpoint(
        given.checkpoint,
        given.output,
        form=given.format,
        template=given.hf_template,
        overwrite=given.overwrite,
    )
    print(f"wrote {folder}")
    return 0


def _verify(given: VerifyOptions) -> int:
    import torch.distributed as dist

    from megatron_cca import platform
    from megatron_cca.checkpoint.huggingface import compare_logits, compare_tensors, open_both
    from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import WeightsDescription

    platform.install_option(given.device)
    description = WeightsDescription(
        _sizes(given.overrides), section=given.section, dtype=given.dtype, image_tokenizer=given.image_tokenizer
    )
    source, target = open_both(given.hf, given.checkpoint, description)
    is_first = os.environ.get("RANK", "0") == "0"
    identical = is_first and _say_tensors(compare_tensors(source, target))
    if given.hf.is_file():
        return _say_verdict(identical) if is_first else 0
    logits = compare_logits(source, target, rows=given.rows, length=given.length, seed=given.seed)
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
