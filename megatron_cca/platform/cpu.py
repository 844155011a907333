"""Let unmodified Megatron-Core run on a CPU.

Megatron-Core 0.19 names CUDA in a small number of places. Each is redirected by a targeted patch rather than by a
global ``TorchFunctionMode``: the mode is off inside ``torch.autograd.backward`` (activation recompute then fails) and
taxes every operation. The patches are:

1. the ``torch.cuda`` functions of the training path (current device, streams, synchronisation, random state);
2. ``Tensor.cuda()``, which becomes the identity;
3. ``Tensor.type()``, which answers ``torch.cuda.FloatTensor`` to Megatron's optimizers, since they compare that string;
4. the ``torch`` name inside the few Megatron modules that write ``device="cuda"`` literally or make CUDA streams.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

_CPU = torch.device("cpu")

# Megatron modules (below megatron.core) with a literal device="cuda", or streams of their own, on a path that training,
# saving or loading takes.
_MODULES_WITH_CUDA_LITERALS = (
    "pipeline_parallel.schedules",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "utils",
    "transformer.utils",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "models.common.embeddings.rope_utils",
)
_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like", "zeros_like", "full", "arange")
_GPU_ONLY_PACKAGES = ("transformer_engine", "apex")

# Everything is done at once, in order.
_STREAM = SimpleNamespace(
    wait_stream=lambda other: None, wait_event=lambda event: None, synchronize=lambda: None, cuda_stream=0
)

_done = False


def redirect_cuda_to_cpu() -> None:
    """Apply the patches of this module once.

    Raises:
        RuntimeError: Megatron-Core was imported before and has already bound Transformer Engine's GPU kernels.
    """
    global _done
    if _done:
        return
    _hide_gpu_only_packages()
    _patch_torch_cuda()
    _patch_tensor()
    _patch_megatron()
    _done = True


def _hide_gpu_only_packages() -> None:
    """Make Megatron take its plain torch fallbacks: TE and apex kernels cannot run on CPU tensors."""
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if extension is not None and getattr(extension, "HAVE_TE", False):
        raise RuntimeError("call megatron_cca.platform.install('cpu') before importing megatron.core")
    for name in _GPU_ONLY_PACKAGES:
        if name not in sys.modules:
            sys.modules[name] = None


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
    """``torch`` as seen by one Megatron module: factories place on the CPU what the module places on "cuda"."""

    def __init__(self) -> None:
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CudaOnCpu:
    """``torch.cuda`` as seen by one Megatron module: its streams are the one that there is."""

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
        # Pinning asks the CUDA driver, which is not there.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _patch_megatron() -> None:
    torch_on_cpu = _TorchOnCpu()
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu
    rng = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
