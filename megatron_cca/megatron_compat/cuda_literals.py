"""The modules of Megatron-Core 0.19.2 that name CUDA in code for training, saving or loading.

A CPU has no such device. The modules below get another ``torch``. Its factories create tensors on the CPU where a
module asks for ``"cuda"``. The tracker of random states uses the CPU's state instead of a GPU's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

# Modules below megatron.core with a literal device, with streams of their own or with page-locked memory; a word of it.
MODULES = {
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


def replace_torch(torch_on_cpu: Any) -> None:
    """Let the modules that name CUDA see ``torch_on_cpu`` as ``torch``, and the CPU's random state as a GPU's."""
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu
    random = importlib.import_module(_RANDOM)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
