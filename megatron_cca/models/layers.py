"""The layers of a model: Transformer Engine's or local ones, and the section ``kernels`` as options of Megatron."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cca import platform
from megatron_cca.config import KernelsConfig, Precision
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat.layers import apex_fuses_gradients, fuse_engine_gradients
from megatron_cca.models.architecture import has_engine_attention
from megatron_cca.platform.operations import current_operations


def layer_spec(
    transformer_impl: str,
    num_layers: int,
    *,
    channels: int,
    precision: Precision,
    scales: tuple[int, ...] = (),
    qk_layernorm: bool = False,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the spec of the decoder's layers for ``model.transformer_impl``.

    Args:
        transformer_impl: ``auto``, ``local`` or ``transformer_engine``.
        num_layers: number of layers on this pipeline stage.
        channels: number of channels of an attention head.
        precision: precision of the computation.
        scales: of next-scale prediction, see :class:`Architecture`.
        qk_layernorm: whether queries and keys have norms. Not for next-scale prediction.

    Raises:
        UserError: Transformer Engine is asked for, but is not installed or has no GPU.
    """
    available = engine_is_available()
    if transformer_impl == "transformer_engine" and not available:
        raise UserError(
            "model.transformer_impl: transformer_engine needs a GPU and the package transformer-engine "
            "(pip install 'megatron-cca[gpu]'); use auto or local here"
        )
    is_local = transformer_impl == "local" or not available
    if scales:
        from megatron_cca.models.next_scale import block_spec

        return block_spec(num_layers, scales, is_local=is_local)
    if is_local:
        return _local_block(num_layers, qk_layernorm)
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    if has_engine_attention(transformer_impl, channels, precision):
        return spec
    return dataclasses.replace(spec, submodules=_with_torch_attention(spec.submodules))


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention with torch's fused kernels. With a flash kernel, no S x S score matrix is ever in memory.

    Under context parallelism, each rank gathers the keys and values of all ranks (as in Llama 3, arXiv 2407.21783,
    section 3.3.2). Its queries are its own two pieces of the sequence.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.context_parallel_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_unused,
    ) -> Tensor:
        """Compute causal attention, or attention of one new token to the whole cache.

        Args:
            query: ``[S, B, heads, D]``. Under context parallelism, S is the length of this rank's part.
            key: ``[T, B, groups, D]``.
            value: ``[T, B, groups, D]``.
            attention_mask: unused. Padding is on the right, where the causal mask hides it.
            attn_mask_type: ``no_mask`` for decoding with a cache, else causal.

        Returns:
            ``[S, B, heads * D]``.
        """
        causal = attn_mask_type != AttnMaskType.no_mask
        assert causal or query.size(0) == 1, "without a mask only a single new token may attend to the cache"
        if self.context_parallel_size > 1:
            return self._over_context_ranks(query, key, value)
        return self._attend(query, key, value, is_causal=causal)

    def _over_context_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        key, value = (_whole_sequence(tensor, group) for tensor in (key, value))
        rank, pieces = group.rank(), 2 * group.size()
        outputs = []
        for piece, own in zip((rank, pieces - 1 - rank), query.chunk(2), strict=True):
            seen = own.size(0) * (piece + 1)
            mask = current_operations().causal_mask(own.size(0), seen)
            outputs.append(self._attend(own, key[:seen], value[:seen], attn_mask=mask))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if query.is_cuda and query.dtype == torch.float32:
            # The only fused kernel for fp32 does not support grouped queries.
            key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), 1) for tensor in (key, value))
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
            **mask,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for sequence parallelism, which Megatron's torch fallback does not support.

    ``[..., H] -> [..., H]``, in the input's dtype. The weight is marked ``sequence_parallel``, so that Megatron sums
    its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over the last dimension."""
        return current_operations().rms_norm(x, self.weight, self.eps)


def forward_kernels(kernels: KernelsConfig) -> dict[str, bool]:
    """Return which fused kernels a forward pass uses, by key. The last bits of its results depend on them."""
    on_gpu = platform.current().is_cuda
    return {
        "bias_activation_fusion": _chosen(kernels.bias_activation_fusion, on_gpu),
        "bias_dropout_fusion": _chosen(kernels.bias_dropout_fusion, on_gpu),
        "apply_rope_fusion": _chosen(kernels.apply_rope_fusion, False),
    }


def kernel_options(kernels: KernelsConfig, *, is_frozen: bool) -> dict[str, Any]:
    """Return the options for Megatron's ``TransformerConfig``.

    Args:
        kernels: section of the run's configuration.
        is_frozen: whether the weights never change. Such a model has no gradients and no CUDA graphs.
    """
    return {
        **forward_kernels(kernels),
        # Megatron's own layers need apex for this. Transformer Engine's do not, see fuse_weight_gradients.
        "gradient_accumulation_fusion": _fuses(kernels, is_frozen) and apex_fuses_gradients(),
        "cuda_graph_impl": "none" if is_frozen else kernels.cuda_graph_impl,
        "cuda_graph_modules": list(kernels.cuda_graph_modules),
        "cuda_graph_warmup_steps": kernels.cuda_graph_warmup_steps,
    }


def fuse_weight_gradients(gpt: torch.nn.Module, kernels: KernelsConfig, *, is_frozen: bool) -> None:
    """Let Transformer Engine's layers add their weight gradients to Megatron's buffer, if ``kernels`` asks for it."""
    if _fuses(kernels, is_frozen):
        fuse_engine_gradients(gpt)


def add_bias(head: torch.nn.Module) -> None:
    """Add a bias, split over the tensor-parallel ranks as the rows are, to an LM head that was made without."""
    weight = head.weight
    bias = torch.nn.Parameter(torch.empty(weight.size(0), dtype=weight.dtype, device=weight.device))
    set_tensor_model_parallel_attributes(bias, True, 0, 1)
    head.register_parameter("bias", bias)


def plain_logits(*, hidden_states: Tensor, output_layer: torch.nn.Module, **_unused: Any) -> Tensor:
    """Return the logits ``[B, S, ids]`` of last hidden states ``[S, B, H]``, as GPTModel does without a processor."""
    return output_layer(hidden_states)[0].transpose(0, 1).contiguous()


def engine_is_available() -> bool:
    """Return whether Transformer Engine is installed and there is a GPU."""
    return HAVE_TE and platform.current().is_cuda


def _fuses(kernels: KernelsConfig, is_frozen: bool) -> bool:
    # A frozen model has no gradient buffer.
    return _chosen(kernels.gradient_accumulation_fusion, False) and not is_frozen


def _chosen(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _whole_sequence(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Gather the whole sequence ``[S, ...]``. Rank r has two pieces of it, number r and 2 * size - 1 - r."""
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
    pieces = gathered.chunk(2 * group.size())
    return torch.cat([*pieces[::2], *pieces[1::2][::-1]])


def _local_block(num_layers: int, qk_layernorm: bool) -> TransformerBlockSubmodules:
    submodules = _with_torch_attention(get_gpt_layer_local_submodules(normalization="RMSNorm"))
    submodules = dataclasses.replace(submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    if qk_layernorm:
        submodules = _with_attention(submodules, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    # Set layer_norm here, too. With only a layer spec, the final norm would be Megatron's fallback.
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=TransformerLayer, submodules=submodules)] * num_layers, layer_norm=RMSNorm
    )


def _with_torch_attention(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    return _with_attention(layer, core_attention=ScaledDotProductAttention)


def _with_attention(layer: TransformerLayerSubmodules, **parts: type[torch.nn.Module]) -> TransformerLayerSubmodules:
    attention = layer.self_attention
    submodules = dataclasses.replace(attention.submodules, **parts)
    return dataclasses.replace(layer, self_attention=dataclasses.replace(attention, submodules=submodules))
