"""What a run's reference is refused for before any process group is made."""

from __future__ import annotations

from tqdm import tqdm

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import num_parameters
from megatron_cca.platform.transfers import available_host_bytes, local_world_size
from megatron_cca.training.reference_settings import dropout_key, has_own_weights, reference_settings, same_weights

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
    check_dropout(config)


def check_dropout(config: Config) -> None:
    """Refuse dropout where policy and reference are compared, unless it was asked for beyond doubt.

    The two passes draw masks of their own, as in the code of CCA's authors: the log-ratio is then noisy, and not 0
    where the weights are the same. Whoever wants their recipe says so with ``reference.allow_bias``, and step 0 says
    how much it is. A cache serves any layout, but masks are drawn by place, and the one draw that it holds would
    stand for a model; a shared reference promises to compute as the policy does. Neither can have it.

    Raises:
        UserError: names the key.
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
    head = architecture.vocabulary.output_size * architecture.hidden_size
    in_fp8 = weights - head if config.reference.fp8_param else 0
    return (weights - in_fp8) * width + in_fp8
