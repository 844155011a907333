"""One GPU: rows of more than 2,000 tokens, as real images have, through the head, the layers and training."""

import numpy as np
import pytest
import torch

from megatron_cca import platform
from megatron_cca.data.shard_writing import Sample
from megatron_cca.parallel import sequence_logps
from tests.gpu.test_grid_positions_on_a_gpu import TOLERANCE, build, rows
from tests.gpu.test_reference_on_a_gpu import BF16, start, trace
from tests.references import llamagen, token_shards
from tests.references.dense_logps import dense_token_logps, worst_relative_error

pytestmark = pytest.mark.gpu
SIDE = 46
TOKENS = SIDE**2
ENGINE = "transformer_engine"


@pytest.fixture(params=["local", ENGINE])
def implementation(request):
    if request.param == ENGINE:
        pytest.importorskip("transformer_engine.pytorch")
    return request.param


def test_logps_equal_float64():
    """Several chunks of the default size and a part of one; the gradients, too."""
    vocab_size, padded = 20_000, 20_096
    generator = torch.Generator("cuda").manual_seed(0)
    kind = {"device": "cuda", "generator": generator}
    hidden = torch.randn(TOKENS, 2, 64, **kind)
    weight = torch.randn(padded, 64, **kind).mul_(64**-0.5)
    targets = torch.randint(0, vocab_size, (2, TOKENS), **kind)
    mask = torch.rand(2, TOKENS, **kind) < 0.9
    answers = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        if dtype == torch.float32:
            values = sequence_logps(*leaves, targets, mask, vocab_size=vocab_size)
        else:
            values = dense_token_logps(*leaves, targets, mask, vocab_size).sum(1)
        values.backward(torch.tensor([1.0, -0.5], device=values.device, dtype=dtype))
        answers.append((values.detach(), *(leaf.grad for leaf in leaves)))
    for found, expected in zip(*answers, strict=True):
        assert worst_relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_over_a_whole_image_is_the_plain_models(implementation, precision):
    chunk, _, sizes, weights = build(implementation, 64, precision, grid=SIDE)
    classes, codes, tokens = (tensor[:1] for tensor in rows(sizes))
    wanted = llamagen.logits(weights, classes, codes[:, :-1], sizes)
    tokens = tokens.to(platform.device())
    found = chunk(tokens, torch.arange(TOKENS, device=tokens.device).expand_as(tokens), None)
    found = found[..., : sizes.codebook].float().cpu()
    tolerance = 0.1 if precision == "bf16" else TOLERANCE[implementation]
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def images(folder):
    """Shards of ten images of 46 x 46 codes under five captions."""
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(128, size=(1, SIDE, SIDE)), np.arange(5) + 10 * (index % 5)) for index in range(10)
    ]
    return token_shards.write(folder, samples)


def test_training_takes_whole_images(implementation, tmp_path):
    """The first log-ratio is exactly 0, and bfloat16's losses are float32's to bfloat16's precision."""
    shards = images(tmp_path / "shards")
    losses = {}
    for name, precision in {"fp32": "training.precision=fp32", "bf16": BF16}.items():
        layers = "local" if name == "fp32" else implementation
        overrides = ["training.micro_batch_size=1", "training.global_batch_size=2", "model.num_layers=1"]
        overrides += [precision, f"model.transformer_impl={layers}", "model.max_position_embeddings=2304"]
        overrides += ["model.init_method_std=0.02", "optimizer.lr=1e-4"]
        reports = trace(start(shards, tmp_path / name, *overrides), 2)
        assert reports[0].log_ratio.worst == 0.0
        losses[name] = torch.tensor([report.metrics["loss"] for report in reports])
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=5e-2, atol=0)
