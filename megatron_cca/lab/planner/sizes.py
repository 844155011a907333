"""What a rank has of a run: layers, rows, tokens, microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_cca.config import Config, ModelConfig
from megatron_cca.lab.planner.flops import products
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, padded_vocab_size
from megatron_cca.parallel.tile_sizes import own_part
from megatron_cca.training.checks import data_parallel_size
from megatron_cca.training.shapes import head_support, rows_per_sample


@dataclass(frozen=True)
class Sizes:
    """A rank of the last pipeline stage, which has most to do: its layers and the LM head.

    Attributes:
        architecture: of the model.
        tensor, pipeline, context, data: the parallel sizes.
        chunks: model chunks on a rank.
        layers: on a rank.
        rows: in a microbatch.
        microbatches: of a rank in a step.
        tokens: of a microbatch on one context-parallel rank.
        image_tokens: of those, the ones that pass through the head.
        seq_length: S.
        layer_weights: numbers in one layer's projections on one rank.
        head_weights: numbers in the head's rows on one rank.
        words: words of the head that are computed, on the tensor-parallel rank that has most.
    """

    architecture: Architecture
    tensor: int
    pipeline: int
    context: int
    data: int
    chunks: int
    layers: int
    rows: int
    microbatches: int
    tokens: float
    image_tokens: float
    seq_length: int
    layer_weights: float
    head_weights: float
    words: float

    @property
    def trained_weights(self) -> float:
        """Numbers on the rank that are trained where all are: layers, head, and on a single stage the embedding."""
        embeddings = 2 if self.pipeline == 1 else 1
        return self.layers * self.layer_weights + embeddings * self.head_weights


@lru_cache
def architecture_of(model: ModelConfig) -> Architecture:
    """:func:`resolve_architecture`, remembered: a search asks for it at every candidate."""
    return resolve_architecture(model)


def sizes_of(config: Config, world_size: int, workload: Workload) -> Sizes:
    """Of a configuration that ``training.checks.check_new_run`` accepts on ``world_size`` processes."""
    architecture, parallel, training = architecture_of(config.model), config.parallel, config.training
    tensor, pipeline, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    data = data_parallel_size(config, world_size)
    rows = training.micro_batch_size * rows_per_sample(config)
    vocabulary = padded_vocab_size(architecture, config.model, tensor)
    return Sizes(
        architecture=architecture,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        layers=architecture.num_layers // pipeline,
        rows=rows,
        microbatches=training.global_batch_size // (training.micro_batch_size * data),
        tokens=rows * workload.seq_length / context,
        image_tokens=rows * workload.image_tokens / context,
        seq_length=workload.seq_length,
        layer_weights=sum(product.weights for product in products(architecture)) / tensor,
        head_weights=vocabulary * architecture.hidden_size / tensor,
        words=_words(config, architecture, vocabulary // tensor),
    )


def _words(config: Config, architecture: Architecture, rows: int) -> float:
    tensor, support = config.parallel.tensor_model_parallel_size, head_support(config, architecture.vocabulary)
    if len(support) == architecture.vocabulary.output_size:
        # The last rank has a little less, for the padding.
        return len(support) / tensor
    return max(len(own_part(support, rank * rows, rows)) for rank in range(tensor))
