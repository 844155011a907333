"""What a run is refused for on this machine's device; the platform must be installed."""

from __future__ import annotations

from megatron.core.tensor_parallel import layers

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data.sequence_feed import loader_in_force
from megatron_cca.errors import UserError, said_of
from megatron_cca.models.layer_specs import check_fp8_device, engine_is_available
from megatron_cca.training.fp8_checks import check_fp8_sizes
from megatron_cca.training.reference_settings import settings_by_key


def check_devices(config: Config) -> None:
    """Refuse precisions, optimizer settings and a loader that need what is not here.

    Raises:
        UserError: names the key and what is missing or does not fit.
    """
    if config.data.loader is not None:
        loader_in_force(config.data.loader)
    for key, one in settings_by_key(config).items():
        if one.precision == "fp8":
            with said_of(key):
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


def _check_fork(config: Config) -> None:
    offloads = config.objective.needs_reference and config.reference.strategy == "offload"
    if platform.current().is_cuda and config.training.async_save and offloads:
        raise UserError(
            "training.async_save: true forks a process at each save, which either lacks or copies the host memory that "
            "CUDA has locked for reference.strategy offload; leave training.async_save out, or keep the reference "
            "otherwise"
        )


def _check_gradient_fusion(config: Config, has_engine: bool) -> None:
    uses_engine = has_engine and config.model.transformer_impl != "local"
    has_apex = platform.current().is_cuda and layers._grad_accum_fusion_available
    if not (uses_engine or has_apex):
        raise UserError(
            "kernels.gradient_accumulation_fusion: needs a GPU and Transformer Engine's layers, or apex with "
            "fused_weight_gradient_mlp_cuda; leave it out here"
        )
