"""Adam for machines without Transformer Engine and apex, in the shape of their ``FusedAdam``.

Megatron-Core 0.19.2 falls back to ``torch.optim.AdamW`` there, which counts steps per parameter. Its fully reshardable
checkpoint does not carry that count: a resumed run either fails with ``KeyError: 'step'`` or restarts the bias
correction silently. ``FusedAdam`` keeps one count per parameter group. An optimizer of that shape, doing torch's own
arithmetic, lets every machine take the path that Megatron-Core takes on its production machines.
"""

from __future__ import annotations

import importlib

import torch
from torch.optim.adamw import adamw

_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) whose step count lives in the parameter group.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be true; coupled decay is not offered.
        capturable: must be false; CUDA graphs need a fused kernel.
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
            # One pass; the unfused update makes temporaries as large as two copies of the largest parameter.
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
    """Give Megatron-Core this optimizer wherever it found neither Transformer Engine nor apex. Idempotent."""
    optimizer, distrib_optimizer = importlib.import_module(_OPTIMIZER), importlib.import_module(_DISTRIBUTED)
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
