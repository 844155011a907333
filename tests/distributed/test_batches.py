"""The same bytes reach the model whatever the layout, micro batch, prefetch depth or step that a run starts from."""

import hashlib

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.training.batches import open_data, training_batches
from tests.distributed.launch import run_workers
from tests.references.token_shards import random_samples, write

STEPS = (0, 7, 1_000_000)
DATA = ["data.condition_dropout=0.2", "training.global_batch_size=8", "validation.fraction=0.1"]
BLENDED = ["data.length_bucketing=4", "data.pad_to_multiple_of=16"]
TP2, PP2 = ["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
# Name: overrides, and which ranks read.
BY_RANKS = {
    1: {
        "micro batch 8": (["training.micro_batch_size=8"], [True]),
        "micro batch 1, prefetch 1": (["training.micro_batch_size=1", "data.prefetch=1"], [True]),
        "prefetch 9": (["training.micro_batch_size=4", "data.prefetch=9"], [True]),
        "torch": (["training.micro_batch_size=4", "data.loader=torch"], [True]),
    },
    2: {
        "DP 2": (["training.micro_batch_size=4"], [True, True]),
        "DP 2, torch": (["training.micro_batch_size=4", "data.loader=torch"], [True, True]),
        "TP 2, torch": ([*TP2, "training.micro_batch_size=2", "data.loader=torch"], [True, False]),
        "TP 2": ([*TP2, "training.micro_batch_size=2"], [True, False]),
        "PP 2": ([*PP2, "training.micro_batch_size=8"], [True, True]),
        "CP 2": ([*CP2, "training.micro_batch_size=2", "data.prefetch=3"], [True, False]),
    },
    4: {
        "DP 4": (["training.micro_batch_size=1"], [True] * 4),
        "DP 2 x TP 2": ([*TP2, "training.micro_batch_size=2"], [True, False, True, False]),
        "DP 2 x CP 2, torch": (
            [*CP2, "training.micro_batch_size=2", "data.loader=torch", "data.prefetch=3"],
            [True, False, True, False],
        ),
        "PP 4": (
            ["parallel.pipeline_model_parallel_size=4", "training.micro_batch_size=4"],
            [True, False, False, True],
        ),
        "TP 2 x CP 2": ([*TP2, *CP2, "training.micro_batch_size=8"], [True, False, False, False]),
    },
}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    paths = [write(folder / str(seed), random_samples(50 + 30 * seed, seed, captions=9)) for seed in range(2)]
    return [*DATA, *BLENDED, f"data.path={{{paths[0]}: 0.3, {paths[1]}: 0.7}}"]


@pytest.fixture(scope="module")
def expected(common):
    """The hashes of the whole batches, from the builder alone."""
    config = load_config(None, [*common, "training.micro_batch_size=8"])
    batches = training_batches(config, open_data(config), with_pairs=True)
    return [[digest_of(batches, step + turn) for turn in range(3)] for step in STEPS]


def digest_of(batches, step):
    """Of the whole batch, which must be one microbatch."""
    (rows,) = batches.build(step, 0, 1).microbatches
    columns = torch.stack([rows.tokens, rows.targets, rows.mask.long()], dim=1)
    pairs = torch.stack(columns.chunk(2), dim=1)
    return hashlib.sha256(rows.negative_is_positive.numpy().tobytes() + pairs.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("ranks", BY_RANKS)
def test_the_batch_trace_is_the_same_bytes_in_every_layout(ranks, common, expected, tmp_path):
    layouts = {name: overrides for name, (overrides, _) in BY_RANKS[ranks].items()}
    answers = run_workers(ranks, "batch_traces", {"common": common, "layouts": layouts, "steps": STEPS}, tmp_path)
    for name, (_, readers) in BY_RANKS[ranks].items():
        assert [answer["digests"] for answer in answers[name]] == expected, name
        assert [answer["readers"] for answer in answers[name]] == [readers] * len(STEPS), name
