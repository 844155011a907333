"""What a run's reference is refused for before any process group is made."""

from __future__ import annotations

from tqdm import tqdm

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import num_parameters
from megatron_cca.platform.transfers import available_host_bytes, local_world_size
from megatron_cca.training.reference_settings import reference_settings, same_weights

_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}


def check_reference(config: Config) -> None:
    """Refuse a reference that cannot be had.

    Raises:
        UserError: names the key.
    """
    own, strategy = config.reference, config.reference.strategy
    if strategy == "shared":
        _check_shared(config)
    if strategy == "cached" and own.cache is None:
        raise UserError(
            "reference.cache: missing; compute the log-probabilities with tools/cache_reference.py and name its folder"
        )
    if strategy != "cached" and own.cache is not None:
        raise UserError(f"reference.cache: of no use with reference.strategy {strategy}; set that to cached")
    if strategy == "offload":
        _check_host_memory(config)


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


def _check_host_memory(config: Config) -> None:
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
    in_fp8 = weights - architecture.vocabulary.size * architecture.hidden_size if config.reference.fp8_param else 0
    return (weights - in_fp8) * width + in_fp8
