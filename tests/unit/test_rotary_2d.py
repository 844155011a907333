"""Positions on a grid, and words that are fed but never predicted."""

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.program import image_shape
from megatron_cca.lab.planner.workload import ImageShape, Workload, head_forward, image_workload
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import check_layout, grid_side, longest_row, padded_vocab_size
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training import fixed_row_length
from tests.references import llamagen

TINY = ["model.name=llamagen-tiny"]


def architecture(*overrides):
    return resolve_architecture(load_config(None, list(overrides)).model)


@pytest.mark.parametrize(
    ("name", "published"), [("B", "111M"), ("L", "343M"), ("XL", "775M"), ("XXL", "1.4B"), ("3B", "3.1B")]
)
def test_sizes_are_the_published_ones(name, published):
    ours, sizes = architecture(f"model.name=llamagen-{name.lower()}"), llamagen.PUBLISHED[name]
    assert num_parameters(ours) == llamagen.num_parameters(sizes)
    shown = num_parameters(ours) / 1e6
    assert published == (f"{shown:.0f}M" if shown < 1000 else f"{shown / 1000:.1f}B")
    assert ours.ffn_hidden_size == sizes.ffn_width
    assert grid_side(ours) == 24
    assert grid_side(architecture(f"model.name=llamagen-{name.lower()}", "model.max_position_embeddings=257")) == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.max_position_embeddings=576"], r"576 is not 1 and a square, .* nearest that are: 530, 577;"),
        (["model.max_position_embeddings=258"], r"nearest that are: 257, 290; 16x16 codes take 257, 24x24 577"),
        (["model.max_position_embeddings=1"], r"1 is not 1 and a square, .* nearest that are: 2;"),
        (
            ["model.hidden_size=40", "model.num_attention_heads=4"],
            "4 heads have 10 channels each; rotary embedding over",
        ),
    ],
)
def test_what_is_no_grid_is_refused(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        architecture(*TINY, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [[], ["model.hidden_size=80"], ["model.max_position_embeddings=26"]])
def test_the_rotation_is_that_of_the_plain_model(overrides):
    from megatron_cca.models.gpt import build_gpt
    from megatron_cca.models.rotary_2d import rotation_of

    config = load_config(None, [*TINY, "model.num_layers=1", *overrides])
    initialize_distributed(config)
    ours = resolve_architecture(config.model)
    (gpt,) = build_gpt(ours, config.model, config.parallel, config.training)
    places = ours.max_position_embeddings
    found = rotation_of(gpt, places + 30, torch.device("cpu"))
    sizes = llamagen.Sizes(1, ours.hidden_size, ours.num_attention_heads, grid=grid_side(ours))
    for own, plain in zip((found.cos, found.sin), llamagen.rotation(sizes), strict=True):
        assert own.shape == (places + 30, ours.hidden_size // ours.num_attention_heads)
        torch.testing.assert_close(own[:places].double(), plain.repeat_interleave(2, 1), rtol=0, atol=1e-6)
        assert own.isfinite().all()
    assert found.interleaved


def test_rows_may_be_filled_up_behind_the_grid_and_are_all_alike():
    large = ["model.name=llamagen-l"]
    for multiple, longest, fixed in ((1, 577, 576), (64, 640, 576), (128, 640, 640)):
        config = load_config(None, [*large, f"data.pad_to_multiple_of={multiple}"])
        assert longest_row(resolve_architecture(config.model), multiple) == longest
        assert fixed_row_length(config) == fixed
        assert image_workload(config, image_shape(config, None, 99)) == Workload(fixed, 576)
    # Elsewhere the filling takes positions.
    assert longest_row(architecture("model.name=emu3-tiny"), 99) == 128
    with pytest.raises(UserError, match=r"--image-grid: 16 x 16 codes, the model takes 24 x 24 alone; .* 257"):
        image_workload(load_config(None, large), ImageShape(16, 16, 0))
    assert image_shape(load_config(None, ["model.name=emu3-8b"]), None, 7) == ImageShape(90, 90, 7)


def test_the_head_predicts_codes_alone():
    config = load_config(None, ["model.name=llamagen-l"])
    ours = resolve_architecture(config.model)
    assert (ours.vocabulary.size, ours.vocabulary.output_size) == (17_385, 16_384)
    assert padded_vocab_size(ours, config.model, 1) == 17_408
    assert head_forward(ours, 576) == 2.0 * 576 * 1024 * 16_384
    plain = architecture("model.name=emu3-tiny").vocabulary
    assert plain.output_size == plain.size


def test_rows_of_no_word_start_at_0():
    from megatron_cca.training.setup import build_chunks

    config = load_config(None, [*TINY, "model.num_layers=1"])
    initialize_distributed(config)
    ours = resolve_architecture(config.model)
    (gpt,) = build_chunks(config, ours, config.training, None, "")
    for weight, words in ((gpt.embedding.word_embeddings.weight, 139), (gpt.output_layer.weight, 128)):
        assert weight.size(0) == 256
        assert weight[:words].abs().sum(1).gt(0).all()
        assert weight[words:].eq(0).all()


def test_the_3b_model_splits_its_32_heads_of_100_channels():
    config = load_config(None, ["model.name=llamagen-3b", "parallel.tensor_model_parallel_size=8"])
    check_layout(resolve_architecture(config.model), config.model, config.parallel)
