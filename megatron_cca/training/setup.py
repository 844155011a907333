"""Build what a run needs: policy, reference, optimizer, schedule, data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_model_config

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.checkpoint.integrity import newest_whole
from megatron_cca.checkpoint.saver import CheckpointSaver, writes_in_background
from megatron_cca.config import Config, TrainingConfig
from megatron_cca.data.loader import BatchLoader
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat.optimizer_state import release
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.gpt import build_gpt, num_model_chunks
from megatron_cca.training import checks, has_own_weights, reference_settings, rows_per_sample
from megatron_cca.training.batches import RunData, Validation, loader, training_batches, validation_batches
from megatron_cca.training.reference import LogpsPass, Reference, borrowed_reference, own_reference, policy_head
from megatron_cca.training.resuming import OUTPUT, STARTED_FROM, started_from
from megatron_cca.training.watchdog import PhaseTracker

if TYPE_CHECKING:
    from megatron_cca.models.initialization import Initialize
    from megatron_cca.training.engine import GraphCapture

# Megatron's spelling of an FP8 state is uint8.
_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


@dataclass
class Run:
    """A run that is ready to take steps. :func:`set_up` builds it."""

    config: Config
    architecture: Architecture
    batches: BatchBuilder
    loader: BatchLoader
    validation: Validation | None
    policy: list[DistributedDataParallel]
    forward: LogpsPass
    reference: Reference | None
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int
    start: Path | None
    """The checkpoint that the weights came from before the first step."""
    progress: PhaseTracker
    saver: CheckpointSaver
    graphs: GraphCapture | None
    started_from: dict[str, str | None]
    """See :func:`resuming.started_from`."""
    passed_over: tuple[str, ...] = ()
    """Why the run did not continue from newer checkpoints, one line each."""

    @property
    def policy_chunks(self) -> list[torch.nn.Module]:
        """The policy's model chunks without DDP."""
        return [chunk.module for chunk in self.policy]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop reading ahead, and free the policy's memory. The run can take no further step."""
        self.loader.close()
        release(self.policy)

    def gather_parameters(self) -> None:
        """Gather the updated weights, as the next forward pass would. Call it before any other read of the weights.

        Collective over all ranks.
        """
        if self.config.optimizer.overlap_param_gather:
            with torch.no_grad():
                for chunk in self.policy:
                    chunk.start_param_sync(force_sync=True)

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoint folder."""
        return _checkpoints(self.config)


def initialize_at_random(chunk: torch.nn.Module, **facts: Any) -> None:
    """Draw the weights of a model chunk, see :func:`initialization.initialize_by_name`."""
    # Imported late: most runs begin with a checkpoint.
    from megatron_cca.models.initialization import initialize_by_name

    initialize_by_name(chunk, **facts)


def set_up(config: Config, data: RunData, *, initialize: Initialize = initialize_at_random) -> Run:
    """Build the run. Continue from the newest checkpoint in its folder, if there is one. Collective over all ranks.

    Args:
        config: of the run.
        data: of the run.
        initialize: draws the weights that no checkpoint gives.
    """
    architecture = resolve_architecture(config.model)
    batches = training_batches(config, data, rows_per_sample(config) == 2)
    reader = loader(config, batches)
    # The first batches are read while the models are built.
    reader.start(layout.newest_complete(_checkpoints(config)) or 0)
    validation = validation_batches(config, data, rows_per_sample(config) == 2)
    run = build_run(config, architecture, batches, reader, validation, PhaseTracker(), initialize=initialize)
    _resume(run)
    if run.iteration == 0 and config.training.precision == "fp8" and config.training.fp8_recipe == "delayed":
        run.forward.settle_scales(run.policy, reader.get(0))
    return run


def build_run(
    config: Config,
    architecture: Architecture,
    batches: BatchBuilder,
    reader: BatchLoader,
    validation: Validation | None,
    progress: PhaseTracker,
    *,
    initialize: Initialize | None = initialize_at_random,
) -> Run:
    """Build the models, the optimizer and the rest of a run, but read none of the run's own checkpoints. Collective.

    Args:
        config, architecture: of the run.
        batches, reader, validation: the sources of its rows.
        progress: records each forward pass.
        initialize: draws the weights that no checkpoint gives. None leaves them, and adapters, uninitialised.
    """
    forward = LogpsPass(batches.rows_per_microbatch, policy_head(config, architecture.vocabulary), progress.beat)
    own = config.objective.needs_reference and has_own_weights(config)
    if config.parallel.tp_comm_overlap:
        from megatron_cca.training.engine import initialize_user_buffers

        initialize_user_buffers(config)
    # The reference comes before the policy: it takes more memory while it is loaded and quantised than afterwards.
    reference = own_reference(config, forward, frozen_chunks(config, architecture, initialize)) if own else None
    policy = _build_policy(config, architecture, initialize)
    if config.objective.needs_reference and not own:
        reference = borrowed_reference(config, forward, policy)
    optimizer = build_optimizer(config, policy)
    pretrained = config.training.pretrained_checkpoint
    start = layout.resolve(pretrained, checks.PRETRAINED) if pretrained is not None else None
    return Run(
        config=config,
        architecture=architecture,
        batches=batches,
        loader=reader,
        validation=validation,
        policy=policy,
        forward=forward,
        reference=reference,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        iteration=0,
        start=start,
        progress=progress,
        saver=_saver(config, start),
        graphs=_graphs(config, policy, optimizer),
        started_from=started_from(config),
    )


def build_chunks(
    config: Config,
    architecture: Architecture,
    training: TrainingConfig,
    checkpoint: str | None,
    key: str,
    *,
    is_frozen: bool = False,
    initialize: Initialize | None = initialize_at_random,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks with weights from a checkpoint, or drawn from the seed.

    Args:
        config: of the run.
        architecture: of ``config.model``.
        training: the precision and recomputation to build for, the policy's or the reference's.
        checkpoint: where the weights come from, or None.
        key: the configuration key that names the checkpoint.
        is_frozen: whether the weights never change.
        initialize: draws the weights if there is no checkpoint. None leaves them uninitialised.
    """
    chunks = build_gpt(
        architecture, config.model, config.parallel, training, kernels=config.kernels, is_frozen=is_frozen
    )
    if checkpoint is not None:
        distributed.load_weights(layout.resolve(checkpoint, key), chunks, key)
        return chunks
    for chunk in chunks if initialize is not None else ():
        initialize(
            chunk,
            seed=config.training.seed,
            std=config.model.init_method_std,
            num_layers=architecture.num_layers,
            vocab_size=architecture.num_words,
            output_size=architecture.vocabulary.output_size,
            frozen=_frozen_features(config, architecture),
        )
    return chunks


def _frozen_features(config: Config, architecture: Architecture) -> dict[str, torch.Tensor]:
    if not architecture.scales:
        return {}
    from megatron_cca.data.codebooks import frozen_features
    from megatron_cca.data.digits import data_folders

    return frozen_features(architecture, data_folders(config))


def frozen_chunks(
    config: Config, architecture: Architecture, initialize: Initialize | None = initialize_at_random
) -> list[torch.nn.Module]:
    """Build the frozen model chunks of the reference. ``initialize`` is as in :func:`build_chunks`."""
    own = config.reference.checkpoint
    key = checks.REFERENCE if own is not None else checks.PRETRAINED
    checkpoint = own or config.training.pretrained_checkpoint
    settings = reference_settings(config)
    chunks = build_chunks(config, architecture, settings, checkpoint, key, is_frozen=True, initialize=initialize)
    if config.reference.fp8_param:
        from megatron_cca.models.frozen_weights import keep_in_fp8

        keep_in_fp8(chunks)
    return [chunk.requires_grad_(False) for chunk in chunks]


def seed_step(config: Config, step: int) -> None:
    """Seed dropout from (seed, step, rank's place), so that a resumed run needs no saved generator state."""
    place = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    digest = hashlib.sha256(repr((config.training.seed, step, place)).encode()).digest()
    model_parallel_cuda_manual_seed(int.from_bytes(digest[:4], "little"))


def wrap_ddp(chunks: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's data parallelism, and set the hooks that Megatron's schedules call."""
    options, interleaved = config.optimizer, num_model_chunks(config.parallel) > 1
    # Stages that gather at different times would delay each other in every cycle of the interleaved schedule. The
    # schedule therefore starts the gathering itself.
    aligned = options.overlap_param_gather and interleaved
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grad_reduce_in_fp32,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        align_param_gather=aligned,
        use_distributed_optimizer=options.use_distributed_optimizer,
        num_distributed_optimizer_instances=options.num_distributed_optimizer_instances,
        bucket_size=options.ddp_bucket_size,
        average_in_collective=options.average_in_collective,
        pad_buckets_for_high_nccl_busbw=options.pad_buckets_for_high_nccl_busbw,
        # step.py does this. It also checks the loss, names the layers, and lets a run leave the update out.
        check_for_nan_in_grad=False,
    )
    model_config = get_model_config(chunks[0])
    policy = [
        # As in Megatron: communication of later chunks overlaps with computing anyway.
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = finalize_model_grads
    if aligned:
        model_config.param_sync_func = [chunk.start_param_sync for chunk in policy]
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in policy]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return policy


def build_optimizer(config: Config, policy: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build Megatron's optimizer of :func:`optimizer_settings` for the policy. Collective over all ranks."""
    optimizer = get_megatron_optimizer(optimizer_settings(config), policy, use_gloo_process_groups=False)
    get_model_config(policy[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def optimizer_settings(config: Config) -> OptimizerConfig:
    """Return Megatron's configuration of the optimizer: AdamW with mixed precision and sharding."""
    options, is_fp32 = config.optimizer, config.training.precision == "fp32"
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=not is_fp32,
        params_dtype=torch.float32 if is_fp32 else torch.bfloat16,
        fp8_recipe=config.training.fp8_recipe if config.training.precision == "fp8" else None,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
        optimizer_cpu_offload=options.optimizer_cpu_offload,
        optimizer_offload_fraction=options.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=options.overlap_cpu_optimizer_d2h_h2d,
        use_precision_aware_optimizer=options.use_precision_aware_optimizer,
        # Megatron-Core 0.19.2 saves the remainders of master weights as if they were the weights.
        store_param_remainders=False,
        **{name: _STATE_DTYPES[getattr(options, name)] for name in checks.STATE_DTYPES},
    )


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule, in steps: linear warm-up, then the decay that ``optimizer.lr_decay_style`` names."""
    options = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        # A trial run may end within the warm-up.
        lr_decay_steps=max(config.training.train_iters, options.lr_warmup_iters + 1),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
    )


def _checkpoints(config: Config) -> Path:
    return Path(config.training.output_dir) / layout.FOLDER


def _graphs(config: Config, policy: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> GraphCapture | None:
    """Return the capture of Transformer Engine's graphs, None without them. Megatron's schedules capture their own."""
    if config.kernels.cuda_graph_impl != "transformer_engine":
        return None
    from megatron_cca.training.engine import GraphCapture

    return GraphCapture(config, policy, optimizer)


def _saver(config: Config, start: Path | None) -> CheckpointSaver:
    training = config.training
    return CheckpointSaver(
        _checkpoints(config),
        start=start,
        in_background=writes_in_background(training.async_save),
        keep_last=training.keep_last,
        keep_every=training.keep_every,
    )


def _build_policy(
    config: Config, architecture: Architecture, initialize: Initialize | None
) -> list[DistributedDataParallel]:
    training = config.training
    chunks = build_chunks(
        config, architecture, training, training.pretrained_checkpoint, checks.PRETRAINED, initialize=initialize
    )
    if config.lora.dim is not None:
        from megatron_cca.models import lora

        lora.attach(chunks, config.lora, seed=training.seed if initialize is not None else None)
    return wrap_ddp(chunks, config)


def _resume(run: Run) -> None:
    newest = newest_whole(run.checkpoints, OUTPUT)
    if newest is None:
        return
    folder = layout.iteration_folder(run.checkpoints, newest.iteration)
    summary = layout.read_summary(folder, OUTPUT)
    if summary["data"] != run.batches.data.fingerprint():
        raise UserError(
            f"data.path: {run.config.data.path} is not the data that the run in "
            f"{run.config.training.output_dir} was started with; restore it, or choose another training.output_dir"
        )
    distributed.load_training_state(folder, run.policy_chunks, run.optimizer, OUTPUT)
    run.iteration, run.passed_over = newest.iteration, newest.passed_over
    run.started_from = summary.get(STARTED_FROM, run.started_from)
    run.saver.last_saved = newest.iteration
    run.scheduler.step(increment=newest.iteration)
