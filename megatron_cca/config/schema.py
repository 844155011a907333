"""The run's configuration, as dataclasses; ``load.py`` reads them.

Every key is Megatron-Core's own name where Megatron has one, and says what it affects. Nothing here imports torch or
Megatron, so that a mistyped key is refused in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from megatron_cca.effects import Affects, OnResume, key, section
from megatron_cca.io.typed_paths import typed_path
from megatron_cca.objectives import OBJECTIVES, Objective
from megatron_cca.objectives.base import DEFAULT, objective_of
from megatron_cca.sections import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    strict,
)

NUMBERS, LAST_BITS, SPEED, OUTPUT = Affects
TAKES_EFFECT, SAME_NUMBERS, REFUSED = OnResume

# The context of a validation whose input a person typed, not a program.
TYPED = "typed"


def _as_typed(text: str, info: ValidationInfo) -> str:
    return typed_path(text) if info.context == TYPED else text


def _all_kept(given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    found = handler(given)
    if len(found) < len(given):
        raise ValueError("two of its names are the same folder; leave one out")
    return found


# The type of every key that holds a path, or a word that may stand in place of one.
PathText = Annotated[str, AfterValidator(_as_typed), Field(json_schema_extra={"format": "path"})]
Blend = Annotated[dict[PathText, PositiveFloat], WrapValidator(_all_kept)]
Precision = Literal["fp32", "bf16", "fp8"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise"]
LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@strict
class ModelConfig:
    """Section ``model``: a named preset of a family; any size left at null is the preset's."""

    name: str = key("emu3-tiny", NUMBERS, reference="model.position_embedding")
    """The preset, which says the family, too: ``emu3-8b``, ``llamagen-l``, or one of the others listed at the end."""
    num_layers: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Layers of the whole model."""
    hidden_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Width between the two projections of a layer's MLP."""
    num_attention_heads: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Query heads; they divide ``hidden_size``."""
    num_query_groups: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Key and value heads; they divide the query heads."""
    max_position_embeddings: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Longest row, in tokens."""
    layernorm_epsilon: PositiveFloat | None = key(None, NUMBERS, reference=True)
    """Added to the mean square in RMSNorm."""
    rotary_base: PositiveFloat | None = key(None, NUMBERS, reference=True)
    """Base of the rotary frequencies."""
    vocab_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Not the preset's: the token ids then have no known meaning, and the model can only be converted."""
    codebook_size: PositiveInt | None = key(None, NUMBERS, reference="model.vocab_size")
    """Codes of the image tokenizer, for a model of classes; ``vocab_size`` follows from it."""
    num_classes: PositiveInt | None = key(None, NUMBERS, reference="model.vocab_size")
    """Classes, for a model that takes those; the null class is not counted. ``vocab_size`` follows from it."""
    make_vocab_size_divisible_by: PositiveInt = key(128, NUMBERS)
    """The vocabulary is padded to a multiple of this times ``tensor_model_parallel_size``."""
    padded_vocab_size: PositiveInt | None = key(None, NUMBERS)
    """The padded vocabulary, if it is to be the same for every layout."""
    hidden_dropout: Probability = key(0.0, NUMBERS)
    """Of the embeddings and of what each half of a layer adds. Where policy and reference are compared it makes the
    log-ratio noisy and needs ``reference.allow_bias`` and a reference that is ``resident`` or ``offload``."""
    attention_dropout: Probability = key(0.0, NUMBERS)
    """Of attention's weights; likewise."""
    init_method_std: PositiveFloat = key(0.02, NUMBERS, reference="weights")
    """Standard deviation of weights that come from no checkpoint."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = key("auto", LAST_BITS, REFUSED, reference=True)
    """``auto`` takes Transformer Engine on a GPU where it is installed, Megatron's local layers elsewhere. Transformer
    Engine has no fused attention for fp32, nor for heads whose channels are no multiple of 8 or more than 128: there
    ``auto`` takes torch's attention between Transformer Engine's layers, ``transformer_engine`` its unfused one."""


@strict
class ParallelConfig:
    """Section ``parallel``: the data-parallel size is what the world size leaves."""

    tensor_model_parallel_size: PositiveInt = key(1, LAST_BITS, reference=True, study=False)
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: PositiveInt = key(1, LAST_BITS, study=False)
    """Stages that the layers are dealt out to."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = key(None, LAST_BITS, study=False)
    """Model chunks on each pipeline rank (the interleaved schedule); null or 1 means one."""
    context_parallel_size: PositiveInt = key(1, LAST_BITS, reference=True, study=False)
    """Ranks that share each sequence, in Megatron's zigzag order."""
    sequence_parallel: bool = key(False, LAST_BITS, reference=True, study=False)
    """Share norms and residuals over the tensor-parallel ranks, too."""
    tp_comm_overlap: bool = key(False, LAST_BITS, reference=True, study=False)
    """Overlap the layers' products with tensor-parallel communication, through Transformer Engine's user buffers. Those
    have one size, so that all rows must have one length: a ``data.pad_to_multiple_of`` of which only one multiple fits
    into ``model.max_position_embeddings``."""
    overlap_p2p_comm: bool | None = key(None, SPEED, study=False)
    """Overlap the sends and receives between pipeline stages with computing; null is on under interleaving, the only
    schedule that has it."""
    microbatch_group_size_per_vp_stage: PositiveInt | None = key(None, SPEED, study=False)
    """Microbatches that a model chunk takes in a row under interleaving; null is ``pipeline_model_parallel_size``."""
    deallocate_pipeline_outputs: bool = key(False, SPEED, study=False)
    """Free what a pipeline stage has sent on: backward needs its graph, not its numbers."""


@strict
class LoraConfig:
    """Section ``lora``: train low-rank adapters (arXiv 2106.09685) and leave the model's own weights frozen."""

    dim: PositiveInt | None = None
    """Rank of the adapters; null trains all weights instead."""
    alpha: PositiveFloat = 32.0
    """An adapter's output is scaled with ``alpha / dim``."""
    target_modules: list[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]] = dataclasses.field(
        default_factory=lambda: list(LORA_TARGETS)
    )
    """Megatron's names of the projections that get one, in every layer."""


@strict
class ReferenceConfig:
    """Section ``reference``: the frozen copy that the objective compares with."""

    strategy: Literal["resident", "offload", "cached", "shared"] = key("resident", LAST_BITS)
    """``resident`` keeps it beside the policy. ``offload`` keeps it in host memory and streams a layer at a time
    through the device. ``cached`` reads log-probabilities that ``tools/cache_reference.py`` computed. ``shared`` takes
    the policy with its LoRA adapters off."""
    checkpoint: PathText | None = key(None, NUMBERS, reference="weights")
    """Its weights; null means ``training.pretrained_checkpoint``."""
    cache: PathText | None = key(None, LAST_BITS)
    """For ``cached``: the folder that ``tools/cache_reference.py`` wrote."""
    precision: Precision | None = key(None, NUMBERS, reference=True)
    """Null means the policy's, ``training.precision``."""
    fp8_recipe: Literal["tensorwise", "blockwise"] | None = key(None, NUMBERS, reference=True)
    """Null means the policy's; ``tensorwise`` where that is ``delayed``, which a frozen model cannot learn."""
    fp8_param: bool = key(False, NUMBERS, reference=True)
    """Keep its weights in FP8, one scale a row, and compute in ``precision`` with what they round to: half the memory
    of bf16. The LM head and the norms stay as they are."""
    allow_bias: NonNegativeFloat | None = key(None, OUTPUT, SAME_NUMBERS)
    """Largest root mean square of beta x log-ratio (or of what else scales the objective's reward) while policy and
    reference have the same weights. Null means exactly 0 where both take the same path and 0.05 where their precisions
    differ; with dropout it must be given."""


@strict
class DataConfig:
    """Section ``data``."""

    path: PathText | Blend | None = key(None, NUMBERS, reference="data")
    """A folder of token shards, or several with their weights, ``{shards/a: 0.7, shards/b: 0.3}``: shares of what a run
    sees. The word ``digits`` stands for scikit-learn's scans, tokenised on first use. Every run must say it; null means
    unknown, as in a checkpoint that was imported."""
    condition_dropout: Probability = key(0.1, NUMBERS, reference=True)
    """Share of rows whose caption is emptied (the authors' ``uncond_ratio``)."""
    length_bucketing: PositiveInt = key(1, NUMBERS, reference=True)
    """Of so many steps the samples are sorted by length together, so that less is padded; 1 leaves them as drawn."""
    pad_to_multiple_of: PositiveInt = key(1, LAST_BITS, reference=True)
    """Rows are padded to a multiple of this, so that few lengths occur."""
    prefetch: PositiveInt = key(2, SPEED, study=False)
    """Steps that are read ahead."""
    loader: Literal["dali", "torch"] | None = key(None, SPEED, study=False)
    """Who takes batches to the device: NVIDIA DALI, or torch alone through page-locked memory; the same bytes. Null is
    DALI where it is installed, torch elsewhere; a run says which on its first line."""


@strict
class ValidationConfig:
    """Section ``validation``: the objective on samples that are not trained on."""

    interval: NonNegativeInt = key(0, OUTPUT)
    """Steps between validations; 0 is never."""
    fraction: Probability = key(0.0, NUMBERS, reference=True)
    """Share of every folder in ``data.path`` that is held out."""
    path: PathText | Blend | None = key(None, NUMBERS, TAKES_EFFECT, reference="validation data")
    """Shards of their own to validate on instead, spelled as ``data.path``."""
    iters: PositiveInt | None = key(None, NUMBERS, TAKES_EFFECT)
    """Global batches of a validation; null is as many as one pass over the samples fills, at least one."""
    seed: NonNegativeInt = key(0, NUMBERS, reference=True)
    """Draws what is held out; the same samples for every run that has the same."""


@strict
class OptimizerConfig:
    """Section ``optimizer``: AdamW."""

    lr: PositiveFloat = key(1e-5, NUMBERS, TAKES_EFFECT)
    """Largest learning rate."""
    min_lr: NonNegativeFloat = key(0.0, NUMBERS, TAKES_EFFECT)
    """Smallest, where the decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = key("constant", NUMBERS, TAKES_EFFECT)
    """From ``lr`` to ``min_lr``, over all steps."""
    lr_warmup_iters: NonNegativeInt = key(0, NUMBERS, TAKES_EFFECT)
    """Steps in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = key(0.0, NUMBERS, TAKES_EFFECT)
    """Decoupled; not of norms."""
    adam_beta1: Probability = key(0.9, NUMBERS, TAKES_EFFECT)
    """Decay of the first moment."""
    adam_beta2: Probability = key(0.95, NUMBERS, TAKES_EFFECT)
    """Decay of the second."""
    adam_eps: PositiveFloat = key(1e-8, NUMBERS, TAKES_EFFECT)
    """Added to the root of the second moment."""
    clip_grad: NonNegativeFloat = key(1.0, NUMBERS, TAKES_EFFECT)
    """Largest global gradient norm; 0 switches clipping off."""
    use_distributed_optimizer: bool = key(True, LAST_BITS, REFUSED)
    """Share master weights and moments over the data-parallel ranks. With and without it the state has other names."""
    num_distributed_optimizer_instances: PositiveInt = key(1, LAST_BITS)
    """Replicas of the sharded state: it is split over the data-parallel size divided by this, and its communication
    stays within that many ranks."""
    overlap_grad_reduce: bool = key(False, SPEED)
    """Reduce gradients, bucket by bucket, while backward still computes."""
    overlap_param_gather: bool = key(False, SPEED)
    """Gather updated weights, bucket by bucket, while the next forward pass computes."""
    ddp_bucket_size: PositiveInt | None = key(None, LAST_BITS)
    """Parameters in a bucket; null is Megatron's max(40,000,000, 1,000,000 x data-parallel size)."""
    average_in_collective: bool = key(False, LAST_BITS)
    """Let the collective average gradients, instead of dividing them before it sums."""
    pad_buckets_for_high_nccl_busbw: bool = key(False, LAST_BITS)
    """Pad buckets to a multiple of 2^16 parameters a rank, the sizes that NCCL is fast with on many ranks."""
    grad_reduce_in_fp32: bool = key(True, NUMBERS, TAKES_EFFECT)
    """Keep and reduce gradients in fp32; false does both in the precision of the weights."""
    optimizer_cpu_offload: bool = key(False, LAST_BITS)
    """Keep the optimizer's state in host memory and update there; needs ``use_precision_aware_optimizer``."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = key(1.0, LAST_BITS)
    """Share of the state that ``optimizer_cpu_offload`` moves."""
    overlap_cpu_optimizer_d2h_h2d: bool = key(False, SPEED)
    """Overlap that update with the copies to and from the host."""
    use_precision_aware_optimizer: bool = key(False, NUMBERS, TAKES_EFFECT)
    """Let Transformer Engine's FusedAdam keep its state in the types below; they must be fp32 otherwise."""
    main_grads_dtype: Literal["fp32", "bf16"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Of the gradients as the optimizer takes them; bf16 needs ``grad_reduce_in_fp32`` false."""
    main_params_dtype: Literal["fp32", "fp16"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Of the master weights."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Of Adam's first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Of the second."""


@strict
class KernelsConfig:
    """Section ``kernels``: fused kernels and CUDA graphs."""

    gradient_accumulation_fusion: bool | None = key(None, LAST_BITS)
    """Add weight gradients to Megatron's buffer within the product that makes them; null is off."""
    bias_activation_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Compile SwiGLU into one kernel (``torch.compile``); null is on on a GPU."""
    bias_dropout_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Compile dropout and the residual sum into one kernel; null is on on a GPU."""
    apply_rope_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Transformer Engine's kernel for rotary positions; null is off."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = key("none", SPEED)
    """Who captures the policy's layers in CUDA graphs: Megatron (``local``) or Transformer Engine. All rows must have
    one length; see ``parallel.tp_comm_overlap``. The reference is not captured."""
    cuda_graph_modules: list[Literal["attn", "mlp"]] = key([], SPEED)
    """For ``transformer_engine``: parts of a layer to capture; none named means whole layers."""
    cuda_graph_warmup_steps: NonNegativeInt = key(3, SPEED)
    """Before a capture: training steps with ``transformer_engine``, passes through each layer with ``local``."""


@strict
class TrainingConfig:
    """Section ``training``."""

    train_iters: PositiveInt = key(60, NUMBERS, TAKES_EFFECT)
    """Steps of the whole run."""
    micro_batch_size: PositiveInt = key(32, LAST_BITS, reference=True, study=False)
    """Image-condition samples in one forward pass of one data-parallel rank (a CCA sample is two rows)."""
    global_batch_size: PositiveInt = key(256, NUMBERS, reference=True)
    """Image-condition samples of a step, over all ranks."""
    seed: NonNegativeInt = key(1234, NUMBERS, reference=True)
    """Of the order of samples, negatives, dropped captions and random weights."""
    precision: Precision = key("fp32", NUMBERS, reference="reference.precision")
    """``fp8`` is bf16 with the layers' products in FP8, by Transformer Engine."""
    fp8_format: Literal["hybrid", "e4m3"] = key("hybrid", NUMBERS)
    """``hybrid`` is E4M3 forward and E5M2 backward."""
    fp8_recipe: Fp8Recipe = key("tensorwise", NUMBERS, reference="reference.fp8_recipe")
    """Where scales come from: the tensor at hand (``tensorwise``, ``blockwise``) or those before it (``delayed``)."""
    fp8_amax_history_len: PositiveInt = key(16, NUMBERS)
    """Steps that ``delayed`` looks back on."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = key("max", NUMBERS)
    """Which of those steps' largest numbers ``delayed`` takes."""
    logps_chunk_size: PositiveInt | None = key(None, LAST_BITS, reference=True)
    """Tokens that pass through the LM head at a time, in policy and reference; null is 4096 on a GPU, 1024 on a CPU."""
    recompute_granularity: Literal["full", "selective"] | None = key(None, SPEED)
    """``full`` recomputes whole layers in backward, ``selective`` ``recompute_modules``; null keeps all activations."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = key(["core_attn"], SPEED)
    """For ``selective``; Megatron's others are for kinds of layers that no family here has."""
    recompute_method: Literal["uniform", "block"] = key("uniform", SPEED)
    """For ``full``: groups of ``recompute_num_layers`` layers, or that many single layers on each model chunk."""
    recompute_num_layers: PositiveInt = key(1, SPEED)
    """See ``recompute_method``."""
    output_dir: PathText = key("runs/emu3_tiny_cca", OUTPUT, SAME_NUMBERS, study=False)
    """Holds metrics.jsonl, TensorBoard events, config.yaml and checkpoints/. Another folder is another run."""
    pretrained_checkpoint: PathText | None = key(None, NUMBERS, reference="weights", study=False)
    """The weights to start from; null means random ones, the same for every layout. A resume compares the
    weights, not the paths."""
    save_interval: NonNegativeInt = key(0, OUTPUT, study=False)
    """Steps between checkpoints; 0 saves at the end only."""
    async_save: bool | None = key(None, OUTPUT)
    """Let a forked process write a checkpoint while training goes on; costs its size in host memory meanwhile. null is
    true on a CPU and false on a GPU, since CUDA does not support a fork after its start."""
    keep_last: PositiveInt | None = key(None, OUTPUT)
    """So many of the newest checkpoints are kept; null keeps all."""
    keep_every: PositiveInt | None = key(None, OUTPUT)
    """Steps whose multiples are kept besides, for ``keep_last``."""
    distributed_timeout_minutes: PositiveInt = key(10, OUTPUT, study=False)
    """After so long a communication that does not end is an error."""


@strict
class FaultsConfig:
    """Section ``faults``: what a run does when something goes wrong; see docs/reliability.md."""

    hang_timeout_seconds: NonNegativeFloat = 300.0
    """A rank that makes no progress for so long is named, its stack printed, and the job ended. Each microbatch is
    progress; saving may take six times as long. 0 is never."""
    non_finite: Literal["stop", "skip"] = key("stop", NUMBERS, TAKES_EFFECT)
    """On NaN or infinity in loss or gradients: end the run before the update, or leave this update out."""
    max_skipped_steps: PositiveInt = 3
    """With ``skip``: more than so many in a row end the run."""
    loss_spike: PositiveFloat | None = 10.0
    """Alarm where the loss is so many times its usual spread above the median of the last 50 steps; null is never."""
    positive_log_ratio_floor: FiniteFloat | None = -1.0
    """Alarm where the mean positive log-ratio of ten steps is below this, in nats an image token; null is never. On the
    digits, healthy runs stay above -0.85, runs that lose the images fall below -1.4."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """Whether an alarm also ends the run, saved."""


@strict
class LoggingConfig:
    """Section ``logging``."""

    tensorboard: bool = True
    """Write TensorBoard events to the run's folder."""
    progress_bar: bool = True
    """Show a bar, where standard error is a terminal."""
    sample_interval: NonNegativeInt = 0
    """Steps between pictures that the policy draws, guidance-free, of the same prompts and random numbers; they go to
    TensorBoard and to ``samples/`` in the run's folder. 0 is never."""
    sample_prompts: PathText | None = None
    """A caption a line, or .jsonl; null means the ten digits, where they are the data."""
    sample_grid: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width in visual tokens; null means those of the training data, if all are of one size."""
    text_tokenizer: PathText | None = None
    """Its folder; null means the one that came with ``training.pretrained_checkpoint`` or the data."""
    image_tokenizer: PathText | None = None
    """Likewise, to turn codes into pictures."""


@strict
class Config:
    """A whole run."""

    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    lora: LoraConfig = section(LoraConfig, NUMBERS)
    # The keys of each objective stand in its class, in the package objectives.
    objective: Annotated[Objective, PlainValidator(objective_of)] = section(OBJECTIVES[DEFAULT], NUMBERS)
    reference: ReferenceConfig = section(ReferenceConfig)
    data: DataConfig = section(DataConfig)
    validation: ValidationConfig = section(ValidationConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    faults: FaultsConfig = section(FaultsConfig, OUTPUT)
    logging: LoggingConfig = section(LoggingConfig, OUTPUT, study=False)
