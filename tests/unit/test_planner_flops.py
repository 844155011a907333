"""FLOPs from sizes beside torch's counter of a real model's operators."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_cca.config_files import load_config
from megatron_cca.models import resolve_architecture
from megatron_cca.models.gpt import build_gpt, image_logps
from megatron_cca.models.initialization import initialize_by_name
from megatron_cca.parallel.process_groups import initialize_distributed
from megatron_cca.planner.flops import attention_forward, head_forward, model_flops, products_forward
from megatron_cca.planner.workload import Workload

ROWS = 2
WORKLOAD = Workload(seq_length=96, image_tokens=60)


@pytest.fixture(scope="module")
def model():
    config = load_config(None, ["model.num_layers=2"])
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    (chunk,) = build_gpt(architecture, config.model, config.parallel, config.training)
    initialize_by_name(chunk, seed=1, std=0.02, num_layers=2, vocab_size=architecture.vocabulary.size)
    return config, architecture, chunk


def logps(model):
    _, architecture, chunk = model
    tokens = torch.zeros(ROWS, WORKLOAD.seq_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, : WORKLOAD.image_tokens] = True
    return image_logps(chunk, tokens, tokens, mask, vocab_size=architecture.vocabulary.size, chunk_size=1024)


def counted(work):
    # The counter knows addmm, but not the form that writes into its first argument.
    extra = {torch.ops.aten.addmm_: lambda total, left, right, out_shape=None: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        work()
    return counter.get_total_flops()


def whole_attention(architecture):
    """As the counter counts it: all of S x S."""
    return 2 * attention_forward(architecture, WORKLOAD.seq_length, causal=False)


def layers(architecture):
    return 2 * WORKLOAD.seq_length * products_forward(architecture)


def test_forward(model):
    _, architecture, _ = model
    with torch.no_grad():
        found = counted(lambda: logps(model))
    expected = layers(architecture) + whole_attention(architecture) + head_forward(architecture, WORKLOAD.image_tokens)
    assert found == pytest.approx(ROWS * expected, rel=0.01)


def test_forward_and_backward(model):
    _, architecture, _ = model
    found = counted(lambda: logps(model).sum().backward())
    head = head_forward(architecture, WORKLOAD.image_tokens)
    attention = whole_attention(architecture)
    # A flash kernel computes the scores again in backward, and so does the head with its tiles.
    executed = 3 * layers(architecture) + (1 + 2.5) * attention + 4 * head
    assert found == pytest.approx(ROWS * executed, rel=0.01)


def test_model_flops_count_nothing_twice(model):
    config, architecture, _ = model
    head = head_forward(architecture, WORKLOAD.image_tokens)
    forward = layers(architecture) + whole_attention(architecture) + head
    # Two rows; forward and twice that backward, and the reference's forward.
    assert model_flops(config, architecture, WORKLOAD, causal=False) == pytest.approx(2 * 4 * forward)
    cached = load_config(None, ["model.num_layers=2", "reference.strategy=cached", "reference.cache=c"])
    assert model_flops(cached, architecture, WORKLOAD, causal=False) == pytest.approx(2 * 3 * forward)
    plain = load_config(None, ["model.num_layers=2", "objective.name=next_token"])
    assert model_flops(plain, architecture, WORKLOAD, causal=False) == pytest.approx(3 * forward)
    adapters = load_config(None, ["model.num_layers=2", "lora.dim=4", "reference.strategy=shared"])
    without_gradients = 2 * (3 * forward + whole_attention(architecture))
    assert model_flops(adapters, architecture, WORKLOAD, causal=False) == pytest.approx(without_gradients)


def test_causal_attention_is_half(model):
    _, architecture, _ = model
    half = attention_forward(architecture, 96)
    assert attention_forward(architecture, 96, causal=False) == 2 * half
