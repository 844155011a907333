"""What a run's reference and precisions are refused for before any process group is made."""

from __future__ import annotations

from tqdm import tqdm

from megatron_cca.config import Config, TrainingConfig
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, num_parameters
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


def check_fp8(config: Config) -> None:
    """Refuse sizes that FP8 products cannot take, for the policy and, where it is another model, the reference.

    Raises:
        UserError: names the dimension and what it must be a multiple of.
    """
    _check_fp8_sizes(config, config.training, "training.precision")
    if config.objective.name != "next_token":
        _check_fp8_sizes(config, reference_settings(config), "reference.precision")


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


def _check_fp8_sizes(config: Config, settings: TrainingConfig, key: str) -> None:
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


def _widths(architecture: Architecture, tensor_parallel: int) -> dict[str, int]:
    """Rows and columns of every product on one rank."""
    head = architecture.hidden_size // architecture.num_attention_heads
    rows = (architecture.num_attention_heads + 2 * architecture.num_query_groups) * head
    on = f" on each of {tensor_parallel} tensor-parallel ranks" if tensor_parallel > 1 else ""
    return {
        "model.hidden_size": architecture.hidden_size,
        f"the width of queries, keys and values{on}": rows // tensor_parallel,
        f"the width of the heads{on}": architecture.hidden_size // tensor_parallel,
        f"model.ffn_hidden_size{on}": architecture.ffn_hidden_size // tensor_parallel,
    }


def _check_fp8_tokens(config: Config, multiple: int, key: str) -> None:
    parallel = config.parallel
    rows = config.training.micro_batch_size * (1 if config.objective.name == "next_token" else 2)
    ranks = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    tokens = config.data.pad_to_multiple_of * rows
    unit = multiple * ranks
    if tokens % unit:
        smallest = next(n for n in range(1, unit + 1) if n * rows % unit == 0)
        raise UserError(
            f"data.pad_to_multiple_of: {config.data.pad_to_multiple_of}, but {key} fp8 needs microbatches whose tokens "
            f"are a multiple of {multiple} on each rank; with {rows} rows use a multiple of {smallest}"
        )
