"""Which overlaps, fusions and CUDA graphs a run is refused for before any process group is made."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.training.reference_settings import reference_settings
from megatron_cca.training.shapes import fixed_row_length, shared_multiple

TP_OVERLAP, GRAPHS = "parallel.tp_comm_overlap", "kernels.cuda_graph_impl"


def check_overlaps(config: Config, data_parallel: int) -> None:
    """Refuse switches that need what the rest of the configuration does not have.

    Args:
        config: of the run.
        data_parallel: size of a data-parallel group, without context parallelism.

    Raises:
        UserError: names the key and what would be right.
    """
    _check_pipeline(config, data_parallel)
    _check_optimizer(config, data_parallel * config.parallel.context_parallel_size)
    if config.parallel.tp_comm_overlap:
        _check_user_buffers(config)
    if config.kernels.gradient_accumulation_fusion and config.lora.dim is not None:
        raise UserError(
            "kernels.gradient_accumulation_fusion: not with lora.dim, which freezes the weights whose gradients it "
            "adds; leave it out"
        )
    if config.kernels.cuda_graph_impl != "none":
        _check_graphs(config)
    elif config.kernels.cuda_graph_modules:
        raise UserError(f"kernels.cuda_graph_modules: of no use without {GRAPHS}; set that to transformer_engine")


def _check_pipeline(config: Config, data_parallel: int) -> None:
    parallel = config.parallel
    if (parallel.virtual_pipeline_model_parallel_size or 1) == 1:
        for key in ("overlap_p2p_comm", "microbatch_group_size_per_vp_stage"):
            if getattr(parallel, key):
                raise UserError(f"parallel.{key}: needs parallel.virtual_pipeline_model_parallel_size of 2 or more")
        return
    group, pp = parallel.microbatch_group_size_per_vp_stage, parallel.pipeline_model_parallel_size
    microbatches = config.training.global_batch_size // (config.training.micro_batch_size * data_parallel)
    if group is None:
        return
    if not pp <= group <= microbatches:
        raise UserError(
            f"parallel.microbatch_group_size_per_vp_stage: {group}, must be from "
            f"parallel.pipeline_model_parallel_size {pp} to the {microbatches} microbatches of a rank"
        )
    if 0 < microbatches % group < pp:
        raise UserError(
            f"parallel.microbatch_group_size_per_vp_stage: {group} leaves {microbatches % group} of a rank's "
            f"{microbatches} microbatches for the last group, fewer than parallel.pipeline_model_parallel_size {pp}; "
            f"{microbatches} leaves none"
        )


def _check_optimizer(config: Config, ranks: int) -> None:
    options = config.optimizer
    needs = {
        "overlap_param_gather": ("use_distributed_optimizer", "overlap_grad_reduce"),
        "ddp_bucket_size": ("overlap_grad_reduce",),
        "pad_buckets_for_high_nccl_busbw": ("use_distributed_optimizer",),
    }
    for key, needed in needs.items():
        for other in needed if getattr(options, key) else ():
            if not getattr(options, other):
                raise UserError(f"optimizer.{key}: needs optimizer.{other}; set that to true")
    instances = options.num_distributed_optimizer_instances
    if instances > 1 and not options.use_distributed_optimizer:
        raise UserError(
            f"optimizer.num_distributed_optimizer_instances: {instances} needs optimizer.use_distributed_optimizer; "
            "set that to true"
        )
    if ranks % instances:
        possible = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(
            f"optimizer.num_distributed_optimizer_instances: {instances} does not divide the {ranks} ranks that share "
            f"the weights' updates; possible: {possible}"
        )


def _check_user_buffers(config: Config) -> None:
    if not config.parallel.sequence_parallel:
        raise UserError(
            f"{TP_OVERLAP}: needs parallel.sequence_parallel and parallel.tensor_model_parallel_size of 2 or more"
        )
    for key, precision in (
        ("training.precision", config.training.precision),
        ("reference.precision", reference_settings(config).precision),
    ):
        if precision == "fp32":
            raise UserError(f"{key}: fp32 has no place in the buffers of {TP_OVERLAP}; use bf16 or fp8")
    _check_for_fixed_shapes(config, TP_OVERLAP)


def _check_graphs(config: Config) -> None:
    model, training, kernels = config.model, config.training, config.kernels
    if kernels.cuda_graph_impl == "local" and kernels.cuda_graph_modules:
        raise UserError("kernels.cuda_graph_modules: local captures whole layers; leave it out")
    for key in ("hidden_dropout", "attention_dropout"):
        if getattr(model, key):
            raise UserError(f"model.{key}: must be 0 with {GRAPHS}, whose random numbers do not restart with each step")
    if training.recompute_granularity is not None:
        raise UserError(
            f"training.recompute_granularity: {training.recompute_granularity} recomputes what {GRAPHS} has captured; "
            "leave one of them out"
        )
    if training.precision == "fp8" and training.fp8_recipe == "delayed":
        raise UserError(f"training.fp8_recipe: delayed settles its scales before {GRAPHS} captures; use tensorwise")
    if kernels.cuda_graph_impl == "transformer_engine" and training.precision == "fp32":
        raise UserError(f"{GRAPHS}: transformer_engine captures in bf16; set training.precision so, or use local")
    _check_for_fixed_shapes(config, GRAPHS)


def _check_for_fixed_shapes(config: Config, key: str) -> None:
    if config.model.transformer_impl == "local":
        raise UserError(f"model.transformer_impl: {key} needs Transformer Engine's layers; use auto")
    if config.lora.dim is not None:
        raise UserError(f"{key}: not with lora.dim, whose adapters are no layers of Transformer Engine; leave one out")
    if config.logging.sample_interval:
        raise UserError(f"logging.sample_interval: draws token by token, {key} wants whole rows; set it to 0")
    if fixed_row_length(config) is None:
        longest, unit = resolve_architecture(config.model).max_position_embeddings, shared_multiple(config)
        raise UserError(
            f"data.pad_to_multiple_of: {config.data.pad_to_multiple_of} lets rows differ in length, {key} wants them "
            f"alike; with model.max_position_embeddings {longest} set it to {longest // unit * unit}"
        )
