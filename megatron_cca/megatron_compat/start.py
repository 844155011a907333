"""Prepare this process for Megatron-Core 0.19.2: hide packages and messages, replace ``torch`` and Adam.

Some modules of Megatron-Core ask for ``"cuda"``, which a CPU does not have. They get another ``torch``, whose factories
create tensors on the CPU. The tracker of random states then uses the CPU's state.

Without Transformer Engine and apex, Megatron-Core uses ``torch.optim.AdamW``, which counts steps per parameter. Its
fully reshardable checkpoint does not save this count. A resumed run then fails with ``KeyError: 'step'``, or silently
restarts the bias correction. ``FusedAdam`` has one count per parameter group. The optimizer here has the same interface
and torch's arithmetic. So every machine takes the code path that Megatron-Core takes in production.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Any

import torch
from torch.optim.adamw import adamw

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
_ENGINE = "megatron.core.extensions.transformer_engine"
_GPU_ONLY = ("transformer_engine", "apex")
_UNWANTED = ("nvidia_resiliency_ext.checkpointing.async_ckpt.core", "wandb")
_WARNINGS = (
    # This package supports running without them (see :func:`serve_megatron` and models/layers.py).
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"full scope is deprecated",
    r"Could not determine rank from torch.distributed",
    r"MimoModelConfig is experimental",
    # Megatron's distributed optimizer reads gradients of views of its buffers on purpose.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    # Megatron's checkpoint reader calls torch's reader on each rank alone, and torch warns about it.
    r"torch\.distributed is disabled, unavailable or uninitialized",
    r"The argument order of load has been changed",
    r"Please use DTensor instead",
)
LOG_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.rerun_state_machine": "State",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.async_utils": "async save is deprecated",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # The tracker warns if CPU random numbers change while it forks the GPU's. On a CPU both are one generator.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
}
_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


def replace_torch(torch_on_cpu: Any) -> None:
    """Let the modules that name CUDA see ``torch_on_cpu`` as ``torch``, and the CPU's random state as a GPU's."""
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu
    random = importlib.import_module(_RANDOM)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def hide_gpu_only_packages() -> None:
    """Let Megatron-Core use plain torch on a CPU. Kernels of Transformer Engine and apex do not accept CPU tensors.

    Raises:
        RuntimeError: Megatron-Core was imported before, and already uses Transformer Engine's kernels.
    """
    if getattr(sys.modules.get(_ENGINE), "HAVE_TE", False):
        raise RuntimeError("call megatron_cca.platform.install('cpu') before importing megatron.core")
    for name in _GPU_ONLY:
        if name not in sys.modules:
            sys.modules[name] = None


def hide_unwanted_packages() -> None:
    """Let Megatron-Core use its own checkpoint writer, as old versions of the other fail, and import no wandb."""
    for name in _UNWANTED:
        sys.modules.setdefault(name, None)


def hide_expected_messages() -> None:
    """Hide the messages above, and no others."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, text in LOG_RECORDS.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with one step count per parameter group.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be true. Coupled decay is not implemented.
        capturable: must be false. CUDA graphs need a fused kernel.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "only decoupled weight decay without CUDA graphs"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            steps_before = group.get("step", 0)
            group["step"] = steps_before + 1
            if params:
                self._update(group, params, steps_before)

    def _update(self, group: dict, params: list[torch.Tensor], steps_before: int) -> None:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(steps_before), device=param.device) for param in params],
            # Fused means one pass. The other update needs temporaries as large as twice the largest parameter.
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def serve_megatron() -> None:
    """Let Megatron-Core use this optimizer if it found neither Transformer Engine nor apex. Harmless if repeated."""
    optimizer, distrib_optimizer = importlib.import_module(_OPTIMIZER), importlib.import_module(_DISTRIBUTED)
    if sys.modules.get("wandb", optimizer) is None:
        del sys.modules["wandb"]  # Megatron-Core has done without it by now. Others may import it.
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
