"""Pretends that there is one GPU: ``torch.cuda`` answers for it, and what is placed on it is placed on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, name="emulated H100")
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint", "randperm", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided"),
)
_METHODS = ("new_zeros", "new_empty", "new_full", "new_ones", "new_tensor", "to")


class Stream:
    """Stands in for ``torch.cuda.Stream``: everything is done at once, in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        """Return: the other stream's work is done."""

    def wait_event(self, event: Event) -> None:
        """Return: what the event stands for is done."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Return: everything is done."""


class Event:
    """Stands in for ``torch.cuda.Event``: it has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Return: what came before is done."""

    def wait(self, stream: Stream | None = None) -> None:
        """Return: it has happened."""

    def synchronize(self) -> None:
        """Return: it has happened."""

    def query(self) -> bool:
        """Return that it has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Return one millisecond; nothing here measures time."""
        return 1.0


STREAM = Stream()


def pretend() -> None:
    """Patch ``torch`` so that it has one GPU of the Hopper generation. To be called once."""
    _patch_cuda()
    _patch_placement()
    _patch_tensors()
    _patch_products()


def _patch_cuda() -> None:
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "ipc_collect": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "current_stream": lambda device=None: STREAM,
        "default_stream": lambda device=None: STREAM,
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: 0, cudaHostUnregister=lambda address: 0
        ),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *message: None
    torch.cuda.nvtx.range = lambda *message, **values: contextlib.nullcontext()


def _patch_placement() -> None:
    # Remembers the functions that ``with torch.device(...)`` is for: they must be torch's own.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(Tensor, name, _on_cpu(getattr(Tensor, name)))

    class Generator(torch.Generator):
        def __new__(cls, device: Any = None) -> Generator:
            return super().__new__(cls, _CPU)

    torch.Generator = Generator


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of tensors, whose device "cuda" becomes the CPU."""

    def place(*args: Any, **kwargs: Any) -> Any:
        # Pinning asks the driver, which is not there.
        kwargs.pop("pin_memory", None)
        if "device" in kwargs and _is_gpu(kwargs["device"], or_index=True):
            kwargs["device"] = _CPU
        return function(*(_CPU if _is_gpu(value) else value for value in args), **kwargs)

    return place


def _is_gpu(value: Any, *, or_index: bool = False) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return or_index and isinstance(value, int)


def _patch_tensors() -> None:
    # What was copied to the host is not on the GPU: Megatron's and Transformer Engine's checks tell the two apart.
    Tensor.is_cuda = property(lambda tensor: not getattr(tensor, "_is_on_host", False))
    Tensor.cpu = _host_copy
    Tensor.record_stream = lambda tensor, stream: None
    Tensor.pin_memory = lambda tensor, device=None: tensor
    Tensor.is_pinned = lambda tensor, device=None: True
    for name in ("clone", "detach", "float"):
        setattr(Tensor, name, _staying(getattr(Tensor, name)))


def _staying(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a method whose result is where its tensor is; Megatron's offloaded optimizer makes fp32 copies so."""

    def stay(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = method(tensor, *args, **kwargs)
        if getattr(tensor, "_is_on_host", False):
            result._is_on_host = True
        return result

    return stay


def _host_copy(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Always a copy, as from a GPU: code that relies on sharing memory must fail here, too.
    copy = tensor.clone() if tensor.requires_grad else tensor.detach().clone()
    copy._is_on_host = True
    return copy


def _patch_products() -> None:
    """Let products take ``out_dtype``, which they have on a GPU alone, and sum bfloat16 in float32 as there.

    Plain attention's own, ``torch.baddbmm``, takes a hundred times as long in bfloat16 on many CPUs.
    """
    mm, addmm, baddbmm = torch.mm, torch.addmm, torch.baddbmm

    def widening_mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, *, out: Any = None) -> Tensor:
        if out_dtype is not None:
            left, right = left.to(out_dtype), right.to(out_dtype)
        return mm(left, right, out=out)

    def widening_addmm(
        total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        if out_dtype is not None:
            total, left, right = total.to(out_dtype), left.to(out_dtype), right.to(out_dtype)
        return addmm(total, left, right, **options)

    def summed_in_float32(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        return baddbmm(total.float(), left.float(), right.float(), **options).to(left.dtype)

    torch.mm, torch.addmm, torch.baddbmm = widening_mm, widening_addmm, summed_in_float32
