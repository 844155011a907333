"""The parameters of a rank, by name and size, in the order in which Megatron's GPTModel holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.flops import Product, products
from megatron_cca.lab.planner.sizes import architecture_of
from megatron_cca.models.architecture import padded_vocab_size


@dataclass(frozen=True)
class Parameter:
    """A tensor of a rank.

    Attributes:
        name: within its layer, or of the whole model.
        numel: its numbers on this rank.
        columns: of these in a row; None for a norm, which is no matrix.
        is_trained: whether it has a gradient.
    """

    name: str
    numel: int
    columns: int | None
    is_trained: bool


def rank_parameters(config: Config, pipeline_rank: int) -> list[list[Parameter]]:
    """Of every model chunk of a pipeline rank."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    return [list(_chunk(config, pipeline_rank, chunk, chunks)) for chunk in range(chunks)]


def reference_parameters(config: Config, pipeline_rank: int) -> list[Parameter]:
    """Of a frozen copy, which has no adapters."""
    chunks = rank_parameters(config, pipeline_rank)
    return [parameter for chunk in chunks for parameter in chunk if not parameter.name.startswith(_ADAPTER)]


_ADAPTER = "adapter."


def _chunk(config: Config, pipeline_rank: int, chunk: int, chunks: int) -> Iterator[Parameter]:
    architecture, parallel = architecture_of(config.model), config.parallel
    hidden, stages = architecture.hidden_size, parallel.pipeline_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    is_trained = config.lora.dim is None
    rows = padded_vocab_size(architecture, config.model, tensor) // tensor
    if pipeline_rank == 0 and chunk == 0:
        yield Parameter("word_embeddings", rows * hidden, hidden, is_trained)
    for _ in range(architecture.num_layers // (stages * chunks)):
        yield from _layer(config)
    if pipeline_rank == stages - 1 and chunk == chunks - 1:
        yield Parameter("final_layernorm", hidden, None, is_trained)
        yield Parameter("output_layer", rows * hidden, hidden, is_trained)


def _layer(config: Config) -> Iterator[Parameter]:
    architecture, is_trained = architecture_of(config.model), config.lora.dim is None
    # Megatron makes linear_proj before linear_qkv.
    qkv, proj, fc1, fc2 = products(architecture)
    for norm, pair in (("input_layernorm", (proj, qkv)), ("pre_mlp_layernorm", (fc1, fc2))):
        yield Parameter(norm, architecture.hidden_size, None, is_trained)
        for product in pair:
            inputs, outputs = _on_a_rank(product, config)
            yield Parameter(product.name, inputs * outputs, inputs, is_trained)
            yield from _adapter(config, product)


def _adapter(config: Config, product: Product) -> Iterator[Parameter]:
    dim = config.lora.dim
    if dim is None or product.name not in config.lora.target_modules:
        return
    inputs, outputs = _on_a_rank(product, config)
    yield Parameter(f"{_ADAPTER}linear_in", dim * inputs, inputs, True)
    yield Parameter(f"{_ADAPTER}linear_out", outputs * dim, dim, True)


def _on_a_rank(product: Product, config: Config) -> tuple[int, int]:
    """Its inputs and outputs, one of them divided by tensor parallelism."""
    tensor = config.parallel.tensor_model_parallel_size
    if product.splits_outputs:
        return product.inputs, product.outputs // tensor
    return product.inputs // tensor, product.outputs
