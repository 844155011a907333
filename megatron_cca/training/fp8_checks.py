"""Which sizes FP8 products can take; no Transformer Engine is needed to know."""

from __future__ import annotations

from megatron_cca.config import Config, TrainingConfig
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture
from megatron_cca.training.shapes import rows_per_microbatch


def check_fp8_sizes(config: Config, settings: TrainingConfig, key: str) -> None:
    """Refuse widths and rows that the FP8 products of a model of this run cannot take.

    Args:
        config: of the run.
        settings: how the model computes: ``config.training``, or what ``reference_settings`` says.
        key: where its precision is configured.

    Raises:
        UserError: names the dimension and what it must be a multiple of.
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


def _widths(architecture: Architecture, tensor_parallel: int) -> dict[str, int]:
    """Rows and columns of every product on one rank."""
    head = architecture.kv_channels
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
