"""Build what a run needs: process groups, policy, reference, optimizer, schedule, data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_model_config

from megatron_cca.checkpoint import distributed, layout
from megatron_cca.config import Config
from megatron_cca.data.loader import BatchLoader
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.gpt import build_gpt
from megatron_cca.models.initialization import initialize_by_name
from megatron_cca.objectives import OBJECTIVES, PairLogps
from megatron_cca.training.batches import RunData, Validation, loader, training_batches, validation_batches
from megatron_cca.training.checks import OUTPUT, PRETRAINED, REFERENCE


@dataclass
class Run:
    """A run ready to take steps; built by :func:`set_up`."""

    config: Config
    architecture: Architecture
    objective: object
    batches: BatchBuilder
    loader: BatchLoader
    validation: Validation | None
    policy: list[DistributedDataParallel]
    reference: list[torch.nn.Module] | None
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int
    start: Path | None
    """The checkpoint that the weights came from before the first step."""

    @property
    def uses_pairs(self) -> bool:
        """Whether the objective contrasts pairs with a reference."""
        return self.objective.batch_type is PairLogps

    @property
    def policy_chunks(self) -> list[torch.nn.Module]:
        """The policy's model chunks without DDP."""
        return [chunk.module for chunk in self.policy]

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoint folder."""
        return _checkpoints(self.config)


def _checkpoints(config: Config) -> Path:
    return Path(config.training.output_dir) / layout.FOLDER


def set_up(config: Config, data: RunData) -> Run:
    """Build the run; continues from the newest checkpoint in its folder if there is one. Collective over all ranks."""
    architecture = resolve_architecture(config.model)
    objective = build_objective(config)
    uses_pairs = objective.batch_type is PairLogps
    batches = training_batches(config, data, uses_pairs)
    reader = loader(config, batches)
    # While the models are built, the first batches are read.
    reader.start(layout.latest_iteration(_checkpoints(config)) or 0)
    pretrained = config.training.pretrained_checkpoint
    policy = wrap_ddp(build_chunks(config, architecture, pretrained, PRETRAINED), config)
    optimizer = build_optimizer(config, policy)
    run = Run(
        config=config,
        architecture=architecture,
        objective=objective,
        batches=batches,
        loader=reader,
        validation=validation_batches(config, data, uses_pairs),
        policy=policy,
        reference=_build_reference(config, architecture) if uses_pairs else None,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        iteration=0,
        start=layout.resolve(pretrained, PRETRAINED) if pretrained is not None else None,
    )
    _resume(run)
    return run


def build_objective(config: Config):
    """The objective with the settings that its class declares."""
    cls = OBJECTIVES[config.objective.name]
    return cls(**{name: getattr(config.objective, name) for name in cls.__dataclass_fields__})


def build_chunks(config: Config, architecture: Architecture, checkpoint: str | None, key: str) -> list[torch.nn.Module]:
    """This rank's model chunks with weights: from a checkpoint, or drawn from the seed."""
    chunks = build_gpt(architecture, config.model, config.parallel, config.training)
    if checkpoint is not None:
        distributed.load_weights(layout.resolve(checkpoint, key), chunks, key)
        return chunks
    for chunk in chunks:
        initialize_by_name(
            chunk,
            seed=config.training.seed,
            std=config.model.init_method_std,
            num_layers=architecture.num_layers,
            vocab_size=architecture.vocabulary.size,
        )
    return chunks


def _build_reference(config: Config, architecture: Architecture) -> list[torch.nn.Module]:
    checkpoint = config.reference.checkpoint or config.training.pretrained_checkpoint
    key = REFERENCE if config.reference.checkpoint else PRETRAINED
    return [chunk.requires_grad_(False) for chunk in build_chunks(config, architecture, checkpoint, key)]


def wrap_ddp(chunks: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk, with the hooks that its schedules call."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    model_config = get_model_config(chunks[0])
    policy = [
        # Later chunks' gradients are ready together, in the first bucket's shadow: Megatron's own choice.
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in policy]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return policy


def build_optimizer(config: Config, policy: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with Megatron's mixed precision and sharding; collective over all ranks."""
    options = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=config.training.precision == "bf16",
            params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
            use_distributed_optimizer=options.use_distributed_optimizer,
        ),
        policy,
        use_gloo_process_groups=False,
    )
    get_model_config(policy[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then the decay that ``optimizer.lr_decay_style`` names; counts in steps."""
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


def _resume(run: Run) -> None:
    iteration = layout.latest_iteration(run.checkpoints)
    if iteration is None:
        return
    folder = layout.iteration_folder(run.checkpoints, iteration)
    trained_on = layout.read_summary(folder, OUTPUT)["data"]
    if trained_on != run.batches.data.fingerprint():
        raise UserError(
            f"data.path: {run.config.data.path} is not the data that the run in "
            f"{run.config.training.output_dir} was started with; restore it, or choose another training.output_dir"
        )
    distributed.load_training_state(folder, run.policy_chunks, run.optimizer, OUTPUT)
    run.iteration = iteration
    run.scheduler.step(increment=iteration)


def seed_step(config: Config, step: int) -> None:
    """Make dropout a function of (seed, step, rank's place), so that a resumed run needs no saved generator state."""
    place = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    digest = hashlib.sha256(repr((config.training.seed, step, place)).encode()).digest()
    model_parallel_cuda_manual_seed(int.from_bytes(digest[:4], "little"))
