"""The choice between Transformer Engine's layers and local ones."""

from __future__ import annotations

import dataclasses

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_cca import platform
from megatron_cca.config import Precision
from megatron_cca.errors import UserError
from megatron_cca.models.attention import has_engine_attention
from megatron_cca.models.local_layers import RMSNorm, ScaledDotProductAttention


def engine_is_available() -> bool:
    """Return whether Transformer Engine is installed and there is a GPU."""
    return HAVE_TE and platform.current().is_cuda


def layer_spec(
    transformer_impl: str, num_layers: int, *, channels: int, precision: Precision
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the spec of the decoder's layers for ``model.transformer_impl``.

    Args:
        transformer_impl: ``auto``, ``local`` or ``transformer_engine``.
        num_layers: number of layers on this pipeline stage.
        channels: number of channels of an attention head.
        precision: precision of the computation.

    Raises:
        UserError: Transformer Engine is asked for, but is not installed or has no GPU.
    """
    available = engine_is_available()
    if transformer_impl == "transformer_engine" and not available:
        raise UserError(
            "model.transformer_impl: transformer_engine needs a GPU and the package transformer-engine "
            "(pip install 'megatron-cca[gpu]'); use auto or local here"
        )
    if transformer_impl == "local" or not available:
        return _local_block(num_layers)
    spec = get_gpt_layer_with_transformer_engine_spec()
    if has_engine_attention(transformer_impl, channels, precision):
        return spec
    return dataclasses.replace(spec, submodules=_with_torch_attention(spec.submodules))


def check_fp8_device(recipe: str) -> None:
    """Refuse FP8 on a device that does not support it.

    Args:
        recipe: ``tensorwise``, ``delayed`` or ``blockwise``.

    Raises:
        UserError: FP8 is not supported. Says what is missing.
    """
    if not engine_is_available():
        raise UserError(
            "fp8 needs a GPU of the Ada, Hopper or Blackwell generation and the package transformer-engine "
            "(pip install 'megatron-cca[gpu]'); use bf16 here"
        )
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available

    is_available = is_fp8_block_scaling_available if recipe == "blockwise" else is_fp8_available
    available, reason = is_available(return_reason=True)
    if not available:
        raise UserError(f"fp8 with recipe {recipe} is not for {platform.device_name()}: {reason} Use bf16 here")


def _local_block(num_layers: int) -> TransformerBlockSubmodules:
    submodules = _with_torch_attention(get_gpt_layer_local_submodules(normalization="RMSNorm"))
    submodules = dataclasses.replace(submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    # Set layer_norm here, too. With only a layer spec, the final norm would be Megatron's fallback.
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=TransformerLayer, submodules=submodules)] * num_layers, layer_norm=RMSNorm
    )


def _with_torch_attention(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    attention = layer.self_attention
    submodules = dataclasses.replace(attention.submodules, core_attention=ScaledDotProductAttention)
    return dataclasses.replace(layer, self_attention=dataclasses.replace(attention, submodules=submodules))
