"""The parameters of a rank, each with a name and a size, in the order of Megatron's GPTModel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_cca.config import Config, ModelConfig
from megatron_cca.lab.planner.workload import Product, head_row_products, products, row_products
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, padded_output_size, padded_vocab_size
from megatron_cca.models.num_parameters import image_parameters
from megatron_cca.models.pyramid import num_codes
from megatron_cca.models.scale_features import NUM_CONVOLUTIONS

_ADAPTER = "adapter."
# Taps of a convolution of the pyramid's features.
_KERNEL = 3 * 3


@dataclass(frozen=True)
class Parameter:
    """A parameter tensor on one rank.

    Attributes:
        name: its name within the layer, or within the whole model.
        numel: number of elements on this rank.
        columns: elements of one row; None for what is no matrix of a product, such as a norm or a bias.
        is_trained: whether it has a gradient.
    """

    name: str
    numel: int
    columns: int | None
    is_trained: bool


@lru_cache
def architecture_of(model: ModelConfig) -> Architecture:
    """Return the result of :func:`resolve_architecture` from a cache.

    A search asks for it at every candidate.
    """
    return resolve_architecture(model)


def rank_parameters(config: Config, pipeline_rank: int) -> list[list[Parameter]]:
    """Return the parameters of each model chunk of a pipeline rank."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    return [list(_chunk(config, pipeline_rank, chunk, chunks)) for chunk in range(chunks)]


def reference_parameters(config: Config, pipeline_rank: int) -> list[Parameter]:
    """Return the parameters of the frozen copy on a pipeline rank.

    The frozen copy has no adapters.
    """
    return [one for chunk in rank_parameters(config, pipeline_rank) for one in _without_adapters(chunk)]


def frozen_numbers(architecture: Architecture) -> int:
    """Return the number of elements in fp32 that each copy of the model keeps beside its parameters.

    Next-scale prediction has the codebook and the convolutions of its image tokenizer.
    """
    if not architecture.scales:
        return 0
    channels = architecture.feature_channels
    return architecture.vocabulary.codebook_size * channels + NUM_CONVOLUTIONS * channels * (_KERNEL * channels + 1)


def embedding_parameters(config: Config) -> list[Parameter]:
    """Return the parameters before the layers."""
    architecture, is_trained = architecture_of(config.model), config.lora.dim is None
    hidden, scales = architecture.hidden_size, architecture.scales
    if not scales:
        rows = _on_tensor_ranks(padded_vocab_size, config)
        words = Parameter("word_embeddings", rows * hidden, hidden, is_trained)
        return [*_of_images(config, "image_"), words]
    # Every rank has them whole.
    rows = {
        "classes": architecture.vocabulary.size - architecture.vocabulary.output_size,
        "start": scales[0] ** 2,
        "positions": num_codes(scales),
        "levels": len(scales),
        "feature_weight": architecture.feature_channels,
        "feature_bias": 1,
    }
    return [Parameter(name, number * hidden, None, is_trained) for name, number in rows.items()]


def head_parameters(config: Config) -> list[Parameter]:
    """Return the parameters behind the layers."""
    architecture, is_trained = architecture_of(config.model), config.lora.dim is None
    hidden, rows = architecture.hidden_size, _on_tensor_ranks(padded_output_size, config)
    weight = Parameter("output_layer", rows * hidden, hidden, is_trained)
    bias = Parameter("output_layer.bias", rows, None, is_trained)
    if architecture.scales:
        return [weight, bias, *_with_biases(config, head_row_products(architecture))]
    own = [bias, *_of_images(config, "fc_")] if architecture.image_embedding_channels else []
    return [Parameter("final_layernorm", hidden, None, is_trained), weight, *own]


def layer_parameters(config: Config) -> list[Parameter]:
    """Return the parameters of one layer without adapters."""
    return _without_adapters(_layer(config))


def _chunk(config: Config, pipeline_rank: int, chunk: int, chunks: int) -> Iterator[Parameter]:
    architecture, stages = architecture_of(config.model), config.parallel.pipeline_model_parallel_size
    if pipeline_rank == 0 and chunk == 0:
        yield from embedding_parameters(config)
    layer = list(_layer(config))
    for _ in range(architecture.num_layers // (stages * chunks)):
        yield from layer
    if pipeline_rank == stages - 1 and chunk == chunks - 1:
        yield from head_parameters(config)


def _without_adapters(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [one for one in parameters if not one.name.startswith(_ADAPTER)]


def _layer(config: Config) -> Iterator[Parameter]:
    return _modulated_layer(config) if architecture_of(config.model).scales else _decoder_layer(config)


def _decoder_layer(config: Config) -> Iterator[Parameter]:
    architecture, is_trained = architecture_of(config.model), config.lora.dim is None
    # Megatron makes linear_proj before linear_qkv.
    qkv, proj, fc1, fc2 = products(architecture)
    for norm, pair in (("input_layernorm", (proj, qkv)), ("pre_mlp_layernorm", (fc1, fc2))):
        yield Parameter(norm, architecture.hidden_size, None, is_trained)
        for product in pair:
            inputs, outputs = _on_a_rank(product, config)
            yield Parameter(product.name, inputs * outputs, inputs, is_trained)
            if product is qkv and architecture.add_qkv_bias:
                yield Parameter(f"{product.name}.bias", outputs, None, is_trained)
            yield from _adapter(config, product)
            if product is qkv and architecture.qk_layernorm:
                # Every rank has them whole.
                yield from (Parameter(f"{own}_layernorm", architecture.kv_channels, None, is_trained) for own in "qk")


def _modulated_layer(config: Config) -> Iterator[Parameter]:
    architecture, is_trained = architecture_of(config.model), config.lora.dim is None
    heads = architecture.num_attention_heads // config.parallel.tensor_model_parallel_size
    qkv, proj, fc1, fc2 = products(architecture)
    yield from _with_biases(config, (proj, qkv))
    yield Parameter("log_sharpness", heads, None, is_trained)
    yield from _with_biases(config, (fc1, fc2, *row_products(architecture)))


def _with_biases(config: Config, of_products: tuple[Product, ...]) -> Iterator[Parameter]:
    is_trained = config.lora.dim is None
    for product in of_products:
        inputs, outputs = _on_a_rank(product, config)
        yield Parameter(product.name, inputs * outputs, inputs, is_trained)
        yield Parameter(f"{product.name}.bias", outputs, None, is_trained)
        yield from _adapter(config, product)


def _adapter(config: Config, product: Product) -> Iterator[Parameter]:
    dim = config.lora.dim
    if dim is None or product.name not in config.lora.target_modules:
        return
    inputs, outputs = _on_a_rank(product, config)
    yield Parameter(f"{_ADAPTER}linear_in", dim * inputs, inputs, True)
    yield Parameter(f"{_ADAPTER}linear_out", outputs * dim, dim, True)


def _on_a_rank(product: Product, config: Config) -> tuple[int, int]:
    """Return the product's inputs and outputs on one rank; tensor parallelism divides one of them."""
    tensor = config.parallel.tensor_model_parallel_size
    if product.splits_outputs:
        return product.inputs, product.outputs // tensor
    return product.inputs // tensor, product.outputs


def _of_images(config: Config, prefix: str) -> list[Parameter]:
    """Return those of the images' own parameters that every rank has whole and whose names begin so."""
    found = image_parameters(architecture_of(config.model))
    return [
        Parameter(name, size, None, config.lora.dim is None) for name, size in found.items() if name.startswith(prefix)
    ]


def _on_tensor_ranks(padded: Callable[[Architecture, ModelConfig, int], int], config: Config) -> int:
    """Return the rows of the words' embedding, or of the head, on one rank."""
    tensor = config.parallel.tensor_model_parallel_size
    return padded(architecture_of(config.model), config.model, tensor) // tensor
