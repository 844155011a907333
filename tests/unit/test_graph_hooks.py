"""Megatron's CUDA graphs refuse layers with forward pre-hooks that are not Megatron's own, at the first replay."""

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.models import FAMILIES, resolve_architecture


def captured_layers(family, *overrides):
    """The layers of a family's smallest model, as training sets them up."""
    from megatron_cca.models import lora
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, [f"model.name={family}-tiny", "model.num_layers=2", *overrides])
    initialize_distributed(config)
    chunks = build_chunks(config, resolve_architecture(config.model), config.training, None, "", initialize=None)
    if config.lora.dim is not None:
        lora.attach(chunks, config.lora, seed=0)
    return [layer for chunk in chunks for layer in chunk.decoder.layers]


@pytest.mark.parametrize("overrides", [[], ["lora.dim=2"]], ids=["plain", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_that_a_graph_captures_has_a_hook_of_ours(family, overrides):
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    for layer in captured_layers(family, *overrides):
        # Transformer Engine's capture asks this of a layer, Megatron's the rest of every module in it.
        assert not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks)
        for module in layer.modules():
            CudaGraphManager.call_ddp_preforward_hook(None, module)


def test_megatron_refuses_a_hook_of_ours_at_all():
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    module = torch.nn.Linear(1, 1)
    module.register_forward_pre_hook(lambda module, _inputs: None)
    with pytest.raises(AssertionError, match="user registered pre-forward hooks"):
        CudaGraphManager.call_ddp_preforward_hook(None, module)
