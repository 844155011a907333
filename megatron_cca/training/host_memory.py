"""Check what a run keeps in host memory: a reference with ``offload``, or states of the optimizer."""

from tqdm import tqdm

from megatron_cca.config import Config, OptimizerConfig
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.platform.host_weights import available_host_bytes, local_world_size
from megatron_cca.training import reference_settings

_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}


def check_host_memory(config: Config) -> None:
    """Refuse a reference that waits in host memory and does not fit there.

    Raises:
        UserError: says what is needed and what is available.
    """
    parallel = config.parallel
    split = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    needed = _reference_bytes(config) // split * local_world_size()
    available = available_host_bytes()
    if needed > available:
        needed, available = (tqdm.format_sizeof(size, "iB", 1024) for size in (needed, available))
        raise UserError(
            f"reference.strategy: offload needs {needed} of host memory on this machine, {available} are available; "
            "use resident, cached or shared, or more tensor- or pipeline-parallel ranks"
        )


def check_optimizer_offload(options: OptimizerConfig) -> None:
    """Refuse keys that ``optimizer.optimizer_cpu_offload`` does not go with.

    Raises:
        UserError: names the key.
    """
    if not options.use_precision_aware_optimizer:
        raise UserError(
            "optimizer.optimizer_cpu_offload: needs optimizer.use_precision_aware_optimizer, without which "
            "Megatron-Core cannot resume it; set that to true"
        )
    if not options.optimizer_offload_fraction:
        raise UserError(
            "optimizer.optimizer_offload_fraction: 0 moves nothing; leave optimizer.optimizer_cpu_offload out"
        )
    for key in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(options, key) != "fp32":
            raise UserError(
                f"optimizer.{key}: {getattr(options, key)}, but optimizer.optimizer_cpu_offload keeps fp32; leave one "
                "of them out"
            )


def _reference_bytes(config: Config) -> int:
    architecture = resolve_architecture(config.model)
    weights, width = num_parameters(architecture), _BYTES[reference_settings(config).precision]
    head = architecture.vocabulary.output_size * architecture.hidden_size
    in_fp8 = weights - head if config.reference.fp8_param else 0
    return (weights - in_fp8) * width + in_fp8
