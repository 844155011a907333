"""The modules of Megatron-Core 0.19.2 that name CUDA in code for training, saving or loading.

A CPU has no such device. The modules below get another ``torch``. Its factories create tensors on the CPU where a
module asks for ``"cuda"``. The tracker of random states uses the CPU's state instead of a GPU's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_cca.megatron_compat.relied_on import ReliedOn

# Modules below megatron.core that name the device, make streams or pin memory, each with text from that code.
_MODULES = {
    "pipeline_parallel.schedules": "cuda",
    "distributed.distributed_data_parallel": "cuda",
    "distributed.param_and_grad_buffer": "cuda",
    "optimizer.optimizer": "cuda",
    "optimizer.clip_grads": "cuda",
    "optimizer.grad_scaler": "cuda",
    "utils": "cuda",
    "transformer.utils": "cuda",
    "dist_checkpointing.exchange_utils": "cuda",
    "dist_checkpointing.strategies.state_dict_saver": "cuda",
    "models.common.embeddings.rope_utils": "pin_memory=True",
}
_RANDOM = "megatron.core.tensor_parallel.random"

RELIED_ON = (
    *(
        ReliedOn(f"megatron.core.{name}", "asks CUDA for memory or streams", has=("torch",), says=(text,))
        for name, text in _MODULES.items()
    ),
    ReliedOn(
        f"{_RANDOM}._get_cuda_rng_state",
        "the tracker of random states reads a GPU's",
        parameters=("device", "clone", "graph_safe"),
    ),
    ReliedOn(
        f"{_RANDOM}._set_cuda_rng_state",
        "the tracker of random states writes a GPU's",
        parameters=("new_state", "device", "graph_safe"),
    ),
    ReliedOn(
        "megatron.core.optimizer.optimizer",
        "compares this string with what Tensor.type() answers, see platform/cpu.py",
        says=("cuda.FloatTensor'", "cuda.BFloat16Tensor'"),
    ),
)


def replace_torch(torch_on_cpu: Any) -> None:
    """Give ``torch_on_cpu`` as ``torch`` to the modules that name CUDA, and the CPU's random state as a GPU's."""
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu
    random = importlib.import_module(_RANDOM)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
