"""Low-rank adapters on a GPTModel's projections (LoRA, arXiv 2106.09685), under any tensor and sequence parallelism.

A projection ``y = W x`` becomes ``y = W x + alpha / dim * B A x``. W is frozen. A (``linear_in``) is drawn by name, the
same for every layout. B (``linear_out``) starts at zero.

If tensor parallelism splits the rows of W (``linear_qkv``, ``linear_fc1``), it also splits the rows of B. If it splits
the columns of W (``linear_proj``, ``linear_fc2``), it also splits the columns of A. The other matrix is whole on every
rank. So ranks exchange only the ``dim`` numbers of each token.
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
from torch.utils.hooks import RemovableHandle

from megatron_cca.config import LoraConfig
from megatron_cca.config.schema import LORA_TARGETS
from megatron_cca.errors import UserError
from megatron_cca.megatron_compat.decoding import mix_in, normed_input, take_out
from megatron_cca.megatron_compat.layers import await_parameters
from megatron_cca.models.gpt import unwrapped_gpt
from megatron_cca.models.initialization import sharded_tensors, standard_normal
from megatron_cca.models.weight_map import LINEAR_IN, merged_weight, scale_of

_ROW_PARALLEL = ("linear_proj", "linear_fc2")


def attach(chunks: Sequence[torch.nn.Module], settings: LoraConfig, *, seed: int | None) -> None:
    """Add an adapter to every projection in ``settings.target_modules``, and freeze everything else.

    The adapters have the dtype and device of their layer. B is zero, so the model's outputs keep their bits.

    Args:
        chunks: this rank's chunks from ``build_gpt`` with their weights, bare or in Float16Module, not yet in DDP.
        settings: settings of the adapters. ``dim`` must be set.
        seed: seed of A, which is normal with variance 1 / (3 * inputs), as in the authors' code. None leaves A
            uninitialised. A checkpoint must then fill it.

    Raises:
        UserError: there are no target modules.
    """
    assert settings.dim is not None, "no adapters without lora.dim"
    if not settings.target_modules:
        raise UserError(f"lora.target_modules: none, nothing would train; name some of {', '.join(LORA_TARGETS)}")
    for chunk in chunks:
        gpt = unwrapped_gpt(chunk)
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
    """Switch the adapters off within the block. Outputs have the same bits as those of the model without adapters.

    Blocks can be nested. The chunks can be wrapped in DDP. Run a backward pass inside the block if its forward pass was
    inside, else outside.
    """
    attachments = [attachment for chunk in chunks if (attachment := _attachment(unwrapped_gpt(chunk))) is not None]
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
    """Merge the adapters into the weights and remove them. Then all parameters are trainable, as after ``build_gpt``.

    Do not call it for chunks that an optimizer holds.
    """
    for chunk in chunks:
        gpt = unwrapped_gpt(chunk)
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
    """This rank's parts of A and B of one projection."""

    def __init__(self, projection: torch.nn.Module, name: str, attachment: _Attachment) -> None:
        super().__init__()
        weight, settings = projection.weight, attachment.settings
        self.scale, self.attachment = scale_of(settings), attachment
        self.is_row_parallel = name in _ROW_PARALLEL
        self.is_gated = name == "linear_fc1" and projection.config.gated_linear_unit
        self.sequence_parallel = projection.config.sequence_parallel
        options = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.linear_in = _UninitializedLinear(weight.size(1), settings.dim, **options)
        self.linear_out = _UninitializedLinear(settings.dim, weight.size(0), **options)
        torch.nn.init.zeros_(self.linear_out.weight)
        split, whole = (self.linear_in, self.linear_out) if self.is_row_parallel else (self.linear_out, self.linear_in)
        copy_tensor_model_parallel_attributes(split.weight, weight)
        # A rank's gradient of the whole matrix covers only its own tokens. Megatron sums it over the ranks.
        whole.weight.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return ``output`` plus the adapter's output.

        Args:
            x: the projection's input, ``[S, B, columns]``.
            output: the projection's output, ``[S, B, rows]``.
        """
        low_rank = self._across_ranks(self.linear_in(x))
        await_parameters(self.linear_out)
        flat = torch.addmm(output.flatten(0, -2), low_rank.flatten(0, -2), self.linear_out.weight.t(), alpha=self.scale)
        return flat.view_as(output)

    def _across_ranks(self, low_rank: Tensor) -> Tensor:
        """Do the projection's communication, but only with the ``dim`` numbers of each token."""
        if self.is_row_parallel:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low_rank)
            return reduce_from_tensor_model_parallel_region(low_rank)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low_rank)
        return copy_to_tensor_model_parallel_region(low_rank)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return Megatron's sharded state. B of a gated projection has the same order of rows as the projection."""
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


@dataclass
class _Attachment:
    """State of a model with adapters: their settings, whether they are on, and the hook on the embedding."""

    settings: LoraConfig
    is_on: bool = True
    embedding_hook: RemovableHandle | None = None


class _UninitializedLinear(torch.nn.Linear):
    """A linear layer with an uninitialised weight. torch's initialisation would use the process's random generator."""

    def reset_parameters(self) -> None:
        """Do nothing, so that the weight stays uninitialised."""


class _Adapted:
    """Mixin for the class of a projection with an adapter. The projection's weights keep their names."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x)
        if self.adapter.attachment.is_on:
            output = self.adapter(normed_input(self, x), output)
        return output, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Replace the adapter's entries: Megatron's layers treat them as parameters that every rank has whole.
        return own | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


def _projections(gpt: GPTModel, settings: LoraConfig) -> Iterator[tuple[str, torch.nn.Module]]:
    for layer in gpt.decoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            yield from ((name, module) for name, module in parent.named_children() if name in settings.target_modules)


def _keep_gradients_flowing(embedding: torch.nn.Module, attachment: _Attachment) -> RemovableHandle:
    """Let the first layer's input require a gradient, although the embedding is frozen.

    Otherwise Megatron's activation recompute computes no gradients at all for the layer.
    """

    def need_gradient(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        if attachment.is_on:
            # Next-scale prediction's embedding also returns the classes' vectors.
            (output[0] if isinstance(output, tuple) else output).requires_grad_()
        return output

    return embedding.register_forward_hook(need_gradient)


def _draw(chunk: torch.nn.Module, seed: int) -> None:
    for shard in sharded_tensors(chunk.sharded_state_dict()):
        if shard.key.endswith(LINEAR_IN):
            std = 1 / math.sqrt(3 * shard.global_shape[-1])
            with torch.no_grad():
                shard.data.copy_(std * standard_normal(shard, seed).view_as(shard.data))


def _attachment(gpt: GPTModel) -> _Attachment | None:
    return getattr(gpt, "lora", None)
