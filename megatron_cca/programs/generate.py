"""Draw images from a checkpoint: guidance-free, with classifier-free guidance, or by contrastive decoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cca.errors import UserError, error_context
from megatron_cca.generation import GenerateOptions, PromptOptions, RunOptions
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.config import Config
    from megatron_cca.generation.model_loading import InspectedCheckpoint
    from megatron_cca.generation.prompts import Prompt
    from megatron_cca.generation.sampling_job import SamplingJob

OPTIONS = GenerateOptions
_EXAMPLES = """examples:
  megatron-cca generate --checkpoint runs/quickstart/cca --caption 'a handwritten seven' --output runs/sevens
  megatron-cca generate --checkpoint runs/quickstart/base --classes all --images-per-prompt 20 \\
      --guidance-scale 0.5 --output runs/guided
  megatron-cca generate --checkpoint runs/my_classes --classes 207 360 --class-captions LOC_synset_mapping.txt \\
      --output runs/two_classes
  torchrun --nproc_per_node 8 -m megatron_cca generate --checkpoint Emu3-Gen --image-tokenizer Emu3-VisionTokenizer \\
      --prompts prompts.txt --grid 90 90 --top-k 2048 --batch-size 8 --output samples/emu3
The output folder: images/*.png, prompts.jsonl, codes.npy, sheet.png, samples.npz (arr_0 as OpenAI's evaluator wants).
"""
_PACKAGES = ("matplotlib", "PIL", "safetensors", "sklearn", "tiktoken", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be drawn, draw."""
    options = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_tool_errors(_PACKAGES):
        check_writable(options.output)
        # Imported late: --help need not wait for it.
        from megatron_cca import platform

        platform.install_option(options.run.device)
        _generate(options)


def _layout(run: RunOptions) -> tuple[int, int]:
    world, pipeline = int(os.environ["WORLD_SIZE"]), run.pipeline_model_parallel_size
    tensor = run.tensor_model_parallel_size or max(1, world // pipeline)
    if world % (tensor * pipeline):
        part = "pipeline" if run.tensor_model_parallel_size is None else "tensor"
        raise UserError(
            f"--{part}-model-parallel-size: tensor size {tensor} x pipeline size {pipeline} does not divide the "
            f"{world} processes of this job; start a multiple of {tensor * pipeline} (torchrun --nproc_per_node)"
        )
    return tensor, pipeline


def _generate(options: GenerateOptions) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca import platform
    from megatron_cca.config.load import load_config
    from megatron_cca.generation.image_generator import open_image_generator
    from megatron_cca.generation.model_loading import inspect_for_sampling
    from megatron_cca.generation.sampling_job import check_sampling_output, run_sampling, sampling_requests
    from megatron_cca.lab.evaluation.clip import check_scorer, open_scorer
    from megatron_cca.parallel.ranks import initialize_distributed

    run, scorer_spec = options.run, options.candidates.scorer
    layout = zip(("tensor", "pipeline"), _layout(run), strict=True)
    config = load_config(None, [f"parallel.{name}_model_parallel_size={size}" for name, size in layout])
    job = job_of(options, inspect_for_sampling(options.checkpoint, config.parallel))
    if scorer_spec is not None:
        check_scorer(scorer_spec)
    if os.environ.get("RANK", "0") == "0":
        check_sampling_output(job)
    initialize_distributed(config)
    named = {name: getattr(run, name) for name in ("text_tokenizer", "image_tokenizer", "precision")}
    generator = open_image_generator(options.checkpoint, **named, before_loading=partial(sampling_requests, job))
    scorer = open_scorer(scorer_spec, platform.device()) if scorer_spec is not None else None
    speed = run_sampling(job, generator, scorer)
    if dist.get_rank() == 0:
        passes, unit = job.settings.forwards_per_token, "grid" if generator.architecture.scales else "token"
        print(
            f"wrote {options.output}: {len(job.prompts)} images, {passes} forward pass{'es' * (passes > 1)} a {unit}, "
            f"{speed.tokens_per_second:.0f} tokens/s, {speed.images_per_second:.3g} images/s"
        )
    dist.destroy_process_group()


def job_of(options: GenerateOptions, checkpoint: InspectedCheckpoint) -> SamplingJob:
    """Return the job that the options ask for with this checkpoint.

    Raises:
        UserError: a grid, class, caption or number that is impossible.
    """
    from megatron_cca.generation.decode_loop import SamplingSettings
    from megatron_cca.generation.model_loading import default_grid
    from megatron_cca.generation.sampling_job import SamplingJob

    with error_context("--grid"):
        height, width = options.prompting.grid or default_grid(checkpoint.config)
    prompts = _prompts(options.prompting, checkpoint)
    settings = SamplingSettings(height, width, options.run.batch_size, **vars(options.candidates.sampling))
    return SamplingJob(options, prompts, settings)


def _prompts(prompting: PromptOptions, checkpoint: InspectedCheckpoint) -> list[Prompt]:
    from megatron_cca.generation.prompts import Prompt, check_conditions, class_prompts, read_prompts, repeated, seeded

    vocabulary = checkpoint.architecture.vocabulary

    if prompting.prompts is not None:
        with error_context("--prompts"):
            prompts = read_prompts(prompting.prompts)
            _say_hashes(prompts)
            check_conditions(vocabulary, prompts)
    elif prompting.classes:
        captions = _class_captions(prompting.class_captions, checkpoint.config, vocabulary.num_classes)
        with error_context("--classes"):
            prompts = class_prompts(captions, prompting.classes)
    elif vocabulary.num_classes is not None:
        raise UserError("--caption: this model takes classes, not texts; give --classes, such as --classes 0 1")
    else:
        prompts = [Prompt(caption) for caption in prompting.caption]
    return seeded(repeated(prompts, prompting.images_per_prompt), prompting.seed)


def _say_hashes(prompts: list[Prompt]) -> None:
    """Print how many prompts begin with "#", since the user may have meant comments."""
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
        with error_context("--class-captions"):
            return read_class_captions(file, num_classes)
    if saved.data.path == DIGITS:
        return [prompt.text for prompt in digit_classes()]
    if num_classes is not None:
        return [None] * num_classes
    raise UserError("--classes: this model's classes are not known; say them in --class-captions FILE")
