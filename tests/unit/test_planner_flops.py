"""FLOPs from sizes beside torch's counter of a real model's operators."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.program import image_shape
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import (
    Workload,
    attention_forward,
    average_peak,
    flops_by_precision,
    head_forward,
    image_layers_forward,
    image_workload,
    mfu,
    model_flops,
    products_forward,
)
from megatron_cca.models import resolve_architecture
from megatron_cca.models.gpt import build_gpt, image_logps
from megatron_cca.models.initialization import initialize_by_name
from megatron_cca.objectives.base import OBJECTIVES
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.reference import policy_head
from tests.references import var

ROWS = 2
WORKLOAD = Workload(seq_length=96, image_tokens=60)


MODELS = {"plain": [], "wide heads": ["model.kv_channels=24"], "images": ["model.name=janus-tiny"]}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    config = load_config(None, ["model.num_layers=2", *request.param])
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    (chunk,) = build_gpt(architecture, config.model, config.parallel, config.training)
    initialize_by_name(chunk, seed=1, std=0.02, num_layers=2, vocab_size=architecture.num_words)
    return config, architecture, chunk


def logps(model):
    _, architecture, chunk = model
    tokens = torch.zeros(ROWS, WORKLOAD.seq_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, : WORKLOAD.image_tokens] = True
    return image_logps(chunk, tokens, tokens, mask, vocab_size=architecture.vocabulary.output_size, chunk_size=1024)


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
    return WORKLOAD.seq_length * (2 * products_forward(architecture) + image_layers_forward(architecture))


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


def test_a_mixture_passes_the_head_once(model):
    config, architecture, chunk = model
    mixed = replace(config, objective=OBJECTIVES["gft"]())
    tokens = torch.zeros(ROWS, WORKLOAD.seq_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, : WORKLOAD.image_tokens] = True
    options = policy_head(mixed, architecture.vocabulary)
    with torch.no_grad():
        found = counted(lambda: image_logps(chunk, tokens, tokens, mask, **options))
    rows = 2 * (layers(architecture) + whole_attention(architecture))
    head = head_forward(architecture, WORKLOAD.image_tokens)
    assert found == pytest.approx(rows + head, rel=0.01)
    # Both rows go through the backward of the layers, though one has no gradient.
    assert model_flops(mixed, architecture, WORKLOAD, causal=False) == pytest.approx(3 * (rows + head))


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


SCALES = ["model.name=var-d16", "model.num_layers=1", "model.hidden_size=256", "model.ffn_hidden_size=1024"]
SCALES += ["model.num_attention_heads=4", "model.num_query_groups=4"]


@pytest.fixture(scope="module")
def pyramid():
    """The plain model of the tests, and ours of the same sizes."""
    sizes = var.Sizes(layers=1, width=256, heads=4)
    weights = {name: tensor.requires_grad_() for name, tensor in var.random_weights(sizes, 0, 0.02).items()}
    quantizer = var.random_quantizer(sizes)
    codes, classes = torch.zeros((ROWS, sizes.tokens), dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
    config = load_config(None, SCALES)
    return config, resolve_architecture(config.model), lambda: var.logits(weights, quantizer, classes, codes, sizes)


def test_scales_forward_and_backward(pyramid):
    config, architecture, plain = pyramid
    workload = image_workload(config, image_shape(config, None, 0))
    assert workload == Workload(680, 680)
    forward = model_flops(load_config(None, [*SCALES, "objective.name=next_token"]), architecture, workload) / 3
    with FlopCounterMode(display=False) as counter:
        logits = plain()
    # The plain model masks the scores of later scales, where ours does not compute them.
    masked = 4.0 * 256 * 680**2 - attention_forward(architecture, 680)
    counts = counter.get_flop_counts()["Global"]
    # The features of the picture are made in fp32 for every row, and do not count.
    convolved = counts.pop(torch.ops.aten.convolution)
    assert sum(counts.values()) == pytest.approx(ROWS * (forward + masked), rel=0.01)
    assert convolved < 0.05 * forward
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * ROWS * (forward + masked), rel=0.01)


def test_scales_see_themselves_and_smaller_ones(pyramid):
    _, architecture, _ = pyramid
    sides = architecture.scales
    scores = sum(side**2 * sum(other**2 for other in sides if other <= side) for side in sides)
    assert attention_forward(architecture, 680) == 4 * 256 * scores
    # Rows that are filled up compute no more of them, and there is no causal half.
    assert attention_forward(architecture, 768, causal=False) == attention_forward(architecture, 680)


def test_mfu_is_over_each_precisions_own_peak():
    keys = ["model.name=emu3-8b", "training.precision=fp8", "data.pad_to_multiple_of=128"]
    config, workload, h100 = load_config(None, keys), Workload(8448, 8100), GPUS["h100-80gb"]
    architecture = resolve_architecture(config.model)
    found = flops_by_precision(config, architecture, workload)
    products = architecture.num_layers * 8448 * products_forward(architecture)
    rest = architecture.num_layers * attention_forward(architecture, 8448) + head_forward(architecture, 8100)
    # Two rows; policy forward and backward, reference forward.
    assert found == pytest.approx({"fp8": 2 * 4 * products, "bf16": 2 * 4 * rest})
    assert sum(found.values()) == pytest.approx(model_flops(config, architecture, workload))
    ideal = 8 * products / 1979e12 + 8 * rest / 989.5e12
    peak = average_peak(found, h100.peak_flops)
    assert 989.5e12 < peak < 1979e12
    # A step that goes as fast as the peaks allow.
    assert mfu(sum(found.values()), ideal, peak) == pytest.approx(1)


@pytest.mark.parametrize(
    ("overrides", "precisions"),
    [
        ([], {"bf16"}),
        (["reference.precision=fp32"], {"bf16", "fp32"}),
        (["reference.precision=fp8"], {"bf16", "fp8"}),
        (["reference.precision=fp8", "reference.strategy=cached", "reference.cache=c"], {"bf16"}),
    ],
)
def test_the_planner_counts_as_everybody_does(overrides, precisions):
    config = load_config(None, ["model.name=emu3-8b", "training.precision=bf16", *overrides])
    architecture, workload = resolve_architecture(config.model), Workload(8448, 8100)
    flops = flops_by_precision(config, architecture, workload)
    assert set(flops) == precisions
    step = predict_step(config, Cluster(GPUS["h100-80gb"], 8, 8), workload)
    per_gpu = config.training.global_batch_size * sum(flops.values()) / 8
    peak = average_peak(flops, GPUS["h100-80gb"].peak_flops)
    assert step.mfu == mfu(per_gpu, step.total, peak) == pytest.approx(per_gpu / step.total / step.peak_flops)


def test_what_prints_an_mfu_says_what_it_means():
    root = Path(__file__).parents[2]
    texts = {
        file.relative_to(root).as_posix(): file.read_text()
        for folder in ("megatron_cca", "benchmarks")
        for file in root.glob(f"{folder}/**/*.py")
    }
    printing = {name for name, text in texts.items() if '"MFU"' in text}
    assert {
        "benchmarks/reference.py",
        "megatron_cca/lab/scaling/report.py",
        "megatron_cca/lab/planner/report.py",
    } <= printing
    silent = [name for name in printing if "MFU_MEANS" not in texts[name]]
    assert not silent
    assert "MFU_MEANS" in texts["megatron_cca/lab/planner/report.py"]
