"""Refuse kernels, precisions, overlaps and CUDA graphs that a run cannot have, and report what its attention costs.

:func:`check_devices` needs the installed platform. All other checks can run before any process group is made. A run
that computes plainly (:func:`megatron_cca.training.computes_plainly`) needs none of them.
"""

from __future__ import annotations

from megatron_cca import platform
from megatron_cca.config import Config, TrainingConfig
from megatron_cca.errors import UserError, error_context
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, has_engine_attention, keeps_scores, unfused_because
from megatron_cca.training import (
    fixed_row_length,
    reference_settings,
    rows_per_microbatch,
    settings_by_key,
    shared_multiple,
)

TP_OVERLAP, GRAPHS = "parallel.tp_comm_overlap", "kernels.cuda_graph_impl"
_GIB = 2**30


def check_overlaps(config: Config, data_parallel: int) -> None:
    """Refuse overlaps, fusions and CUDA graphs that need other settings than the configuration has.

    Args:
        config: of the run.
        data_parallel: size of a data-parallel group, without context parallelism.

    Raises:
        UserError: the message names the key and what would be right.
    """
    if resolve_architecture(config.model).scales:
        from megatron_cca.models.pyramid import check_next_scale_kernels

        check_next_scale_kernels(config)
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


def check_fp8_sizes(config: Config, settings: TrainingConfig, key: str) -> None:
    """Refuse widths and rows that the FP8 matrix products of a model of this run cannot take.

    Args:
        config: of the run.
        settings: how the model computes: ``config.training``, or the result of ``reference_settings``.
        key: the key of its precision.

    Raises:
        UserError: the message names the dimension and what it must be a multiple of.
    """
    if settings.precision != "fp8":
        return
    if config.model.transformer_impl == "local":
        raise UserError(f"model.transformer_impl: {key} fp8 needs Transformer Engine's layers; use auto")
    # TE 2.11: common/gemm and pytorch/tensor/float8_blockwise_tensor.py.
    multiple = 128 if settings.fp8_recipe == "blockwise" else 16
    for name, size in _widths(resolve_architecture(config.model), config.parallel.tensor_model_parallel_size).items():
        if size % multiple:
            raise UserError(
                f"{key}: fp8 with recipe {settings.fp8_recipe} needs widths that are multiples of {multiple}; "
                f"{name} is {size}"
            )
    _check_fp8_tokens(config, multiple, key)


def check_devices(config: Config) -> None:
    """Refuse precisions, optimizer settings, kernels and a loader that need what this machine lacks.

    Raises:
        UserError: the message names the key and what is missing or does not fit.
    """
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    from megatron_cca.data.loader import loader_in_force
    from megatron_cca.models.fp8_devices import check_fp8_device
    from megatron_cca.models.layers import engine_is_available

    if config.data.loader is not None:
        loader_in_force(config.data.loader)
    for key, one in settings_by_key(config).items():
        if one.precision == "fp8":
            with error_context(key):
                check_fp8_device(one.fp8_recipe)
            check_fp8_sizes(config, one, key)
    _check_fork(config)
    if config.optimizer.optimizer_cpu_offload and not platform.current().is_cuda:
        raise UserError("optimizer.optimizer_cpu_offload: there is no GPU to offload from; leave it out")
    kernels, has_engine = config.kernels, engine_is_available()
    for key, is_wanted in (
        ("optimizer.use_precision_aware_optimizer", config.optimizer.use_precision_aware_optimizer),
        ("parallel.tp_comm_overlap", config.parallel.tp_comm_overlap),
        ("kernels.apply_rope_fusion", kernels.apply_rope_fusion),
        ("kernels.cuda_graph_impl", kernels.cuda_graph_impl != "none"),
    ):
        if is_wanted and not has_engine:
            raise UserError(
                f"{key}: needs a GPU and the package transformer-engine (pip install 'megatron-cca[gpu]'); leave it "
                "out here"
            )
    if kernels.gradient_accumulation_fusion:
        _check_gradient_fusion(config, has_engine)


def check_attention(config: Config) -> None:
    """Refuse context parallelism if the core attention is Transformer Engine's unfused one.

    Raises:
        UserError: the message names the key and what would be right.
    """
    if config.parallel.context_parallel_size == 1:
        return
    architecture = resolve_architecture(config.model)
    for key, one in settings_by_key(config).items():
        if keeps_scores(config.model, architecture, one.precision):
            raise UserError(
                f"model.transformer_impl: Transformer Engine has no fused attention for "
                f"{unfused_because(architecture.kv_channels, one.precision)}, and without it no context "
                f"parallelism ({key} is {one.precision}); use auto"
            )


def attention_lines(config: Config, *, has_engine: bool) -> list[str]:
    """Describe the core attention of each model of a run and its reason, with the bytes of scores that it keeps.

    Args:
        config: of the run.
        has_engine: whether Transformer Engine is installed and has a GPU.

    Returns:
        A line for each precision of the run. No lines if ``has_engine`` is false, since all layers are local then.
    """
    lines = []
    for one in settings_by_key(config).values():
        line = _line(config, one.precision) if has_engine else None
        if line is not None and line not in lines:
            lines.append(line)
    return lines


def scores_bytes(config: Config, precision: str) -> float:
    """Return the bytes of a rank's attention scores ``[rows, heads, S, S]``: all its layers, one full microbatch."""
    architecture, parallel = resolve_architecture(config.model), config.parallel
    length = fixed_row_length(config) or architecture.max_position_embeddings
    heads = architecture.num_attention_heads / parallel.tensor_model_parallel_size
    layers = architecture.num_layers / parallel.pipeline_model_parallel_size
    return (4 if precision == "fp32" else 2) * rows_per_microbatch(config) * heads * layers * length**2


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


def _widths(architecture: Architecture, tensor_parallel: int) -> dict[str, int]:
    """Return the numbers of rows and columns of every matrix product on one rank."""
    rows = architecture.query_projection_size + 2 * architecture.kv_projection_size
    on = f" on each of {tensor_parallel} tensor-parallel ranks" if tensor_parallel > 1 else ""
    return {
        "model.hidden_size": architecture.hidden_size,
        f"the width of queries, keys and values{on}": rows // tensor_parallel,
        f"the width of the heads{on}": architecture.query_projection_size // tensor_parallel,
        f"model.ffn_hidden_size{on}": architecture.ffn_hidden_size // tensor_parallel,
    }


def _check_fp8_tokens(config: Config, multiple: int, key: str) -> None:
    parallel = config.parallel
    rows = rows_per_microbatch(config)
    ranks = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    tokens = config.data.pad_to_multiple_of * rows
    unit = multiple * ranks
    if tokens % unit:
        smallest = next(n for n in range(1, unit + 1) if n * rows % unit == 0)
        raise UserError(
            f"data.pad_to_multiple_of: {config.data.pad_to_multiple_of}, but {key} fp8 needs microbatches whose tokens "
            f"are a multiple of {multiple} on each rank; with {rows} rows use a multiple of {smallest}"
        )


def _check_fork(config: Config) -> None:
    offloads = config.objective.needs_reference and config.reference.strategy == "offload"
    if platform.current().is_cuda and config.training.async_save and offloads:
        raise UserError(
            "training.async_save: true forks a process at each save, which either lacks or copies the host memory that "
            "CUDA has locked for reference.strategy offload; leave training.async_save out, or keep the reference "
            "otherwise"
        )


def _check_gradient_fusion(config: Config, has_engine: bool) -> None:
    from megatron_cca.megatron_compat.layers import apex_fuses_gradients

    uses_engine = has_engine and config.model.transformer_impl != "local"
    has_apex = platform.current().is_cuda and apex_fuses_gradients()
    if not (uses_engine or has_apex):
        raise UserError(
            "kernels.gradient_accumulation_fusion: needs a GPU and Transformer Engine's layers, or apex with "
            "fused_weight_gradient_mlp_cuda; leave it out here"
        )


def _line(config: Config, precision: str) -> str:
    architecture, impl = resolve_architecture(config.model), config.model.transformer_impl
    if impl == "local":
        return "layers: local; attention: torch's (model.transformer_impl is local)"
    if architecture.scales:
        return "layers: Transformer Engine's; attention: torch's, scale by scale"
    channels = architecture.kv_channels
    reason = unfused_because(channels, precision)
    if not has_engine_attention(impl, channels, precision):
        return f"layers: Transformer Engine's; attention: torch's, for want of a fused one there for {reason}"
    if reason is None:
        return "layers and attention: Transformer Engine's"
    scores = scores_bytes(config, precision)
    return (
        f"layers and attention: Transformer Engine's, which is not fused for {reason}: a microbatch's scores take "
        f"{scores / _GIB:.2f} GiB on each rank until its backward pass; model.transformer_impl=auto keeps none"
    )
