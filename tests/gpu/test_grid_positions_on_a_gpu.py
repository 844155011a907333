"""One GPU: positions over a grid, in Transformer Engine's layers and the local ones, against the plain model."""

import pytest
import torch

from megatron_cca import platform
from megatron_cca.config.load import load_config
from tests.references import llamagen

pytestmark = pytest.mark.gpu
# Transformer Engine multiplies float32 with the 10 bits of mantissa of TF32.
TOLERANCE = {"local": 1e-4, "transformer_engine": 1e-2, "auto": 1e-2}


# ``auto`` has torch's attention between Transformer Engine's layers for heads of 20 channels, and in fp32.
@pytest.fixture(params=["local", "transformer_engine", "auto"])
def implementation(request):
    if request.param != "local":
        pytest.importorskip("transformer_engine.pytorch")
    return request.param


def build(implementation, width, precision, *overrides, grid=4):
    """A model with the plain model's weights; heads of 16 or 20 channels."""
    from megatron_cca.models import gpt, resolve_architecture
    from megatron_cca.models.architecture import padded_vocab_size
    from megatron_cca.parallel.ranks import initialize_distributed
    from tests.references.in_megatron import fill
    from tests.references.llamagen_in_megatron import whole_tensors

    keys = ["model.name=llamagen-tiny", f"model.hidden_size={width}", f"model.transformer_impl={implementation}"]
    keys += [f"training.precision={precision}", f"model.max_position_embeddings={1 + grid**2}"]
    config = load_config(None, [*keys, *overrides])
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    sizes = llamagen.Sizes(4, width, 4, grid=grid, codebook=128, classes=10, ffn=architecture.ffn_hidden_size)
    weights = llamagen.random_weights(sizes, std=0.1)
    chunks = gpt.build_gpt(
        architecture, config.model, config.parallel, config.training, kernels=config.kernels, is_frozen=True
    )
    fill(chunks, whole_tensors(weights, sizes, padded_vocab_size(architecture, config.model, 1)))
    return chunks[0].eval(), architecture, sizes, weights


def rows(sizes):
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 3, 3, sizes.classes])
    codes = torch.randint(0, sizes.codebook, (4, sizes.grid**2), generator=generator)
    return classes, codes, torch.cat([sizes.codebook + classes[:, None], codes[:, :-1]], 1)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize(
    "fusion", [pytest.param("true", marks=pytest.mark.needs_hardware("the kernel of rotary positions")), "false"]
)
def test_logits_are_the_plain_models(implementation, width, precision, fusion):
    if fusion == "true":
        pytest.importorskip("transformer_engine.pytorch")
    chunk, _, sizes, weights = build(implementation, width, precision, f"kernels.apply_rope_fusion={fusion}")
    classes, codes, tokens = rows(sizes)
    wanted = llamagen.logits(weights, classes, codes[:, :-1], sizes)
    tokens = tokens.to(platform.device())
    found = chunk(tokens, torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens), None)
    found = found[..., : sizes.codebook].float().cpu()
    tolerance = 0.1 if precision == "bf16" else TOLERANCE[implementation]
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 80])
def test_logits_while_drawing_are_the_plain_models(implementation, width):
    from megatron_cca.generation.decoder import decoding

    chunk, architecture, sizes, weights = build(implementation, width, "fp32")
    classes, codes, tokens = rows(sizes)
    wanted = llamagen.logits(weights, classes, codes[:, :-1], sizes)
    tokens = tokens.to(platform.device())
    with decoding([chunk], architecture.vocabulary) as decoder:
        cache = decoder.new_cache(tokens.size(1))
        found = torch.stack([decoder.feed(cache, column[:, None]) for column in tokens.unbind(1)], dim=1).cpu()
    assert (found - wanted).abs().max() < TOLERANCE[implementation] * wanted.abs().max()
