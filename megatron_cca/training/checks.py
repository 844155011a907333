"""Refuse a run that cannot work, before any process group is made."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import Config, ReferenceConfig
from megatron_cca.data import DIGITS
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import check_layout
from megatron_cca.objectives.base import OBJECTIVES, known_names
from megatron_cca.training import (
    computes_plainly,
    dropout_key,
    has_own_weights,
    pairs_of,
    same_weights,
)
from megatron_cca.training.resuming import PRETRAINED, REFERENCE, check_resume

# Keys of ``optimizer`` that need Megatron's precision-aware optimizer.
STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def check_run(config: Config, world_size: int) -> None:
    """Refuse a run that cannot work, or that is not the run in its folder.

    Raises:
        UserError: an unsuitable layout, batch size, schedule or checkpoint. The message names the key.
    """
    check_new_run(config, world_size)
    check_data(config)
    check_resume(config)


def check_new_run(config: Config, world_size: int) -> None:
    """Check a run as :func:`check_run` does, without its data and without the run in its folder."""
    architecture = resolve_architecture(config.model)
    check_layout(architecture, config.model, config.parallel)
    data_parallel = data_parallel_size(config, world_size)
    _check_pairs(config)
    _check_mixture(config)
    _check_batch(config, data_parallel)
    _check_interleaving(config, data_parallel)
    _check_schedule(config)
    _check_saving(config)
    _check_optimizer(config)
    if not computes_plainly(config):
        from megatron_cca.training.kernel_checks import check_attention, check_overlaps

        check_overlaps(config, data_parallel)
        check_attention(config)
    _check_validation(config)
    _check_pictures(config)
    if config.objective.needs_reference:
        check_reference(config)
    if config.training.pretrained_checkpoint is not None:
        check_weights(config, config.training.pretrained_checkpoint, PRETRAINED)
    if config.reference.checkpoint is not None:
        check_weights(config, config.reference.checkpoint, REFERENCE)


def _check_pairs(config: Config) -> None:
    name, possible = config.objective.name, config.objective.contrasts
    kind = config.data.pairs
    if kind is not None and kind not in possible:
        own = f"contrasts {possible[0]}" if possible else "has no pairs"
        raise UserError(
            f"data.pairs: {kind}, but {name} {own}; leave it out, or set objective.name to one of {_contrasting(kind)}"
        )
    for key in ("data.partner_path", "validation.partner_path"):
        section, _, one = key.partition(".")
        path = getattr(getattr(config, section), one)
        if path is not None and pairs_of(config) != "images":
            way = (
                "data.pairs to images" if "images" in possible else f"objective.name to one of {_contrasting('images')}"
            )
            raise UserError(f"{key}: {path}, but this run has no pairs of images; leave it out, or set {way}")
        if path is not None and path == getattr(config, section).path:
            raise UserError(f"{key}: {path} is {section}.path; an image is no partner of itself")


def _contrasting(kind: str) -> str:
    return ", ".join(name for name in known_names() if kind in OBJECTIVES[name].contrasts)


def _check_mixture(config: Config) -> None:
    if config.objective.conditional_share is None:
        return
    name, own, usual = config.objective.name, asdict(config.reference), asdict(ReferenceConfig())
    for key in own:
        if own[key] != usual[key]:
            raise UserError(f"reference.{key}: {own[key]}, but {name} has no reference; leave it out")
    if config.parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {config.parallel.context_parallel_size}, but {name} mixes two rows whose "
            "images can lie on different ranks then; set it to 1"
        )


def check_data(config: Config) -> None:
    """Refuse a run without ``data.path``. Plans may do without."""
    if config.data.path is None:
        raise UserError(
            "data.path: missing; name a folder of token shards, which megatron-cca tokenize writes, or the word "
            "digits for scikit-learn's scans"
        )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size: the world size divided by TP x PP x CP.

    Raises:
        UserError: the world size is not a multiple of TP x PP x CP.
    """
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    if config.parallel.context_parallel_size > 1:
        names.append("context_parallel_size")
    sizes = {name: getattr(config.parallel, name) for name in names}
    unit = math.prod(sizes.values())
    if world_size % unit:
        product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"{product} does not divide the {world_size} processes of this job; start a multiple of {unit} "
            "(torchrun --nproc_per_node)"
        )
    return world_size // unit


def check_weights(config: Config, path: str, key: str) -> None:
    """Refuse weights of another model.

    Args:
        config: of the run.
        path: of the checkpoint, as the user gave it.
        key: the key that holds the path.

    Raises:
        UserError: there is no checkpoint, or a size differs. The message names the first such size.
    """
    folder = layout.resolve(path, key)
    ours, theirs = (asdict(resolve_architecture(c.model)) for c in (config, saved_config(folder, key)))
    for name in ours:
        # Rotary positions have no weights. A run may use more positions than the checkpoint's run did.
        if name != "max_position_embeddings" and ours[name] != theirs[name]:
            raise UserError(f"{key}: {folder} has {name} {theirs[name]}, this run's model {ours[name]}")


def check_reference(config: Config) -> None:
    """Refuse a reference that the run cannot have.

    Raises:
        UserError: the message names the key.
    """
    own, strategy = config.reference, config.reference.strategy
    if strategy == "shared":
        _check_shared(config)
    if strategy == "cached" and own.cache is None:
        raise UserError(
            "reference.cache: missing; compute the log-probabilities with megatron-cca cache-reference and name its "
            "folder"
        )
    if strategy != "cached" and own.cache is not None:
        raise UserError(f"reference.cache: of no use with reference.strategy {strategy}; set that to cached")
    if strategy == "offload":
        from megatron_cca.training.host_memory import check_host_memory

        check_host_memory(config)
    check_dropout(config)


def check_dropout(config: Config) -> None:
    """Refuse dropout where policy and reference are compared, unless ``reference.allow_bias`` permits it.

    The two passes draw different masks, as in the code of CCA's authors. The log-ratio is then noisy. It is not 0 when
    the weights are the same, and step 0 reports its size. A cached reference cannot have dropout: the cache would hold
    one draw of masks, and it serves all layouts while masks depend on the layout. A shared reference cannot have it,
    since it must compute as the policy does.

    Raises:
        UserError: the message names the key.
    """
    key = dropout_key(config)
    if key is None:
        return
    rate = getattr(config.model, key)
    if not has_own_weights(config):
        raise UserError(
            f"model.{key}: {rate} draws other masks for the reference than for the policy, which reference.strategy "
            f"{config.reference.strategy} cannot have; set it to 0, or use resident or offload"
        )
    if config.reference.allow_bias is None:
        raise UserError(
            f"model.{key}: {rate}: must be 0 for objective {config.objective.name}, since dropout makes policy and "
            "reference differ from the first step; to have it all the same, as CCA's authors do, say how much may be: "
            "--set reference.allow_bias=1"
        )


def _check_batch(config: Config, data_parallel: int) -> None:
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    unit = micro * data_parallel
    if whole % unit:
        raise UserError(
            f"training.global_batch_size: {whole} is not a multiple of training.micro_batch_size {micro} x "
            f"data-parallel size {data_parallel}; the nearest that is: {max(1, round(whole / unit)) * unit}"
        )


def _check_interleaving(config: Config, data_parallel: int) -> None:
    parallel = config.parallel
    # With microbatch_group_size_per_vp_stage other numbers work, too: see kernel_checks.py.
    if (parallel.virtual_pipeline_model_parallel_size or 1) == 1 or parallel.microbatch_group_size_per_vp_stage:
        return
    pp, whole = parallel.pipeline_model_parallel_size, config.training.global_batch_size
    microbatches = whole // (config.training.micro_batch_size * data_parallel)
    if microbatches % pp:
        raise UserError(
            f"training.global_batch_size: {whole} gives each rank {microbatches} microbatches; with "
            "parallel.virtual_pipeline_model_parallel_size their number must be a multiple of "
            f"parallel.pipeline_model_parallel_size {pp}, so the batch one of {whole // microbatches * pp}"
        )


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr: {optimizer.min_lr} is more than optimizer.lr {optimizer.lr}")


def _check_saving(config: Config) -> None:
    if config.training.keep_every is not None and config.training.keep_last is None:
        raise UserError("training.keep_every: of no use without training.keep_last, without which all are kept")


def _check_optimizer(config: Config) -> None:
    options = config.optimizer
    if options.use_precision_aware_optimizer and not options.use_distributed_optimizer:
        raise UserError("optimizer.use_precision_aware_optimizer: needs optimizer.use_distributed_optimizer")
    if options.use_precision_aware_optimizer and config.training.precision == "fp32":
        raise UserError(
            "optimizer.use_precision_aware_optimizer: of no use with training.precision fp32, whose weights need no "
            "master weights; leave it out"
        )
    if options.optimizer_cpu_offload:
        from megatron_cca.training.host_memory import check_optimizer_offload

        check_optimizer_offload(options)
    elif options.overlap_cpu_optimizer_d2h_h2d:
        raise UserError("optimizer.overlap_cpu_optimizer_d2h_h2d: of no use without optimizer.optimizer_cpu_offload")
    for key in STATE_DTYPES:
        value = getattr(options, key)
        if value != "fp32" and not options.use_precision_aware_optimizer:
            raise UserError(f"optimizer.{key}: {value} needs optimizer.use_precision_aware_optimizer; set that to true")
    if options.main_grads_dtype != "fp32" and options.grad_reduce_in_fp32:
        raise UserError(
            f"optimizer.main_grads_dtype: {options.main_grads_dtype} needs optimizer.grad_reduce_in_fp32 false: the "
            "optimizer takes gradients as they were reduced"
        )


def _check_validation(config: Config) -> None:
    validation = config.validation
    for key, path in (("data.path", config.data.path), ("validation.path", validation.path)):
        if path == {}:
            raise UserError(f"{key}: names no folder; give one, or several with their weights")
    if validation.interval and not validation.fraction and validation.path is None:
        raise UserError(
            f"validation.interval: {validation.interval}, but nothing to validate on; set validation.fraction (such as "
            "0.02) or validation.path"
        )
    if validation.fraction and validation.path is not None:
        raise UserError("validation.fraction: of no use beside validation.path; leave one of them out")


def _check_pictures(config: Config) -> None:
    if not config.logging.sample_interval:
        return
    if config.parallel.context_parallel_size > 1:
        raise UserError(
            "logging.sample_interval: pictures cannot be drawn with parallel.context_parallel_size "
            f"{config.parallel.context_parallel_size}, whose ranks have parts of a sequence only; set one of them to "
            "0 or 1"
        )
    prompts = config.logging.sample_prompts
    if prompts is None and config.data.path != DIGITS:
        raise UserError("logging.sample_prompts: name a file with captions, one a line, for logging.sample_interval")
    if prompts is not None and not Path(prompts).is_file():
        raise UserError(f"logging.sample_prompts: no file at {prompts}; give a text file with a caption a line")


def _check_shared(config: Config) -> None:
    own = config.reference
    if config.lora.dim is None:
        raise UserError(
            "reference.strategy: shared is the policy with its LoRA adapters off, and this run has none; set lora.dim, "
            "such as 16, or use resident"
        )
    if not same_weights(config):
        raise UserError(
            f"reference.checkpoint: {own.checkpoint} cannot be shared, since the policy starts from "
            f"{config.training.pretrained_checkpoint or 'random weights'}; leave it out, or use resident"
        )
    for key, value in (("precision", own.precision), ("fp8_recipe", own.fp8_recipe), ("fp8_param", own.fp8_param)):
        if value:
            raise UserError(f"reference.{key}: a shared reference computes as the policy does; leave it out")
