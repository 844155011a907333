"""Check that the host can hold what ``reference.strategy: offload`` keeps there."""

from tqdm import tqdm

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.platform.transfers import available_host_bytes, local_world_size
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


def _reference_bytes(config: Config) -> int:
    architecture = resolve_architecture(config.model)
    weights, width = num_parameters(architecture), _BYTES[reference_settings(config).precision]
    head = architecture.vocabulary.output_size * architecture.hidden_size
    in_fp8 = weights - head if config.reference.fp8_param else 0
    return (weights - in_fp8) * width + in_fp8
