"""Low-rank adapters on a GPTModel's projections (LoRA, arXiv 2106.09685), under any tensor and sequence parallelism.

A projection ``y = W x`` becomes ``y = W x + alpha / dim * B A x``. W is frozen; A (``linear_in``) is drawn by name, the
same for every layout, and B (``linear_out``) starts at zero. Where W is split by its rows (``linear_qkv``,
``linear_fc1``) so is B; where it is split by its columns (``linear_proj``, ``linear_fc2``) so is A. The other one is
whole on every rank, so that only the ``dim`` numbers of each token pass between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_tensor_model_parallel_attributes,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.utils import skip_init
from torch.utils.hooks import RemovableHandle

from megatron_cca.config import LoraConfig
from megatron_cca.config.schema import LORA_TARGETS
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat.layers import await_parameters
from megatron_cca.megatron_compat.mixins import mix_in, normed_input, take_out
from megatron_cca.models.initialization import sharded_tensors, standard_normal
from megatron_cca.models.low_rank import LINEAR_IN, merged_weight, scale_of

_ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass
class _Attachment:
    """What a model with adapters remembers: their settings, whether they act, and the hook on its embedding."""

    settings: LoraConfig
    is_on: bool = True
    embedding_hook: RemovableHandle | None = None


def attach(chunks: Sequence[torch.nn.Module], settings: LoraConfig, *, seed: int | None) -> None:
    """Give every projection of ``settings.target_modules`` in every layer an adapter, and freeze everything else.

    The adapters have their layer's dtype and device. With B at zero the model's outputs stay the same, bit for bit.

    Args:
        chunks: this rank's chunks from ``build_gpt`` with their weights, bare or in Float16Module, not yet in DDP.
        settings: ``dim`` must be set.
        seed: A is drawn from it, normal, with the variance 1 / (3 * inputs) of the authors' code; None leaves A
            uninitialised for a checkpoint to fill.

    Raises:
        UserError: no target modules.
    """
    assert settings.dim is not None, "no adapters without lora.dim"
    if not settings.target_modules:
        raise UserError(f"lora.target_modules: none, nothing would train; name some of {', '.join(LORA_TARGETS)}")
    for chunk in chunks:
        gpt = _gpt(chunk)
        assert _attachment(gpt) is None, "the model has adapters already"
        chunk.requires_grad_(False)
        gpt.lora = attachment = _Attachment(settings)
        if gpt.pre_process:
            attachment.embedding_hook = _keep_gradients_flowing(gpt.embedding, attachment)
        for name, projection in _projections(gpt, settings):
            projection.adapter = Adapter(projection, name, attachment)
            mix_in(projection, _Adapted)
        if seed is not None:
            _draw(chunk, seed)


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, a forward pass is that of the model without its adapters, bit for bit.

    It may be nested. The chunks may be wrapped in DDP. A backward pass belongs on the side of its forward pass.
    """
    attachments = [attachment for chunk in chunks if (attachment := _attachment(_gpt(chunk))) is not None]
    before = [attachment.is_on for attachment in attachments]
    for attachment in attachments:
        attachment.is_on = False
    try:
        yield
    finally:
        for attachment, was_on in zip(attachments, before, strict=True):
            attachment.is_on = was_on


@torch.no_grad()
def merge(chunks: Sequence[torch.nn.Module]) -> None:
    """Fold the adapters into the weights and take them off; then all parameters are trainable, as ``build_gpt``'s are.

    Not for chunks that an optimizer holds.
    """
    for chunk in chunks:
        gpt = _gpt(chunk)
        attachment = _attachment(gpt)
        assert attachment is not None, "the model has no adapters"
        for projection in [module for module in gpt.modules() if isinstance(module, _Adapted)]:
            adapter = projection.adapter
            projection.weight.copy_(
                merged_weight(projection.weight, adapter.linear_in.weight, adapter.linear_out.weight, adapter.scale)
            )
            del projection.adapter
            take_out(projection)
        if attachment.embedding_hook is not None:
            attachment.embedding_hook.remove()
        del gpt.lora
        chunk.requires_grad_(True)


class Adapter(torch.nn.Module):
    """One projection's A and B, as this rank has them."""

    def __init__(self, projection: torch.nn.Module, name: str, attachment: _Attachment) -> None:
        super().__init__()
        weight, settings = projection.weight, attachment.settings
        self.scale, self.attachment = scale_of(settings), attachment
        self.is_row_parallel = name in _ROW_PARALLEL
        self.is_gated = name == "linear_fc1" and projection.config.gated_linear_unit
        self.sequence_parallel = projection.config.sequence_parallel
        options = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.linear_in = skip_init(torch.nn.Linear, weight.size(1), settings.dim, **options)
        self.linear_out = skip_init(torch.nn.Linear, settings.dim, weight.size(0), **options)
        torch.nn.init.zeros_(self.linear_out.weight)
        split, whole = (self.linear_in, self.linear_out) if self.is_row_parallel else (self.linear_out, self.linear_in)
        copy_tensor_model_parallel_attributes(split.weight, weight)
        # Each rank's gradient of the whole one is that of its tokens alone; Megatron then sums it over the ranks.
        whole.weight.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The projection's ``output`` ``[S, B, rows]`` for its input ``x`` ``[S, B, columns]``, plus the adapter's."""
        low_rank = self._across_ranks(self.linear_in(x))
        await_parameters(self.linear_out)
        flat = torch.addmm(output.flatten(0, -2), low_rank.flatten(0, -2), self.linear_out.weight.t(), alpha=self.scale)
        return flat.view_as(output)

    def _across_ranks(self, low_rank: Tensor) -> Tensor:
        """What the projection does with its input or its wide output, done with the ``dim`` numbers of each token."""
        if self.is_row_parallel:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low_rank)
            return reduce_from_tensor_model_parallel_region(low_rank)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low_rank)
        return copy_to_tensor_model_parallel_region(low_rank)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; the rows of a gated projection's B lie as its own do."""
        split = {"linear_in.weight": 1} if self.is_row_parallel else {"linear_out.weight": 0}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            split,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if self.is_gated:
            key = f"{prefix}linear_out.weight"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class _Adapted:
    """Mixed into the class of a projection that has an adapter, so that its own weights keep their names."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x)
        if self.adapter.attachment.is_on:
            output = self.adapter(normed_input(self, x), output)
        return output, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron's layers have taken what is inside for parameters of theirs that every rank has whole.
        return own | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


def _projections(gpt: GPTModel, settings: LoraConfig) -> Iterator[tuple[str, torch.nn.Module]]:
    for layer in gpt.decoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            yield from ((name, module) for name, module in parent.named_children() if name in settings.target_modules)


def _keep_gradients_flowing(embedding: torch.nn.Module, attachment: _Attachment) -> RemovableHandle:
    """Let the first layer's input need a gradient though the embedding is frozen.

    Megatron's activation recompute gives no gradients at all for layers of whose input none is wanted.
    """

    def need_gradient(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return output.requires_grad_() if attachment.is_on else output

    return embedding.register_forward_hook(need_gradient)


def _draw(chunk: torch.nn.Module, seed: int) -> None:
    for shard in sharded_tensors(chunk.sharded_state_dict()):
        if shard.key.endswith(LINEAR_IN):
            std = 1 / math.sqrt(3 * shard.global_shape[-1])
            with torch.no_grad():
                shard.data.copy_(std * standard_normal(shard, seed).view_as(shard.data))


def _gpt(chunk: torch.nn.Module) -> GPTModel:
    return next(module for module in chunk.modules() if isinstance(module, GPTModel))


def _attachment(gpt: GPTModel) -> _Attachment | None:
    return getattr(gpt, "lora", None)
