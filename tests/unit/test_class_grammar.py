"""LlamaGen's sequence, id by id, and batches of it."""

import numpy as np
import pytest
import torch

from megatron_cca.config import ModelConfig
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import grid_misfit, only_grid
from megatron_cca.models.llamagen import IMAGENET_VOCABULARY, class_vocabulary
from tests.references.token_shards import pairing

TINY = class_vocabulary(codebook_size=128, num_classes=10)


def test_a_small_image_by_hand():
    codes = np.array([[[7, 127], [0, 3]]], dtype=np.uint16)
    assert TINY.prompt(np.array([9]), np.empty(0, int)).tolist() == [128 + 9]
    assert TINY.prompt(np.empty(0, int), np.empty(0, int)).tolist() == [138]
    assert TINY.image(codes).tolist() == [7, 127, 0, 3]
    assert TINY.forced_tokens(2, 2).tolist() == [-1] * 4
    assert TINY.sequence_length(1, 0, 2, 2) == TINY.sequence_length(0, 0, 2, 2) == 5
    assert TINY.prompt_length(np.array([1, 0, 1]), np.zeros(3, int)).tolist() == [1, 1, 1]
    assert TINY.is_visual(np.arange(TINY.size)).tolist() == [True] * 128 + [False] * 11
    assert (TINY.size, TINY.output_size, TINY.caption_size, TINY.pad) == (139, 128, 10, 138)


def test_imagenets_numbers():
    v = IMAGENET_VOCABULARY
    assert (v.size, v.num_classes, v.null_class, v.visual_start) == (17_385, 1000, 17_384, 0)
    assert v.prompt(np.array([999]), np.empty(0, int)).tolist() == [17_383]


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (ModelConfig(name="llamagen-l"), (24, 24)),
        (ModelConfig(name="llamagen-3b", max_position_embeddings=257), (16, 16)),
        (ModelConfig(name="llamagen-tiny"), (4, 4)),
        (ModelConfig(name="emu3-8b"), None),
    ],
)
def test_the_grid_of_a_model(model, grid):
    architecture = resolve_architecture(model)
    assert only_grid(architecture) == grid
    assert grid_misfit(architecture, 1, *(grid or (7, 9))) is None


def test_another_grid_says_which_model_takes_it():
    wanted = "16 x 16 codes, the model takes 24 x 24 alone; model.max_position_embeddings 257 is for such"
    large = resolve_architecture(ModelConfig(name="llamagen-l"))
    assert grid_misfit(large, 1, 16, 16) == wanted
    assert grid_misfit(large, 2, 24, 24) == "2 frames of 24 x 24 codes, the model takes 24 x 24 alone"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class k's images hold the code k * 10 + variant everywhere, of three variants; every class four times."""
    folder = tmp_path_factory.mktemp("classes") / "shards"
    images = [np.stack([np.full((1, 2, 2), 10 * label + variant) for variant in range(3)]) for label in range(10)]
    samples = [Sample(images[label], np.array([label])) for label in range(10) for _ in range(4)]
    write_shards(folder, samples, TINY, None)
    return TokenData([TokenShards(folder, TINY)])


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_by_hand(data, multiple):
    plan = pairing(data, num_variants=data.num_variants, condition_dropout=0.3)
    batches = BatchBuilder(data, plan, True, 4, multiple, 8)
    dropped = matched = 0
    for step in range(3):
        batch = plan.at(step)
        built = batches.build(step, 0, 1)
        assert (built.seq_length, built.mean_num_tokens) == (4 if multiple == 1 else 8, 4)
        tokens, targets, mask = (
            torch.cat([torch.stack(getattr(rows, name).chunk(2)) for rows in built.microbatches], dim=1)
            for name in ("tokens", "targets", "mask")
        )
        own, other = (ids // 4 for ids in (batch.sample_ids, batch.negative_ids))
        for row in range(16):
            is_dropped = batch.condition_dropped[row]
            classes = [138, 138] if is_dropped else [128 + own[row], 128 + other[row]]
            assert tokens[:, row, 0].tolist() == classes
            code = 10 * own[row] + batch.variants[row]
            assert (targets[:, row, :4] == code).all() and (tokens[:, row, 1:4] == code).all()
            assert mask[:, row].tolist() == [[True] * 4 + [False] * (built.seq_length - 4)] * 2
            assert batch.negative_is_positive[row] == is_dropped
            assert is_dropped or own[row] != other[row]
            dropped, matched = dropped + is_dropped, matched + (not is_dropped)
    assert dropped and matched


def test_a_class_that_is_none_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(UserError, match="sample 0: caption token 10 does not fit a number of classes of 10"):
        write_shards(tmp_path / "shards", [Sample(np.zeros((2, 2), int), np.array([10]))], TINY, None)
    assert not (tmp_path / "shards").exists()
