"""A GPTModel whose images have an embedding and a head of their own, beside the words' (Janus, arXiv 2410.13848).

An id below the number of codes is a code. Its embedding is small, and a network of two layers makes it as wide as the
residual stream. Every other id is a word. The head predicts codes alone. It begins with a layer of its own.

Both networks are whole on every tensor-parallel rank, since they are small. Under sequence parallelism each rank
computes them for its own positions, and Megatron sums the gradients of what is marked ``sequence_parallel``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.layers import add_bias, plain_logits


def _whole(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    """Return an uninitialised parameter that every tensor-parallel rank has whole."""
    parameter = torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class CodeAndWordEmbedding(MegatronModule):
    """The embeddings of codes and of words.

    Args:
        config: of the model.
        architecture: of the model.
        num_words: rows of the table of words, padding included.
    """

    def __init__(self, config: TransformerConfig, architecture: Architecture, num_words: int) -> None:
        super().__init__(config)
        # Megatron asks this of an embedding: its rows are this rank's part.
        self.scatter_to_sequence_parallel = config.sequence_parallel
        self.num_codes, size = architecture.vocabulary.codebook_size, config.hidden_size
        channels = architecture.image_embedding_channels
        self.word_embeddings = VocabParallelEmbedding(
            num_words,
            size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        self.image_embeddings = _whole(config, self.num_codes, channels)
        self.image_fc1_weight, self.image_fc1_bias = _whole(config, size, channels), _whole(config, size)
        self.image_fc2_weight, self.image_fc2_bias = _whole(config, size, size), _whole(config, size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the embeddings of ids int64 ``[B, S]``, ``[S, B, H]``.

        Under sequence parallelism, the result is this rank's part of S.
        """
        words = self.word_embeddings((input_ids - self.num_codes).clamp(min=0))
        if self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            input_ids = input_ids.chunk(group.size(), dim=1)[group.rank()]
        else:
            words = words.transpose(0, 1)
        ids = input_ids.t()
        codes = embedding(ids.clamp(max=self.num_codes - 1), self.image_embeddings)
        inner = gelu(linear(codes, self.image_fc1_weight, self.image_fc1_bias))
        images = linear(inner, self.image_fc2_weight, self.image_fc2_bias)
        return torch.where((ids < self.num_codes)[..., None], images, words).contiguous()


class ImageHead(MegatronModule):
    """What comes before the product with the codes' rows: a linear layer and a GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.fc_weight = _whole(config, config.hidden_size, config.hidden_size)
        self.fc_bias = _whole(config, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the head multiplies, for hidden states of the same shape."""
        return gelu(linear(hidden, self.fc_weight, self.fc_bias))


class ImageHeadModel(GPTModel):
    """Megatron's GPTModel with both embeddings, and with the head of images."""

    # See initialization.py.
    first_values: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = {"bias": torch.zeros_like}

    def prepare(self, architecture: Architecture, num_words: int) -> None:
        """Replace the embedding, and complete the head. Call it once, after the construction.

        Args:
            architecture: of the model.
            num_words: rows of the table of words, padding included.
        """
        if self.pre_process:
            self.embedding = CodeAndWordEmbedding(self.config, architecture, num_words)
        if self.post_process:
            self.image_head = ImageHead(self.config)
            add_bias(self.output_layer)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        output_processor: Callable[..., Tensor] | None = None,
        **more: Any,
    ) -> Tensor:
        """Do what GPTModel does, with the head's own layer before its product."""

        def head(*, hidden_states: Tensor, **rest: Any) -> Tensor:
            return (output_processor or plain_logits)(hidden_states=self.image_head(hidden_states), **rest)

        return super().forward(input_ids, position_ids, attention_mask, output_processor=head, **more)
