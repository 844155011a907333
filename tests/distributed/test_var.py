"""What VAR's model alone has: first values, frozen tensors, how often codes are drawn, and what it cannot have."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import export_checkpoint
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import check_layout
from megatron_cca.models.llamagen import class_vocabulary
from megatron_cca.models.var import pyramid_vocabulary
from megatron_cca.training.batches import open_data
from tests.distributed.launch import run_workers
from tests.references import var
from tests.references.var_in_megatron import frozen_tensors

TP2 = ["parallel.tensor_model_parallel_size=2"]
# So that the head's 256 rows lie on both of two ranks, and rows of no word behind them.
TINY = ["model.name=var-tiny", "model.make_vocab_size_divisible_by=24"]


def test_shards_of_another_model_are_refused(tiny_var, tmp_path):
    (own,) = [one.partition("=")[2] for one in tiny_var if one.startswith("data.path=")]
    image, label = np.zeros((4, 4), dtype=np.int64), np.array([1])
    others = {
        "one grid": (class_vocabulary(256, 10), image),
        "other grids": (pyramid_vocabulary(256, 10, (4, 2, 1)), None),
    }
    for name, (vocabulary, codes) in others.items():
        codes = np.zeros((1, 21), dtype=np.int64) if codes is None else codes
        write_shards(tmp_path / name, [Sample(codes, label)] * 9, vocabulary, None)
        check_refused([*tiny_var, f"data.path={tmp_path / name}"], tmp_path / name)
    check_refused(["model.name=llamagen-tiny", "model.codebook_size=256", f"data.path={own}"], own)


def check_refused(overrides, folder):
    with pytest.raises(UserError) as refusal:
        open_data(load_config(None, overrides))
    message = str(refusal.value)
    assert message.startswith(f"data.path: {folder} was tokenized for another vocabulary (")
    assert message.endswith("); tokenize it again for this model")


def test_a_new_model_begins_alike_on_every_layout(tmp_path):
    stored = []
    for ranks, layout_of in ((1, []), (2, TP2)):
        output = tmp_path / str(ranks)
        settings = {"overrides": [*TINY, *layout_of], "output": str(output)}
        run_workers(ranks, "var_workers.new_model", settings, tmp_path / "job")
        stored.append(StoredTensors(layout.resolve(output, ""), ""))
    one, two = stored
    assert set(one.names()) == set(two.names())
    for name in one.names():
        whole = [[0] * len(one.shape(name)), list(one.shape(name))]
        assert torch.equal(one.read_block(name, *whole), two.read_block(name, *whole)), name


def test_frozen_tensors_come_with_a_checkpoint_and_stay_as_they_are(tiny_var, tmp_path):
    (imported,) = [one.partition("=")[2] for one in tiny_var if one.startswith("training.pretrained_checkpoint=")]
    first, second = tmp_path / "TP 2", tmp_path / "one process"
    runs = [
        (2, [*TP2, "parallel.sequence_parallel=true", "training.recompute_granularity=full"], imported, first),
        (1, ["training.precision=bf16"], first, second),
        # Its adapters leave nothing of the model itself to train.
        (1, ["lora.dim=4", "reference.strategy=shared"], second, tmp_path / "adapters"),
    ]
    for ranks, overrides, start, output in runs:
        keys = [*tiny_var, "optimizer.lr=1e-2", "training.global_batch_size=8", "training.micro_batch_size=2"]
        keys += [f"training.pretrained_checkpoint={start}", f"training.output_dir={tmp_path}/nowhere", *overrides]
        settings = {"overrides": keys, "output": str(output)}
        assert run_workers(ranks, "var_workers.trained_checkpoint", settings, tmp_path / "job") == []
    frozen = frozen_tensors(var.random_quantizer(var.TINY), var.TINY)
    for folder in (first, second, tmp_path / "adapters"):
        stored = StoredTensors(layout.resolve(folder, ""), "")
        for name, value in frozen.items():
            assert stored.dtype(name) == torch.float32
            assert torch.equal(stored.read(name, None, 0, len(value)), value), name
        names = [name for name in stored.names() if "embedding.features" in name]
        assert sorted(names) == sorted(frozen)
    exported = torch.load(export_checkpoint(first, tmp_path / "out.pth", progress_bar=False), weights_only=True)
    state = torch.load(Path(imported).parent / "var.pth")
    assert exported.keys() == state.keys()
    same = {name for name, value in state.items() if torch.equal(exported[name], value)}
    assert same == var.buffers(var.TINY).keys()


def test_codes_are_as_frequent_as_the_plain_model_says(tiny_var, tmp_path):
    (imported,) = [one.partition("=")[2] for one in tiny_var if one.startswith("training.pretrained_checkpoint=")]
    images, weights = 2000, Path(imported).parent / "var.pth"
    settings = {"overrides": TINY, "images": images, "checkpoint": imported, "weights": str(weights)}
    counts, probabilities = run_workers(1, "var_workers.first_codes", settings, tmp_path)
    expected = [images * one for one in probabilities]
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in zip(counts, expected, strict=True))
    # 255 degrees of freedom: chi-square is below 331 with probability 0.999.
    assert sum(counts) == images and statistic < 331


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.pipeline_model_parallel_size=3",
            "parallel.pipeline_model_parallel_size: 3, but in var-tiny every layer takes the class, which a pipeline "
            "does not send; use 1",
        ),
        (
            "parallel.context_parallel_size=2",
            "parallel.context_parallel_size: 2, but in var-tiny the positions of a sca",
        ),
        (
            "parallel.tensor_model_parallel_size=3",
            "parallel.tensor_model_parallel_size: 3 does not divide num_attention",
        ),
        ("model.hidden_dropout=0.1", "model.hidden_dropout: 0.1, but the layers of var-tiny have none; use 0"),
        (
            "model.max_position_embeddings=40",
            "model.max_position_embeddings: 40, but the class and the codes of grids of",
        ),
        ("model.rotary_base=500", "model.rotary_base: 500.0, but positions are learned here; leave it out"),
        ("model.num_query_groups=2", "model.num_query_groups: 2, but every head has keys of its own here; use 4"),
    ],
)
def test_what_the_model_cannot_have_is_refused(override, message):
    config = load_config(None, ["model.name=var-tiny", override])
    with pytest.raises(UserError) as refusal:
        check_layout(resolve_architecture(config.model), config.model, config.parallel)
    assert str(refusal.value).startswith(message)
