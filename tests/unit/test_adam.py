"""The group-step AdamW is torch's AdamW, and keeps one count per group."""

import torch

from megatron_cca.megatron_compat.start import GroupStepAdamW


def test_twenty_steps_equal_torchs_fused_adamw():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert optimizers[0].param_groups[0]["step"] == 20
    assert set(optimizers[0].state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_parameters_without_gradients_are_left_alone():
    parameter = torch.nn.Parameter(torch.ones(3))
    GroupStepAdamW([parameter], lr=1.0).step()
    assert torch.equal(parameter, torch.ones(3))
