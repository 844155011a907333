"""Next-scale prediction (VAR, arXiv 2404.02905) by Megatron's GPTModel: a pyramid of code grids, one scale at a time.

A row is the class, then the codes of all scales. Position i predicts code i, as in any row. All codes of a scale are
predicted together: each sees its own scale's positions and those of smaller scales. The input of a position is no
embedding of the token before it. It is the picture so far, made of all codes of smaller scales, at this scale's size.

The class modulates each layer (AdaLN). It travels as Megatron's ``context``, which recomputation knows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear, te_checkpoint
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention, silu

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.layers import add_bias, plain_logits
from megatron_cca.models.scale_features import ScaleFeatures

_LARGEST_LOG_SHARPNESS = math.log(100)
# Factors of weights at the beginning of training, the authors' defaults (``VAR.init_weights``).
_MODULATION, _GATE, _HEAD = 0.5, 1e-5, 0.02


def block_options() -> dict[str, Any]:
    """Return the options of Megatron's ``TransformerConfig`` that differ from a decoder's."""
    return {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": _gelu_tanh,
        "add_bias_linear": True,
        # Megatron has no fused kernel for this activation, and refuses to build the layers with one.
        "bias_activation_fusion": False,
        # With qk_layernorm, Megatron would sum the gradient of the sharpness over ranks that have different heads.
        "qk_l2_norm": True,
        # The keys and queries have unit length, and the queries' learned sharpness.
        "softmax_scale": 1.0,
    }


def block_spec(num_layers: int, scales: tuple[int, ...], *, is_local: bool) -> TransformerBlockSubmodules:
    """Return the spec of the layers: Megatron's attention and MLP, with its own products or Transformer Engine's.

    Args:
        num_layers: of this pipeline stage.
        scales: sides of the pyramid's grids.
        is_local: whether the products are Megatron's own.
    """
    columns, rows = (
        (ColumnParallelLinear, RowParallelLinear) if is_local else (TEColumnParallelLinear, TERowParallelLinear)
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=columns,
        core_attention=partial(ScaleAttention, scales=scales),
        linear_proj=rows,
        q_layernorm=SharpQueries,
        k_layernorm=UnitKeys,
    )
    feed_forward = MLPSubmodules(linear_fc1=columns, linear_fc2=rows)
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=attention
        ),
        mlp=partial(MLP.as_mlp_submodule, submodules=feed_forward),
    )
    # No norm at the end: the head has its own, which the class modulates.
    return TransformerBlockSubmodules(layer_specs=[ModuleSpec(module=ModulatedLayer, submodules=layer)] * num_layers)


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


class ScaleAttention(torch.nn.Module):
    """Core attention of positions that see their own scale and smaller ones. No mask is needed, scale by scale."""

    def __init__(self, config, *, scales: tuple[int, ...], softmax_scale: float | None = None, **_unused) -> None:
        super().__init__()
        self.dropout, self.softmax_scale = config.attention_dropout, softmax_scale
        self.ends = _ends(scales)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_unused) -> Tensor:
        """Compute attention ``[S, B, heads * D]`` of queries, keys and values ``[S, B, heads, D]``.

        Positions after the last scale are padding. Their output is zero.
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        outputs, start = [], 0
        for end in self.ends:
            if start >= query.size(2):
                break
            seen = (query[:, :, start:end], key[:, :, :end], value[:, :, :end])
            dropout = self.dropout if self.training else 0.0
            outputs.append(scaled_dot_product_attention(*seen, dropout_p=dropout, scale=self.softmax_scale))
            start = end
        outputs.append(torch.zeros_like(query[:, :, start:]))
        return torch.cat(outputs, 2).permute(2, 0, 1, 3).flatten(2)


class UnitKeys(torch.nn.Module):
    """The keys with unit length. It takes the place of Megatron's norm of keys."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-5) -> None:
        super().__init__()

    def forward(self, key: Tensor) -> Tensor:
        """Normalise ``[S, B, heads, D]`` over the last dimension."""
        return normalize(key, dim=-1)


class SharpQueries(MegatronModule):
    """The queries with unit length, times a learned sharpness of each head, at most 100."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-5) -> None:
        super().__init__(config)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.log_sharpness = torch.nn.Parameter(torch.empty(heads, 1, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.log_sharpness, True, 0, 1)

    def forward(self, query: Tensor) -> Tensor:
        """Normalise ``[S, B, heads, D]`` over the last dimension, and multiply."""
        sharpness = self.log_sharpness.clamp(max=_LARGEST_LOG_SHARPNESS).exp()
        return normalize(query, dim=-1) * sharpness

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return this rank's heads of the sharpness, as Megatron's modules do."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"log_sharpness": 0}, sharded_offsets)


class Modulation(MegatronModule):
    """Vectors for AdaLN, by a linear map of the class's vector that is split over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, parts: int) -> None:
        super().__init__(config)
        # The class's vector is whole on every rank. Only rows are split over the sequence.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        size = config.hidden_size
        self.parts, self.gathers_parts_of_gradients = parts, config.sequence_parallel
        self.linear = ColumnParallelLinear(
            size, parts * size, config=whole, init_method=config.init_method, bias=True, gather_output=False
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return ``parts`` tensors ``[B, H]`` for the classes' vectors ``[B, H]``."""
        own, _ = self.linear(silu(condition))
        # Under sequence parallelism, each rank has the gradient of its own rows alone. Otherwise all ranks have all.
        rows = gather_from_sequence_parallel_region(
            own.t().contiguous(), tensor_parallel_output_grad=self.gathers_parts_of_gradients
        )
        return tuple(part.t() for part in rows.chunk(self.parts))


def modulated(hidden: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """Return ``LN(hidden) * (1 + scale) + shift`` of ``[S, B, H]`` and ``[B, H]``. The norm has no weights."""
    return layer_norm(hidden, hidden.shape[-1:], eps=epsilon) * (1 + scale) + shift


class ModulatedLayer(TransformerLayer):
    """A layer whose two halves are scaled, shifted and weighted by the class (AdaLN). Megatron's attention and MLP."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **more: Any) -> None:
        super().__init__(config, *arguments, **more)
        self.modulation = Modulation(config, 6)
        _freeze_key_bias(self.self_attention)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None, **_unused
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states ``[S, B, H]`` after this layer, and the classes' vectors ``[B, H]`` as they came."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(context)
        epsilon = self.config.layernorm_epsilon
        attended, bias = self.self_attention(modulated(hidden_states, scale1, shift1, epsilon), attention_mask)
        hidden_states = hidden_states + gamma1 * (attended + bias)
        inner = modulated(hidden_states, scale2, shift2, epsilon)
        result = self.recomputed_feed_forward(inner) if self.recompute_mlp else self.feed_forward(inner)
        return hidden_states + gamma2 * result, context

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP's result with its bias, ``[S, B, H]``."""
        # The sum of both. Megatron's checkpoint may return no bias: autograd would take the parameter for a result of
        # the checkpoint, and recompute without end.
        result, bias = self.mlp(hidden)
        return result + bias

    def recomputed_feed_forward(self, hidden: Tensor) -> Tensor:
        """Return the same. Backward computes it once more, so that nothing in between is kept."""
        if self.config.fp8:
            # Megatron's own checkpoint does not know FP8: its second products would be bf16's.
            return te_checkpoint(self.feed_forward, False, get_cuda_rng_tracker, self.pg_collection.tp, hidden)
        return checkpoint(self.feed_forward, False, hidden)


def _freeze_key_bias(attention: torch.nn.Module) -> None:
    """Keep the keys' bias at zero: in Megatron's one bias of queries, keys and values, VAR has none for keys."""
    channels = attention.hidden_size_per_attention_head
    bias = attention.linear_qkv.bias

    def without_keys(gradient: Tensor) -> Tensor:
        parts = gradient.clone().view(-1, 3, channels)
        parts[:, 1] = 0
        return parts.view_as(gradient)

    if bias.requires_grad:
        bias.register_hook(without_keys)


class ScaleEmbedding(MegatronModule):
    """The inputs of all positions: the class for the first scale, the picture so far for the others."""

    def __init__(self, config: TransformerConfig, architecture: Architecture) -> None:
        super().__init__(config)
        self.scales, size = architecture.scales, config.hidden_size
        vocabulary = architecture.vocabulary
        self.first_class = vocabulary.codebook_size

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))

        self.classes = parameter(vocabulary.num_classes + 1, size)
        self.start = parameter(self.scales[0] ** 2, size)
        self.positions = parameter(_ends(self.scales)[-1], size)
        self.levels = parameter(len(self.scales), size)
        self.feature_weight = parameter(size, architecture.feature_channels)
        self.feature_bias = parameter(size)
        self.features = ScaleFeatures(vocabulary.codebook_size, architecture.feature_channels, self.scales)
        # Megatron asks this of an embedding. Here the rows are split below.
        self.scatter_to_sequence_parallel = config.sequence_parallel

    def condition(self, ids: Tensor) -> Tensor:
        """Return the classes' vectors ``[B, H]`` of rows int64 ``[B, S]``."""
        return self.classes[ids[:, 0] - self.first_class]

    def first_scale(self, condition: Tensor) -> Tensor:
        """Return the inputs of the first scale, ``[N, B, H]``, for the classes' vectors ``[B, H]``."""
        return self.placed(condition[:, None] + self.start, 0)

    def later_scale(self, picture: Tensor, number: int) -> Tensor:
        """Return the inputs of a later scale, ``[N, B, H]``.

        Args:
            picture: of all codes of smaller scales, float32 ``[B, channels, last, last]``, see :class:`ScaleFeatures`.
            number: of the scale, from 1 on.
        """
        features = self.features.at_size(picture, self.scales[number]).flatten(2).transpose(1, 2)
        features = features.to(self.feature_weight.dtype)
        return self.placed(linear(features, self.feature_weight, self.feature_bias), number)

    def placed(self, rows: Tensor, number: int) -> Tensor:
        """Add the vectors of positions and of a scale to its rows ``[B, N, H]``, and return ``[N, B, H]``."""
        end = _ends(self.scales)[number]
        places = self.positions[end - rows.size(1) : end] + self.levels[number]
        return (rows + places).transpose(0, 1).contiguous()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of all positions ``[S, B, H]``, and the classes' vectors ``[B, H]``.

        Positions after the last scale are zero. Under sequence parallelism, S is this rank's part.
        """
        condition = self.condition(input_ids)
        first = condition[:, None] + self.start
        length = min(input_ids.size(1), len(self.positions))
        features = self.features(input_ids[:, 1:length]).to(self.feature_weight.dtype)
        others = linear(features, self.feature_weight, self.feature_bias)
        levels = torch.cat([self.levels[k].expand(side**2, -1) for k, side in enumerate(self.scales)])
        rows = torch.cat([first, others], 1) + (levels + self.positions)[:length]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, input_ids.size(1) - length)).transpose(0, 1).contiguous()
        return (scatter_to_sequence_parallel_region(rows) if self.scatter_to_sequence_parallel else rows), condition


def _weak_gates(weights: Tensor) -> Tensor:
    """Make a layer add almost nothing to the residual stream: gamma1 and gamma2 are the first third of the rows."""
    factors = torch.full((len(weights), 1), _MODULATION)
    factors[: len(weights) // 3] = _GATE
    return weights * factors


class NextScaleModel(GPTModel):
    """Megatron's GPTModel with the inputs, the layers and the biased head of next-scale prediction."""

    # See initialization.py. A truncation at 2, as in the authors' code, is more than 50 standard deviations away.
    first_values: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = {
        "bias": torch.zeros_like,
        "log_sharpness": partial(torch.full_like, fill_value=math.log(4)),
        "final_modulation.linear.weight": partial(torch.mul, other=_MODULATION),
        "modulation.linear.weight": _weak_gates,
        "output_layer.weight": partial(torch.mul, other=_HEAD),
    }
    frozen_prefix = "embedding.features."

    def prepare(self, architecture: Architecture) -> None:
        """Replace the embedding, and add the head's modulation and bias. Call it once, after the construction."""
        self.embedding = ScaleEmbedding(self.config, architecture)
        self.final_modulation = Modulation(self.config, 2)
        add_bias(self.output_layer)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        output_processor: Callable[..., Tensor] | None = None,
        **more: Any,
    ) -> Tensor:
        """Do what GPTModel does. The class of each row goes to all layers and to the head."""
        rows, condition = self.embedding(input_ids)

        def head(*, hidden_states: Tensor, **rest: Any) -> Tensor:
            hidden_states = self.modulated_for_head(hidden_states, condition)
            return (output_processor or plain_logits)(hidden_states=hidden_states, **rest)

        more |= {"decoder_input": rows, "extra_block_kwargs": {"context": condition}, "output_processor": head}
        return super().forward(input_ids, position_ids, attention_mask, **more)

    def modulated_for_head(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Return what the head multiplies, for hidden states ``[S, B, H]`` and the classes' vectors ``[B, H]``."""
        return modulated(hidden, *self.final_modulation(condition), self.config.layernorm_epsilon)


def _ends(scales: tuple[int, ...]) -> list[int]:
    """Return the number of positions up to the end of each scale."""
    ends, total = [], 0
    for side in scales:
        total += side**2
        ends.append(total)
    return ends
