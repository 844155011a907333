"""Sample images from checkpoints. Here are the options of a sampling job, which need no torch."""

from __future__ import annotations

from dataclasses import KW_ONLY, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_cca.errors import UserError
from megatron_cca.io.options import Count, DeviceChoice, File, Folder, Option, PathOrWord, Seed, options


@options
class PromptOptions:
    """The prompts of a sampling job: one of four ways to give them, and what each image gets."""

    caption: Annotated[tuple[str, ...], Option(one_of=True)] = ()
    """a caption, for a model of texts; may be repeated"""
    prompts: Annotated[PathOrWord, Option(metavar="FILE", one_of=True)] | None = None
    """a caption a line, or .jsonl of {"prompt": ..., "label": ..., "seed": ...}; models of classes want labels; or the
    word geneval (553 prompts) or parti (1,632)"""
    classes: Annotated[tuple[str, ...], Option(metavar="CLASS", values="+", one_of=True)] = ()
    """names or numbers of classes, or all (see --class-captions)"""
    like: Annotated[Folder, Option(one_of=True)] | None = None
    """captions and conditions of a folder of shards, as they are there, for --shards; each image has the grid of its
    sample (see --grid)"""
    class_captions: File | None = None
    """a class's caption a line, or ImageNet's LOC_synset_mapping.txt; the line's number is the label (default: the ten
    digits, for a model of the digits; for other models of classes the numbers alone)"""
    images_per_prompt: Count = 1
    """pictures of each"""
    grid: Annotated[tuple[int, int], Option(metavar=("H", "W"))] | None = None
    """in visual tokens (default: what the model was trained on, if that was one size; 90 90 for Emu3)"""
    seed: Seed = 0
    """image i of the list has a stream of its own"""
    prompt_suffix: str = ""
    """put behind every caption"""

    def __post_init__(self) -> None:
        if self.grid is not None and min(self.grid) < 1:
            raise UserError(f"--grid: height and width must be 1 or more, found {' '.join(map(str, self.grid))}")
        if self.class_captions is not None and not self.classes:
            raise UserError("--class-captions: of no use without --classes")


@options
class SamplingOptions:
    """How the tokens of an image are drawn; :class:`SamplingSettings` checks the numbers."""

    _: KW_ONLY
    guidance_scale: Annotated[float, Option(metavar="S")] = 0.0
    """s in logits = (1 + s) cond - s uncond, as in the CCA paper; 0 is guidance-free, one forward pass a token; above 0
    two. Emu3's and LlamaGen's own programs call 1 + s the scale: their 3 is 2 here"""
    contrastive_top_k: Annotated[int, Option(metavar="K")] = 0
    """contrastive decoding as in CM3Leon (CD-K): log cond - log uncond, among tokens at least --contrastive-alpha times
    as likely as the K-th likeliest; two forward passes a token; 0 is off"""
    contrastive_alpha: Annotated[float, Option(metavar="A")] = 0.1
    """share of the K-th likeliest token's probability that a token must have"""
    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_k: Annotated[int, Option(metavar="K")] = 0
    """of the visual tokens; 0 is all"""
    top_p: Annotated[float, Option(metavar="P")] = 1.0
    """after --top-k; 1 is all"""


@options
class CandidateOptions:
    """How the candidates of each image are sampled, and which of them is kept."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    negative_prompt: str = ""
    """caption of the second stream (default: none; of a model of classes, the null class)"""
    best_of: Count = 1
    """draw N for each, keep the best"""
    scorer: Annotated[str, Option(metavar="SPEC")] | None = None
    """for --best-of: clip:FOLDER, pickscore:FOLDER, hpsv2:FILE, imagereward:FILE, or FILE.py:FUNCTION, of images uint8
    [N, H, W, 3] and N prompts N numbers"""

    def __post_init__(self) -> None:
        if (self.best_of > 1) != (self.scorer is not None):
            raise UserError("--best-of: goes with --scorer, which says what is best; give both or neither")
        if self.negative_prompt and not (self.sampling.guidance_scale or self.sampling.contrastive_top_k):
            raise UserError("--negative-prompt: of no use without --guidance-scale or --contrastive-top-k")


@options
class RunOptions:
    """Where a job runs, and with what."""

    tensor_model_parallel_size: Count | None = None
    """ranks that share each layer (default: all of the job / pipeline size); the rest are replicas"""
    pipeline_model_parallel_size: Count = 1
    """stages that the layers are dealt out to"""
    batch_size: Count = 64
    """images a replica draws at a time"""
    precision: Literal["fp32", "bf16"] | None = None
    """(default: the checkpoint's)"""
    text_tokenizer: Folder | None = None
    """(default: what belongs to the checkpoint)"""
    image_tokenizer: Path | None = None
    """likewise; Emu3-VisionTokenizer for Emu3-Gen"""
    block: Count | None = None
    """with --shards: images that a killed replica draws again at most (default: four batches)"""
    npz: Annotated[bool, Option(name="--no-npz")] = True
    """do not write samples.npz"""
    overwrite: bool = False
    """replace what a former call wrote into --output"""
    device: DeviceChoice = "auto"
    """auto takes a GPU where there is one"""


@options
class GenerateOptions:
    """Everything that a user says about a sampling job."""

    _: KW_ONLY
    checkpoint: Annotated[PathOrWord, Option(metavar="DIR")]
    """a run folder, an iter_ folder, or a Hugging Face folder"""
    output: Annotated[Folder, Option(one_of=True)] | None = None
    """the folder to write pictures into"""
    shards: Annotated[Folder, Option(one_of=True)] | None = None
    """the shard folder to write codes, captions and conditions into, as training data; must not exist. The same command
    goes on where an interrupted one stopped (finished parts wait in SHARDS.parts)"""
    prompting: PromptOptions
    """what to draw"""
    candidates: CandidateOptions = field(default_factory=CandidateOptions)
    """how to draw it"""
    run: RunOptions = field(default_factory=RunOptions)
    """where, and with what"""

    def __post_init__(self) -> None:
        if self.shards is None:
            for option, is_given in (("--like", self.prompting.like), ("--block", self.run.block)):
                if is_given is not None:
                    raise UserError(f"{option}: of no use without --shards")
        elif self.run.overwrite or not self.run.npz:
            raise UserError(f"{'--overwrite' if self.run.overwrite else '--no-npz'}: of no use with --shards")
        if self.prompting.like is not None and self.prompting.prompt_suffix:
            raise UserError("--prompt-suffix: of no use with --like, whose captions are taken as they are")
