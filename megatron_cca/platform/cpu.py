"""Let unmodified Megatron-Core run on a CPU.

Megatron-Core 0.19 names CUDA in a few places. A patch redirects each of them. A global ``TorchFunctionMode`` would not
work: it is off inside ``torch.autograd.backward``, so activation recompute fails, and it slows down every operation.
The patches are:

1. the ``torch.cuda`` functions of the training path (current device, streams, synchronisation, random state);
2. ``Tensor.cuda()``, which becomes the identity;
3. ``Tensor.type()``, which returns ``torch.cuda.FloatTensor`` to Megatron's optimizers, because they compare this
   string;
4. the ``torch`` name inside a few Megatron modules, see :mod:`megatron_cca.megatron_compat.start`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from megatron_cca.megatron_compat import start

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like", "zeros_like", "full", "arange")

# On a CPU, all work runs immediately and in order.
_STREAM = SimpleNamespace(
    wait_stream=lambda other: None, wait_event=lambda event: None, synchronize=lambda: None, cuda_stream=0
)

_done = False


def redirect_cuda_to_cpu() -> None:
    """Apply the patches of this module once.

    Raises:
        RuntimeError: Megatron-Core was imported before, and already uses Transformer Engine's GPU kernels.
    """
    global _done
    if _done:
        return
    start.hide_gpu_only_packages()
    _patch_torch_cuda()
    _patch_tensor()
    start.replace_torch(_TorchOnCpu())
    _done = True


def _patch_torch_cuda() -> None:
    replacements = {
        "current_device": lambda: _CPU,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _STREAM,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _patch_tensor() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = tensor_type


class _TorchOnCpu:
    """``torch`` as seen by one Megatron module. Its factories create tensors on the CPU instead of "cuda"."""

    def __init__(self) -> None:
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CudaOnCpu:
    """``torch.cuda`` as seen by one Megatron module. All its streams are the same one."""

    def Stream(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return _STREAM

    def stream(self, stream: SimpleNamespace) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        # Pinned memory needs the CUDA driver, which does not exist here.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create
