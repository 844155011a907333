"""The configuration of a run, as dataclasses. ``load.py`` reads it.

Every key has Megatron-Core's name where Megatron has one, and declares what it affects. Nothing here imports torch or
Megatron, so that a mistyped key is refused in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from megatron_cca.io.paths import typed_path
from megatron_cca.keys import (
    Affects,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    OnResume,
    PositiveFloat,
    PositiveInt,
    Probability,
    key,
    section,
    strict,
)
from megatron_cca.objectives import OBJECTIVES, Objective
from megatron_cca.objectives.base import DEFAULT, objective_of

NUMBERS, LAST_BITS, SPEED, OUTPUT = Affects
TAKES_EFFECT, SAME_NUMBERS, REFUSED = OnResume

TYPED = "typed"  # the pydantic context of a validation whose input a person typed


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
    """Section ``model``: a named preset. Sizes that are null are its own, of ``-tiny`` ones those of tokenized data."""

    name: str = key("emu3-tiny", NUMBERS, reference="model.position_embedding")
    """The preset, which also sets the family: ``emu3-8b``, ``llamagen-l``, or one of the others listed at the end."""
    num_layers: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Layers of the whole model."""
    hidden_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Width between the two projections of a layer's MLP."""
    num_attention_heads: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Query heads; they divide ``hidden_size`` where ``kv_channels`` is not set."""
    num_query_groups: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Key and value heads; they divide the query heads."""
    kv_channels: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Channels of a head. Null is the preset's own number, else ``hidden_size`` / ``num_attention_heads``."""
    qk_layernorm: bool | None = key(None, NUMBERS, reference=True)
    """An RMSNorm of each head's queries, and one of its keys."""
    add_qkv_bias: bool | None = key(None, NUMBERS, reference=True)
    """Biases of queries, keys and values, and of no other projection."""
    max_position_embeddings: PositiveInt | None = key(None, NUMBERS, reference=True)
    """Longest row, in tokens."""
    layernorm_epsilon: PositiveFloat | None = key(None, NUMBERS, reference=True)
    """Added to the mean square in RMSNorm."""
    rotary_base: PositiveFloat | None = key(None, NUMBERS, reference=True)
    """Base of the rotary frequencies."""
    vocab_size: PositiveInt | None = key(None, NUMBERS, reference=True)
    """A size other than the preset's gives the token ids no known meaning: the model can only be converted."""
    codebook_size: PositiveInt | None = key(None, NUMBERS, reference="model.vocab_size")
    """Codes of the image tokenizer, for ``emu3-tiny`` and models of classes; ``vocab_size`` follows from it."""
    num_classes: PositiveInt | None = key(None, NUMBERS, reference="model.vocab_size")
    """Classes, for a model with classes as conditions, without the null class; ``vocab_size`` follows from it."""
    make_vocab_size_divisible_by: PositiveInt = key(128, NUMBERS)
    """The vocabulary is padded to a multiple of this times ``tensor_model_parallel_size``."""
    padded_vocab_size: PositiveInt | None = key(None, NUMBERS)
    """Size of the padded vocabulary, if it must be the same for every layout."""
    hidden_dropout: Probability = key(0.0, NUMBERS)
    """Dropout of the embeddings and of what each half of a layer adds. If policy and reference are compared, it makes
    the log-ratio noisy. It then needs ``reference.allow_bias`` and a ``resident`` or ``offload`` reference."""
    attention_dropout: Probability = key(0.0, NUMBERS)
    """Dropout of the attention weights, with the same effect and needs as ``hidden_dropout``."""
    init_method_std: PositiveFloat = key(0.02, NUMBERS, reference="weights")
    """Standard deviation of weights that come from no checkpoint."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = key("auto", LAST_BITS, REFUSED, reference=True)
    """``auto`` takes Transformer Engine on a GPU where it is installed, Megatron's local layers elsewhere. Transformer
    Engine has no fused attention for fp32, nor for heads whose channels are no multiple of 8 or more than 128. There
    ``auto`` takes torch's attention between Transformer Engine's layers, ``transformer_engine`` its unfused one."""


@strict
class ParallelConfig:
    """Section ``parallel``. The data-parallel size is the world size divided by the other parallel sizes."""

    tensor_model_parallel_size: PositiveInt = key(1, LAST_BITS, reference=True, study=False)
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: PositiveInt = key(1, LAST_BITS, study=False)
    """Stages that the layers are divided into."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = key(None, LAST_BITS, study=False)
    """Model chunks on each pipeline rank (the interleaved schedule); null or 1 means one."""
    context_parallel_size: PositiveInt = key(1, LAST_BITS, reference=True, study=False)
    """Ranks that share each sequence, in Megatron's zigzag order."""
    sequence_parallel: bool = key(False, LAST_BITS, reference=True, study=False)
    """Divide norms and residuals among the tensor-parallel ranks, too."""
    tp_comm_overlap: bool = key(False, LAST_BITS, reference=True, study=False)
    """Overlap the layers' products with tensor-parallel communication, through Transformer Engine's user buffers. The
    buffers have one size, so that all rows must have one length: only one multiple of ``data.pad_to_multiple_of`` may
    fit into ``model.max_position_embeddings``."""
    overlap_p2p_comm: bool | None = key(None, SPEED, study=False)
    """Overlap sends and receives between stages with computing. Only interleaving can; null turns it on there."""
    microbatch_group_size_per_vp_stage: PositiveInt | None = key(None, SPEED, study=False)
    """Consecutive microbatches of a model chunk when interleaved; null is ``pipeline_model_parallel_size``."""
    deallocate_pipeline_outputs: bool = key(False, SPEED, study=False)
    """Free the output of a pipeline stage once it is sent: backward needs its graph, not its numbers."""


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
    """Megatron's names of the projections that get an adapter, in every layer."""


@strict
class ReferenceConfig:
    """Section ``reference``: the frozen copy that the objective compares with."""

    strategy: Literal["resident", "offload", "cached", "shared"] = key("resident", LAST_BITS)
    """``resident`` keeps the reference on the device beside the policy. ``offload`` keeps it in host memory and streams
    one layer at a time through the device. ``cached`` reads log-probabilities that ``megatron-cca cache-reference``
    computed. ``shared`` takes the policy with its LoRA adapters off."""
    checkpoint: PathText | None = key(None, NUMBERS, reference="weights")
    """The weights of the reference; null means ``training.pretrained_checkpoint``."""
    cache: PathText | None = key(None, LAST_BITS)
    """For ``cached``: the folder that ``megatron-cca cache-reference`` wrote."""
    precision: Precision | None = key(None, NUMBERS, reference=True)
    """Precision of the reference; null means the policy's, ``training.precision``."""
    fp8_recipe: Literal["tensorwise", "blockwise"] | None = key(None, NUMBERS, reference=True)
    """Null means the policy's, or ``tensorwise`` if that is ``delayed``: a frozen model cannot learn scales."""
    fp8_param: bool = key(False, NUMBERS, reference=True)
    """Keep the weights of the reference in FP8, with one scale per row, and compute in ``precision`` with the rounded
    weights. They take half the memory of bf16. The LM head and the norms stay as they are."""
    allow_bias: NonNegativeFloat | None = key(None, OUTPUT, SAME_NUMBERS)
    """Largest root mean square of beta x log-ratio while policy and reference have the same weights (or of another
    reward scale x log-ratio, if the objective has another scale). Null means exactly 0 if both take the same numeric
    path, and 0.05 if their precisions differ. With dropout it must be given."""


@strict
class DataConfig:
    """Section ``data``: the token shards to train on, how samples are paired, and how they are read."""

    path: PathText | Blend | None = key(None, NUMBERS, reference="data")
    """A folder of token shards, or several with their shares of the samples, ``{shards/a: 0.7, shards/b: 0.3}``. The
    word ``digits`` stands for scikit-learn's scans. A run must set this key; null is unknown, as after an import."""
    pairs: Literal["conditions", "images"] | None = key(None, NUMBERS, reference=True)
    """A pair's rows: one image under two conditions, or two images for one. Null is what the objective contrasts."""
    partner_path: PathText | None = key(None, NUMBERS, reference="partner data")
    """With pairs of images: shards of the second images, matched by condition. Null: ``data.path`` names its pairs."""
    condition_dropout: Probability = key(0.1, NUMBERS, reference=True)
    """Share of rows whose caption is emptied (the authors' ``uncond_ratio``); of both rows of a pair of images."""
    length_bucketing: PositiveInt = key(1, NUMBERS, reference=True)
    """Number of steps whose samples are sorted by length together, to reduce padding; 1 leaves them as drawn."""
    pad_to_multiple_of: PositiveInt = key(1, LAST_BITS, reference=True)
    """Rows are padded to a multiple of this, so that few lengths occur."""
    prefetch: PositiveInt = key(2, SPEED, study=False)
    """Steps that are read ahead."""
    loader: Literal["dali", "torch"] | None = key(None, SPEED, study=False)
    """What copies batches to the device. Both give the same bytes. Null is DALI where it is installed, else torch."""


@strict
class ValidationConfig:
    """Section ``validation``: the objective on samples that are not trained on."""

    interval: NonNegativeInt = key(0, OUTPUT)
    """Steps between validations; 0 is never."""
    fraction: Probability = key(0.0, NUMBERS, reference=True)
    """Share of every folder in ``data.path`` that is held out."""
    path: PathText | Blend | None = key(None, NUMBERS, TAKES_EFFECT, reference="validation data")
    """Separate shards to validate on instead, given as in ``data.path``."""
    partner_path: PathText | None = key(None, NUMBERS, reference="partner validation data")
    """Partners of ``validation.path``; null: ``data.partner_path``."""
    iters: PositiveInt | None = key(None, NUMBERS, TAKES_EFFECT)
    """Global batches of a validation; null is as many as one pass over the samples fills, but at least one."""
    seed: NonNegativeInt = key(0, NUMBERS, reference=True)
    """Seed that draws the held-out samples. Runs with the same seed hold out the same samples."""


@strict
class OptimizerConfig:
    """Section ``optimizer``: AdamW, its schedule, and how gradients are reduced and its state is kept."""

    lr: PositiveFloat = key(1e-5, NUMBERS, TAKES_EFFECT)
    """Largest learning rate."""
    min_lr: NonNegativeFloat = key(0.0, NUMBERS, TAKES_EFFECT)
    """Smallest learning rate, where the decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = key("constant", NUMBERS, TAKES_EFFECT)
    """Decay from ``lr`` to ``min_lr``, over all steps."""
    lr_warmup_iters: NonNegativeInt = key(0, NUMBERS, TAKES_EFFECT)
    """Steps in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = key(0.0, NUMBERS, TAKES_EFFECT)
    """Decoupled weight decay. Norms have none."""
    adam_beta1: Probability = key(0.9, NUMBERS, TAKES_EFFECT)
    """Decay of the first moment."""
    adam_beta2: Probability = key(0.95, NUMBERS, TAKES_EFFECT)
    """Decay of the second moment."""
    adam_eps: PositiveFloat = key(1e-8, NUMBERS, TAKES_EFFECT)
    """Added to the square root of the second moment."""
    clip_grad: NonNegativeFloat = key(1.0, NUMBERS, TAKES_EFFECT)
    """Largest global gradient norm; 0 switches clipping off."""
    use_distributed_optimizer: bool = key(True, LAST_BITS, REFUSED)
    """Shard master weights and moments over the data-parallel ranks. The state has other names with it than without."""
    num_distributed_optimizer_instances: PositiveInt = key(1, LAST_BITS)
    """Replicas of the sharded state. Each lies, and communicates, within data-parallel size / this number ranks."""
    overlap_grad_reduce: bool = key(False, SPEED)
    """Reduce gradients, bucket by bucket, while backward still computes."""
    overlap_param_gather: bool = key(False, SPEED)
    """Gather updated weights, bucket by bucket, while the next forward pass computes."""
    ddp_bucket_size: PositiveInt | None = key(None, LAST_BITS)
    """Parameters in a bucket; null is Megatron's max(40,000,000, 1,000,000 x data-parallel size)."""
    average_in_collective: bool = key(False, LAST_BITS)
    """Let the collective average gradients, instead of dividing them before a sum."""
    pad_buckets_for_high_nccl_busbw: bool = key(False, LAST_BITS)
    """Pad buckets to a multiple of 2^16 parameters per rank. NCCL is fast with these sizes on many ranks."""
    grad_reduce_in_fp32: bool = key(True, NUMBERS, TAKES_EFFECT)
    """Keep and reduce gradients in fp32; false does both in the precision of the weights."""
    optimizer_cpu_offload: bool = key(False, LAST_BITS)
    """Keep the optimizer's state in host memory and update there; needs ``use_precision_aware_optimizer``."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = key(1.0, LAST_BITS)
    """Share of the state that ``optimizer_cpu_offload`` moves."""
    overlap_cpu_optimizer_d2h_h2d: bool = key(False, SPEED)
    """Overlap the update of ``optimizer_cpu_offload`` with the copies to and from the host."""
    use_precision_aware_optimizer: bool = key(False, NUMBERS, TAKES_EFFECT)
    """Let Transformer Engine's FusedAdam keep its state in the types below; they must be fp32 otherwise."""
    main_grads_dtype: Literal["fp32", "bf16"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Type of the gradients that the optimizer takes; bf16 needs ``grad_reduce_in_fp32`` false."""
    main_params_dtype: Literal["fp32", "fp16"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Type of the master weights."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Type of Adam's first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = key("fp32", NUMBERS, TAKES_EFFECT)
    """Type of Adam's second moment."""


@strict
class KernelsConfig:
    """Section ``kernels``: fused kernels and CUDA graphs."""

    gradient_accumulation_fusion: bool | None = key(None, LAST_BITS)
    """Add weight gradients to Megatron's gradient buffer within the product that computes them; null is off."""
    bias_activation_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Compile SwiGLU into one kernel (``torch.compile``); null turns it on on a GPU."""
    bias_dropout_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Compile dropout and the residual sum into one kernel; null turns it on on a GPU."""
    apply_rope_fusion: bool | None = key(None, LAST_BITS, reference=True)
    """Transformer Engine's kernel for rotary positions; null is off."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = key("none", SPEED)
    """What captures the policy's layers in CUDA graphs: Megatron (``local``) or Transformer Engine. All rows must have
    one length; see ``parallel.tp_comm_overlap``. The reference is not captured."""
    cuda_graph_modules: list[Literal["attn", "mlp"]] = key([], SPEED)
    """For ``transformer_engine``: the parts of a layer to capture; an empty list means whole layers."""
    cuda_graph_warmup_steps: NonNegativeInt = key(3, SPEED)
    """Before a capture: training steps with ``transformer_engine``, passes through each layer with ``local``."""


@strict
class TrainingConfig:
    """Section ``training``: a run's length, batches, precision, memory and checkpoints."""

    train_iters: PositiveInt = key(60, NUMBERS, TAKES_EFFECT)
    """Steps of the whole run."""
    micro_batch_size: PositiveInt = key(32, LAST_BITS, reference=True, study=False)
    """Image-condition samples in one forward pass of one data-parallel rank (a CCA sample is two rows)."""
    global_batch_size: PositiveInt = key(256, NUMBERS, reference=True)
    """Image-condition samples of a step, over all ranks."""
    seed: NonNegativeInt = key(1234, NUMBERS, reference=True)
    """Seed of the order of samples, of negatives, of dropped captions and of random weights."""
    precision: Precision = key("fp32", NUMBERS, reference="reference.precision")
    """``fp8`` is bf16 with the layers' matrix products in FP8, by Transformer Engine."""
    fp8_format: Literal["hybrid", "e4m3"] = key("hybrid", NUMBERS)
    """``hybrid`` is E4M3 forward and E5M2 backward."""
    fp8_recipe: Fp8Recipe = key("tensorwise", NUMBERS, reference="reference.fp8_recipe")
    """Where scales come from: the current tensor (``tensorwise``, ``blockwise``) or earlier ones (``delayed``)."""
    fp8_amax_history_len: PositiveInt = key(16, NUMBERS)
    """Length of the amax history of ``delayed``, in steps."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = key("max", NUMBERS)
    """Which value of the amax history ``delayed`` takes."""
    logps_chunk_size: PositiveInt | None = key(None, LAST_BITS, reference=True)
    """Tokens that pass through the LM head at a time, in policy and reference; null is 4096 on a GPU, 1024 on a CPU."""
    recompute_granularity: Literal["full", "selective"] | None = key(None, SPEED)
    """``full`` recomputes whole layers in backward, ``selective`` ``recompute_modules``; null keeps all activations."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = key(["core_attn"], SPEED)
    """What ``selective`` recomputes. Megatron's other modules are for layers that no family here has."""
    recompute_method: Literal["uniform", "block"] = key("uniform", SPEED)
    """For ``full``: groups of ``recompute_num_layers`` layers, or that many single layers on each model chunk."""
    recompute_num_layers: PositiveInt = key(1, SPEED)
    """See ``recompute_method``."""
    output_dir: PathText = key("runs/emu3_tiny_cca", OUTPUT, SAME_NUMBERS, study=False)
    """Holds metrics.jsonl, TensorBoard events, config.yaml and checkpoints/. Another folder is another run."""
    pretrained_checkpoint: PathText | None = key(None, NUMBERS, reference="weights", study=False)
    """The weights to start from; null is random, the same for every layout. A resume compares weights, not paths."""
    save_interval: NonNegativeInt = key(0, OUTPUT, study=False)
    """Steps between checkpoints; 0 saves at the end only."""
    async_save: bool | None = key(None, OUTPUT)
    """Let a forked process write a checkpoint while training goes on. This takes the checkpoint's size in host memory
    until the write ends. null is true on a CPU and false on a GPU: CUDA does not support a fork after its start."""
    keep_last: PositiveInt | None = key(None, OUTPUT)
    """Number of the newest checkpoints to keep; null keeps all."""
    keep_every: PositiveInt | None = key(None, OUTPUT)
    """With ``keep_last``: also keep the checkpoints of steps that are multiples of this."""
    distributed_timeout_minutes: PositiveInt = key(10, OUTPUT, study=False)
    """A communication that takes longer than this is an error."""


@strict
class FaultsConfig:
    """Section ``faults``: what a run does when something goes wrong; see docs/reliability.md."""

    hang_timeout_seconds: NonNegativeFloat = 300.0
    """If a rank makes no progress for this long, the job names it, prints its stack and ends. Each microbatch is
    progress. Saving may take six times as long. 0 switches this off."""
    non_finite: Literal["stop", "skip"] = key("stop", NUMBERS, TAKES_EFFECT)
    """On NaN or infinity in loss or gradients: end the run before the update, or leave this update out."""
    max_skipped_steps: PositiveInt = 3
    """With ``skip``: more skipped steps in a row than this end the run."""
    loss_spike: PositiveFloat | None = 10.0
    """Alarm if the loss is above the median of the last 50 steps by this many times its usual spread; null is never."""
    positive_log_ratio_floor: FiniteFloat | None = -1.0
    """Alarm if the mean positive log-ratio of ten steps is below this, in nats per image token; null is never. On the
    digits, healthy runs stay above -0.85. Runs that lose the images fall below -1.4."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """``stop``: an alarm also saves and ends the run."""


@strict
class LoggingConfig:
    """Section ``logging``: what a run shows while it trains: curves, a progress bar, pictures."""

    tensorboard: bool = True
    """Write TensorBoard events to the run's folder."""
    wandb: str | None = None
    """A project of Weights & Biases, or ``entity/project``, to report to; null is none. WANDB_MODE can be offline."""
    mlflow: str | None = None
    """An experiment of MLflow to report to, at MLFLOW_TRACKING_URI; null is none."""
    progress_bar: bool = True
    """Show a bar, where standard error is a terminal."""
    sample_interval: NonNegativeInt = 0
    """Steps between pictures that the policy draws, guidance-free, from the same prompts and random numbers each time.
    They go to TensorBoard and to ``samples/`` in the run's folder. 0 is never."""
    sample_prompts: PathText | None = None
    """A file with one caption a line, or .jsonl; null means the ten digits, where they are the data."""
    sample_grid: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width in visual tokens; null means those of the training data, if all are of one size."""
    text_tokenizer: PathText | None = None
    """Folder of the text tokenizer; null means that of ``training.pretrained_checkpoint`` or of the data."""
    image_tokenizer: PathText | None = None
    """Folder of the image tokenizer, which turns codes into pictures; null as for ``text_tokenizer``."""


@strict
class Config:
    """The configuration of a whole run, by sections."""

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
