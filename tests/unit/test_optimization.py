"""What Megatron-Core is told of the optimizer, and what its offloaded one may bring into a checkpoint."""

from types import SimpleNamespace

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_cca.config.load import load_config
from megatron_cca.megatron_compat.optimizer_state import keep_present_settings, leave_out_classes, let_parts_count
from megatron_cca.megatron_compat.start import GroupStepAdamW
from megatron_cca.training.setup import optimizer_settings


def test_master_weights_are_kept_whole():
    """Megatron-Core's default keeps their remainders, and saves those as if they were the weights."""
    assert optimizer_settings(load_config(None, ["training.precision=bf16"])).store_param_remainders is False


def offloaded():
    """Megatron-Core's own optimizer over host and GPU, of one parameter."""
    kinds = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": GroupStepAdamW}
    parameter = torch.nn.Parameter(torch.ones(3))
    group = {"params": [parameter], "wd_mult": 1.0}
    return HybridDeviceOptimizer([group], lr=1e-3, overlap_cpu_optimizer_d2h_h2d=False, **kinds)


def test_the_groups_that_are_saved_name_no_classes_and_get_them_back():
    optimizer = offloaded()
    state = {"optimizer": {"param_groups": optimizer.state_dict()["param_groups"], "state": {}}}
    leave_out_classes(state)
    saved = state["optimizer"]["param_groups"][0]
    assert not any(isinstance(value, type) for value in saved.values())
    assert saved["wd_mult"] == 1.0
    keep_present_settings(state, optimizer.param_groups)
    assert saved["cpu_optimizer_cls"] is torch.optim.AdamW


def test_the_parts_of_an_offloaded_optimizer_count_on_after_a_load():
    optimizer = offloaded()
    optimizer.param_groups[0]["step"] = 4
    optimizer._sync_hdo_param_groups_to_sub_optimizers()
    let_parts_count(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=optimizer)]))
    part = optimizer.sub_optimizers[0]
    part.param_groups[0]["step"] += 1
    optimizer._sync_hdo_param_groups_to_sub_optimizers()
    assert part.param_groups[0]["step"] == 5


def test_other_optimizers_keep_their_count():
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"step": 4}]))
    let_parts_count(optimizer)
    assert optimizer.optimizer.param_groups[0]["step"] == 4
