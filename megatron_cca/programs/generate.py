"""Draw images from a checkpoint: guidance-free, with classifier-free guidance, or by contrastive decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_cca.errors import UserError
from megatron_cca.generation import GenerateOptions, RunOptions
from megatron_cca.io.outputs import check_writable
from megatron_cca.programs.parsing import parse
from megatron_cca.reporting import reported_tool_errors

if TYPE_CHECKING:
    from megatron_cca.generation.decode_loop import Scorer
    from megatron_cca.generation.image_generator import ImageGenerator
    from megatron_cca.generation.model_loading import InspectedCheckpoint
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
  torchrun --nproc_per_node 8 -m megatron_cca generate --checkpoint runs/var_d16 --tensor-model-parallel-size 1 \\
      --like shards/imagenet --images-per-prompt 2 --shards shards/drawn
The output folder: images/*.png, prompts.jsonl, codes.npy, sheet.png, samples.npz (arr_0 as OpenAI's evaluator wants).
With --shards: token shards that data.path can name, and drawn.jsonl, which says what each sample was drawn for.
"""
_PACKAGES = ("matplotlib", "PIL", "safetensors", "sklearn", "tiktoken", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot be drawn, draw."""
    options = parse(OPTIONS, argv, __doc__, _EXAMPLES)
    os.environ.setdefault("WORLD_SIZE", "1")
    with reported_tool_errors(_PACKAGES):
        check_writable(options.output) if options.shards is None else check_writable(options.shards, "--shards")
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
    from megatron_cca.generation.sampling_job import job_of
    from megatron_cca.lab.evaluation.clip import check_scorer, open_scorer
    from megatron_cca.parallel.ranks import initialize_distributed

    run, scorer_spec = options.run, options.candidates.scorer
    layout = zip(("tensor", "pipeline"), _layout(run), strict=True)
    config = load_config(None, [f"parallel.{name}_model_parallel_size={size}" for name, size in layout])
    checkpoint = inspect_for_sampling(options.checkpoint, config.parallel)
    job = job_of(options, checkpoint)
    if scorer_spec is not None:
        check_scorer(scorer_spec)
    check, prepare, run_job = _steps(job, checkpoint)
    if os.environ.get("RANK", "0") == "0":
        check()
    initialize_distributed(config)
    named = {name: getattr(run, name) for name in ("text_tokenizer", "image_tokenizer", "precision")}
    generator = open_image_generator(checkpoint, **named, before_loading=prepare)
    scorer = open_scorer(scorer_spec, platform.device()) if scorer_spec is not None else None
    wrote = run_job(generator, scorer)
    if dist.get_rank() == 0:
        print(f"wrote {options.shards or options.output}: {wrote}")
    dist.destroy_process_group()


def _steps(job: SamplingJob, checkpoint: InspectedCheckpoint) -> tuple[Callable, Callable, Callable]:
    """Return the steps of a job: check its output, check its prompts without weights, draw and say what was written."""
    from megatron_cca.generation.sampling_job import check_sampling_output, run_sampling, sampling_requests
    from megatron_cca.generation.shard_drawing import ShardDrawing

    passes = job.settings.forwards_per_token
    unit = "grid" if checkpoint.architecture.scales else "token"
    cost = f"{passes} forward pass{'es' * (passes > 1)} a {unit}"
    if job.options.shards is not None:
        drawing = ShardDrawing(job, checkpoint)

        def draw_shards(generator: ImageGenerator, scorer: Scorer | None) -> str:
            speed = drawing.run(generator, scorer)
            return f"{len(job.prompts)} samples, {cost}, {speed or 0:.3g} images/s"

        return drawing.check, drawing.prepare, draw_shards

    def draw_pictures(generator: ImageGenerator, scorer: Scorer | None) -> str:
        speed = run_sampling(job, generator, scorer)
        speeds = f"{speed.tokens_per_second:.0f} tokens/s, {speed.images_per_second:.3g} images/s"
        return f"{len(job.prompts)} images, {cost}, {speeds}"

    return partial(check_sampling_output, job), partial(sampling_requests, job), draw_pictures
