"""Adam for machines without Transformer Engine and apex, with the interface of their ``FusedAdam``.

On such machines, Megatron-Core 0.19.2 uses ``torch.optim.AdamW``, which counts steps per parameter. Its fully
reshardable checkpoint does not save this count. A resumed run then fails with ``KeyError: 'step'``, or silently
restarts the bias correction. ``FusedAdam`` has one count per parameter group. The optimizer here has the same interface
and torch's arithmetic. So every machine takes the code path that Megatron-Core takes in production.
"""

from __future__ import annotations

import importlib

import torch
from torch.optim.adamw import adamw

_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


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
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
