"""Keep frozen weights in little memory of the device: in FP8, or in host memory, one layer on the device at a time.

FP8 is E4M3 (arXiv 2209.05433) with one fp32 scale per row, computed from the row. So the scales are right from the
first batch on, and do not depend on activations. No FP8 hardware is needed. The LM head and the norms are not
quantised: an error in the head would change every log-probability.

Weights in host memory are streamed. While one layer computes, the weights of the next one are copied, so that the
device holds at most two layers. Forward hooks do this, so that it works with any of Megatron's schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_cca.platform.host_weights import Arriving, Fetcher
from megatron_cca.platform.operations import current_operations

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def keep_in_fp8(chunks: Sequence[torch.nn.Module]) -> None:
    """Quantise the embedding and the projections of model chunks from ``build_gpt``, in place and permanently.

    Their ``weight`` is empty, except while the module's ``forward`` runs. The chunks can no longer be trained or saved.
    """
    for chunk in chunks:
        for module in _quantized_modules(chunk):
            _quantize(module)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix ``[M, N]`` as float8_e4m3fn ``[M, N]``, and the float32 scale ``[M, 1]`` of each row.

    The largest absolute value of a row becomes the largest number of the format. Rows of zeros have scale 1.
    """
    scales = weight.abs().amax(dim=1, keepdim=True).float() / _LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.float() / scales).to(torch.float8_e4m3fn), scales


def dequantize_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert :func:`quantize_rows`, and return the result in ``dtype``."""
    return (values.float() * scales).to(dtype)


class StreamedChunks:
    """Model chunks from ``build_gpt`` that are permanently moved to host memory.

    Args:
        chunks: chunks on the device. Their memory there is freed.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = [chunk.requires_grad_(False) for chunk in chunks]
        fetcher = Fetcher()
        self._streamed = [_StreamedChunk(chunk, fetcher) for chunk in chunks]

    @contextmanager
    def running(self) -> Iterator[Sequence[torch.nn.Module]]:
        """Yield the chunks for forward passes. After the block, also after an error, no weights are on the device."""
        try:
            yield self.chunks
        finally:
            for chunk in self._streamed:
                chunk.clear()


def _quantized_modules(chunk: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, module in chunk.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and name.rpartition(".")[2] != "output_layer":
            yield module


@torch.no_grad()
def _quantize(module: torch.nn.Module) -> None:
    dtype = module.weight.dtype
    values, scales = quantize_rows(module.weight)
    module.register_buffer("weight_fp8", values, persistent=False)
    module.register_buffer("weight_fp8_scale", scales, persistent=False)
    nothing = torch.empty(0, dtype=dtype, device=values.device)
    module.weight.requires_grad_(False).data = nothing

    def unfold(module: torch.nn.Module, *_unused) -> None:
        module.weight.data = dequantize_rows(module.weight_fp8, module.weight_fp8_scale, dtype)

    def fold(module: torch.nn.Module, *_unused) -> None:
        module.weight.data = nothing

    module.register_forward_pre_hook(unfold)
    module.register_forward_hook(fold)


class _StreamedChunk:
    """Parts of a chunk in the order of its forward pass. The first one follows the last, for the next microbatch."""

    def __init__(self, chunk: torch.nn.Module, fetcher: Fetcher) -> None:
        gpt = getattr(chunk, "module", chunk)
        self._parts: list[_StreamedPart] = []
        if gpt.pre_process:
            self._add(_StreamedPart([gpt.embedding], fetcher), gpt.embedding, gpt.embedding)
        for layer in gpt.decoder.layers:
            self._add(_StreamedPart([layer], fetcher), layer, layer)
        if gpt.post_process:
            # The head's forward does not run. Its weight is used from what comes before it to the end of the model's
            # forward.
            before = gpt.decoder.final_layernorm or gpt.final_modulation
            own = [gpt.image_head] if hasattr(gpt, "image_head") else []
            self._add(_StreamedPart([before, *own, gpt.output_layer], fetcher), before, gpt)

    def _add(self, part: _StreamedPart, first: torch.nn.Module, last: torch.nn.Module) -> None:
        place = len(self._parts)
        self._parts.append(part)
        first.register_forward_pre_hook(lambda *_unused: self._enter(place))
        last.register_forward_hook(lambda *_unused: part.leave())

    def _enter(self, place: int) -> None:
        self._parts[place].arrive()
        following = self._parts[(place + 1) % len(self._parts)]
        if following is not self._parts[place]:
            following.start()

    def clear(self) -> None:
        for part in self._parts:
            part.leave()
            part.forget()


class _StreamedPart:
    """Modules whose weights are copied to the device together and leave it together."""

    def __init__(self, modules: Sequence[torch.nn.Module], fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._slots = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        host_copy = current_operations().host_copy
        self._host: list[Tensor] = [host_copy(tensor.detach()) for tensor in self._slots]
        self._arriving: Arriving | None = None
        self.leave()

    def start(self) -> None:
        if self._arriving is None:
            self._arriving = self._fetcher.start(self._host)

    def arrive(self) -> None:
        self.start()
        self._put(self._arriving.wait())
        self._arriving = None

    def leave(self) -> None:
        self._put(self._host)

    def forget(self) -> None:
        if self._arriving is not None:
            self._arriving.wait()
        self._arriving = None

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for slot, tensor in zip(self._slots, tensors, strict=True):
            slot.data = tensor
