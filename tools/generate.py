"""Draw images from a checkpoint: guidance-free, with classifier-free guidance, or by contrastive decoding."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca import platform
from megatron_cca.errors import UserError, said_of
from megatron_cca.io.outputs import check_writable
from megatron_cca.io.typed_paths import name_option, path_option
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.config import Config
    from megatron_cca.generation.model_loading import InspectedCheckpoint
    from megatron_cca.generation.prompts import Prompt
    from megatron_cca.generation.sampling_job import SamplingJob

_EXAMPLES = """examples:
  python tools/generate.py --checkpoint runs/quickstart/cca --caption 'a handwritten seven' --output runs/sevens
  python tools/generate.py --checkpoint runs/quickstart/base --classes all --images-per-prompt 20 \\
      --guidance-scale 0.5 --output runs/guided
  python tools/generate.py --checkpoint runs/my_classes --classes 207 360 --class-captions LOC_synset_mapping.txt \\
      --output runs/two_classes
  torchrun --nproc_per_node 8 tools/generate.py --checkpoint Emu3-Gen --image-tokenizer Emu3-VisionTokenizer \\
      --prompts prompts.txt --grid 90 90 --top-k 2048 --batch-size 8 --output samples/emu3
The output folder: images/*.png, prompts.jsonl, codes.npy, sheet.png, samples.npz (arr_0 as OpenAI's evaluator wants).
"""
_PACKAGES = ("matplotlib", "PIL", "safetensors", "sklearn", "tiktoken", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check the options, and draw the images."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_tool_errors(_PACKAGES, "data,eval,hf"):
        _check(arguments)
        check_writable(arguments.output)
        try:
            platform.install(arguments.device)
        except ValueError as error:
            raise UserError(f"--device: {error}") from None
        _generate(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=name_option,
        metavar="DIR",
        help="a run folder, an iter_ folder, or a Hugging Face folder",
    )
    parser.add_argument("--output", type=path_option, required=True, metavar="DIR", help="the folder to write")
    _add_what(parser)
    _add_how(parser)
    _add_where(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to draw")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--caption", action="append", metavar="TEXT", help="a caption, for a model of texts; may be repeated"
    )
    what.add_argument(
        "--prompts",
        type=path_option,
        metavar="FILE",
        help='a caption a line, or .jsonl of {"prompt": ..., "label": ..., "seed": ...}; models of classes want labels',
    )
    what.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="names or numbers of classes, or all (see --class-captions)"
    )
    group.add_argument(
        "--class-captions",
        type=path_option,
        metavar="FILE",
        help="a class's caption a line, or ImageNet's LOC_synset_mapping.txt; the line's number is the label (default: "
        "the ten digits, for a model of the digits; for other models of classes the numbers alone)",
    )
    group.add_argument("--images-per-prompt", type=int, default=1, metavar="N", help="default 1")
    group.add_argument(
        "--grid",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="in visual tokens (default: what the model was trained on, if that was one size; 90 90 for Emu3)",
    )
    group.add_argument("--seed", type=int, default=0, help="image i of the list has a stream of its own (default 0)")
    group.add_argument("--prompt-suffix", default="", metavar="TEXT", help="put behind every caption")


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--guidance-scale",
        type=float,
        default=0.0,
        metavar="S",
        help="s in logits = (1 + s) cond - s uncond, as in the CCA paper; 0 (default) is guidance-free, one forward "
        "pass a token; above 0 two. Emu3's and LlamaGen's own programs call 1 + s the scale: their 3 is 2 here",
    )
    group.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="caption of the second stream (default: none; of a model of classes, the null class)",
    )
    group.add_argument(
        "--contrastive-top-k",
        type=int,
        default=0,
        metavar="K",
        help="contrastive decoding as in CM3Leon (CD-K): log cond - log uncond, among tokens at least "
        "--contrastive-alpha times as likely as the K-th likeliest; two forward passes a token (default 0: off)",
    )
    group.add_argument("--contrastive-alpha", type=float, default=0.1, metavar="A", help="default 0.1")
    group.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="of the visual tokens; 0 (default) is all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="after --top-k; 1 (default) is all")
    group.add_argument("--best-of", type=int, default=1, metavar="N", help="draw N for each, keep the best (default 1)")
    group.add_argument(
        "--scorer",
        metavar="SPEC",
        help="for --best-of: clip:FOLDER, or FILE.py:FUNCTION, of images uint8 [N, H, W, 3] and N prompts N numbers",
    )


def _add_where(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        metavar="N",
        help="ranks that share each layer (default: all of the job / pipeline size); the rest are replicas",
    )
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="default 1")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a replica draws at a time")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: the checkpoint's")
    group.add_argument(
        "--text-tokenizer", type=path_option, metavar="DIR", help="default: what belongs to the checkpoint"
    )
    group.add_argument(
        "--image-tokenizer", type=path_option, metavar="PATH", help="likewise; Emu3-VisionTokenizer for Emu3-Gen"
    )
    group.add_argument("--no-npz", action="store_true", help="do not write samples.npz")
    group.add_argument("--overwrite", action="store_true", help="replace what a former call wrote into --output")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _check(arguments: argparse.Namespace) -> None:
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for name in ("images_per_prompt", "best_of", "batch_size", *sizes):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be 1 or more, found {value}")
    if arguments.grid is not None and min(arguments.grid) < 1:
        raise UserError(f"--grid: height and width must be 1 or more, found {' '.join(map(str, arguments.grid))}")
    if arguments.seed < 0:
        raise UserError(f"--seed: must be 0 or more, found {arguments.seed}")
    if (arguments.best_of > 1) != (arguments.scorer is not None):
        raise UserError("--best-of: goes with --scorer, which says what is best; give both or neither")
    if arguments.class_captions is not None and arguments.classes is None:
        raise UserError("--class-captions: of no use without --classes")
    if arguments.negative_prompt and not (arguments.guidance_scale or arguments.contrastive_top_k):
        raise UserError("--negative-prompt: of no use without --guidance-scale or --contrastive-top-k")


def _layout(arguments: argparse.Namespace) -> tuple[int, int]:
    world, pipeline = int(os.environ["WORLD_SIZE"]), arguments.pipeline_model_parallel_size
    tensor = arguments.tensor_model_parallel_size or max(1, world // pipeline)
    if world % (tensor * pipeline):
        part = "pipeline" if arguments.tensor_model_parallel_size is None else "tensor"
        raise UserError(
            f"--{part}-model-parallel-size: tensor size {tensor} x pipeline size {pipeline} does not divide the "
            f"{world} processes of this job; start a multiple of {tensor * pipeline} (torchrun --nproc_per_node)"
        )
    return tensor, pipeline


def _generate(arguments: argparse.Namespace) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.config.load import load_config
    from megatron_cca.generation.image_generator import open_image_generator
    from megatron_cca.generation.model_loading import inspect_for_sampling
    from megatron_cca.generation.sampling_job import check_sampling_output, run_sampling, sampling_requests
    from megatron_cca.lab.evaluation.scorers import check_scorer, open_scorer
    from megatron_cca.parallel.process_groups import initialize_distributed

    layout = zip(("tensor", "pipeline"), _layout(arguments), strict=True)
    config = load_config(None, [f"parallel.{name}_model_parallel_size={size}" for name, size in layout])
    job = _job(arguments, inspect_for_sampling(arguments.checkpoint, config.parallel))
    if arguments.scorer is not None:
        check_scorer(arguments.scorer)
    if os.environ.get("RANK", "0") == "0":
        check_sampling_output(job)
    initialize_distributed(config)
    named = {name: getattr(arguments, name) for name in ("text_tokenizer", "image_tokenizer", "precision")}
    generator = open_image_generator(arguments.checkpoint, **named, before_loading=partial(sampling_requests, job))
    scorer = open_scorer(arguments.scorer, platform.device()) if arguments.scorer is not None else None
    speed = run_sampling(job, generator, scorer)
    if dist.get_rank() == 0:
        passes = job.settings.forwards_per_token
        print(
            f"wrote {arguments.output}: {len(job.prompts)} images, {passes} forward pass{'es' * (passes > 1)} a token, "
            f"{speed.tokens_per_second:.0f} tokens/s, {speed.images_per_second:.3g} images/s"
        )
    dist.destroy_process_group()


def _job(arguments: argparse.Namespace, checkpoint: InspectedCheckpoint) -> SamplingJob:
    from megatron_cca.generation.checkpoint_tokenizers import default_grid
    from megatron_cca.generation.decode_loop import SamplingSettings
    from megatron_cca.generation.sampling_job import SamplingJob

    with said_of("--grid"):
        height, width = arguments.grid or default_grid(checkpoint.config)
    names = ("guidance_scale", "contrastive_top_k", "contrastive_alpha", "temperature", "top_k", "top_p", "batch_size")
    return SamplingJob(
        checkpoint=arguments.checkpoint,
        prompts=_prompts(arguments, checkpoint),
        settings=SamplingSettings(height, width, **{name: getattr(arguments, name) for name in names}),
        output=arguments.output,
        suffix=arguments.prompt_suffix,
        negative=arguments.negative_prompt,
        best_of=arguments.best_of,
        scorer=arguments.scorer,
        overwrite=arguments.overwrite,
        npz=not arguments.no_npz,
    )


def _prompts(arguments: argparse.Namespace, checkpoint: InspectedCheckpoint) -> list[Prompt]:
    from megatron_cca.generation.conditions import check_conditions
    from megatron_cca.generation.prompts import Prompt, class_prompts, read_prompts, repeated, seeded

    vocabulary = checkpoint.architecture.vocabulary

    if arguments.prompts is not None:
        with said_of("--prompts"):
            prompts = read_prompts(arguments.prompts)
            _say_hashes(prompts)
            check_conditions(vocabulary, prompts)
    elif arguments.classes is not None:
        captions = _class_captions(arguments.class_captions, checkpoint.config, vocabulary.num_classes)
        with said_of("--classes"):
            prompts = class_prompts(captions, arguments.classes)
    elif vocabulary.num_classes is not None:
        raise UserError("--caption: this model takes classes, not texts; give --classes, such as --classes 0 1")
    else:
        prompts = [Prompt(caption) for caption in arguments.caption]
    return seeded(repeated(prompts, arguments.images_per_prompt), arguments.seed)


def _say_hashes(prompts: list[Prompt]) -> None:
    """Tell how many prompts begin with "#". The user can have meant them as comments."""
    hashes = sum((prompt.text or "").startswith("#") for prompt in prompts)
    if hashes and os.environ.get("RANK", "0") == "0":
        print(
            f'--prompts: {hashes} of {len(prompts)} prompts begin with "#" and are drawn as all others', file=sys.stderr
        )


def _class_captions(file: Path | None, saved: Config, num_classes: int | None) -> list[str | None]:
    """Return the caption of each label. None for a class without a name."""
    from megatron_cca.data import DIGITS
    from megatron_cca.generation.prompts import digit_classes, read_class_captions

    if file is not None:
        with said_of("--class-captions"):
            return read_class_captions(file, num_classes)
    if saved.data.path == DIGITS:
        return [prompt.text for prompt in digit_classes()]
    if num_classes is not None:
        return [None] * num_classes
    raise UserError("--classes: this model's classes are not known; say them in --class-captions FILE")


if __name__ == "__main__":
    main()
