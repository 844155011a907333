"""One GPU: the sampler in a run of Transformer Engine's layers or the local ones, in fp32, bf16 and FP8."""

import pytest
import torch

from megatron_cca import platform
from megatron_cca.config.load import load_config
from tests.distributed.test_layout_parity import CCA

pytestmark = pytest.mark.gpu
# FP8's products want multiples of 16.
WIDE = ["model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_attention_heads=4", "model.num_query_groups=2"]


def start(digit_shards, folder, *overrides):
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.setup import set_up

    common = [*CCA, *WIDE, f"data.path={digit_shards}", f"training.output_dir={folder}", "logging.sample_interval=1"]
    prompts = folder / "prompts.txt"
    prompts.write_text("a handwritten seven\nthe digit one\na scan of a three\n")
    config = load_config(None, [*common, f"logging.sample_prompts={prompts}", *overrides])
    initialize_distributed(config)
    return set_up(config, open_data(config))


@pytest.mark.parametrize(
    ("implementation", "precision", "tolerance"),
    [
        ("local", "fp32", 1e-4),
        ("local", "bf16", 0.1),
        ("transformer_engine", "fp32", 1e-2),  # of float32's mantissa its products keep 10 bits: TF32
        ("transformer_engine", "bf16", 0.1),
    ],
)
def test_cached_logits_are_those_of_a_whole_pass(implementation, precision, tolerance, digit_shards, tmp_path):
    from megatron_cca.generation.decoder import decoding

    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    run = start(digit_shards, tmp_path, f"training.precision={precision}", f"model.transformer_impl={implementation}")
    (chunk,) = run.policy_chunks
    vocabulary = run.architecture.vocabulary
    tokens = torch.randint(0, vocabulary.size, (3, 20), device=platform.device())
    counts = torch.tensor([4, 6, 5], device=platform.device())
    rows = torch.arange(3, device=platform.device())
    with torch.no_grad():
        whole = chunk(tokens, torch.arange(20, device=platform.device()).expand(3, -1), None)
    with decoding(run.policy_chunks, vocabulary) as decoder:
        cache = decoder.new_cache(20)
        cached = [decoder.feed(cache, tokens[:, :6], counts)]
        cached += [decoder.feed(cache, tokens[rows, counts + turn, None]) for turn in range(14)]
    wanted = torch.stack([whole[rows, counts - 1 + turn] for turn in range(15)])
    wanted = wanted[..., vocabulary.visual_start : vocabulary.visual_start + vocabulary.codebook_size].float()
    assert (torch.stack(cached) - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_pictures_leave_the_training_as_it_was(precision, digit_shards, tmp_path):
    from megatron_cca.models.fp8_devices import check_fp8_device
    from megatron_cca.training.pictures import open_pictures
    from megatron_cca.training.step import train_step

    if precision == "fp8":
        pytest.importorskip("transformer_engine.pytorch")
        check_fp8_device("tensorwise")
    losses = []
    for is_drawn in (False, True):
        run = start(digit_shards, tmp_path, f"training.precision={precision}", "reference.allow_bias=1")
        pictures = open_pictures(run)
        with run.loader:
            for _ in range(3):
                if is_drawn:
                    assert pictures.generate().images.shape == (3, 8, 8, 3)
                losses.append(train_step(run).metrics["loss"])
    assert losses[:3] == losses[3:]
