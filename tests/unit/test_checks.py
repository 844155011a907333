"""What a run is refused for before any process group is made, and in which words."""

import json
import math
from pathlib import Path

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.errors import UserError
from megatron_cca.models import explicit, resolve_architecture
from megatron_cca.models.architecture import padded_vocab_size
from megatron_cca.training import host_memory
from megatron_cca.training.checks import check_run, data_parallel_size


def a_run(overrides):
    return load_config(None, ["data.path=digits", *overrides])


def refused(overrides, world_size=1):
    with pytest.raises(UserError) as error:
        check_run(a_run(overrides), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["model.name=emu4"], 1, "model.name: unknown preset 'emu4'; known: emu3-8b, emu3-tiny"),
        (
            ["parallel.tensor_model_parallel_size=3"],
            3,
            "parallel.tensor_model_parallel_size: 3 does not divide num_attention_heads 4; possible: 1, 2, 4",
        ),
        (
            ["parallel.tensor_model_parallel_size=4"],
            4,
            "parallel.tensor_model_parallel_size: 4 does not divide num_query_groups 2; possible: 1, 2",
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "model.padded_vocab_size=457"],
            2,
            "parallel.tensor_model_parallel_size: 2 does not divide padded_vocab_size 457; possible: 1",
        ),
        (["model.padded_vocab_size=100"], 1, "model.padded_vocab_size: 100 is less than the vocabulary of 456"),
        (
            ["parallel.pipeline_model_parallel_size=3"],
            3,
            "parallel.pipeline_model_parallel_size: 3 does not divide num_layers 4; possible: 1, 2, 4",
        ),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel: needs parallel.tensor_model_parallel"),
        (
            ["parallel.tensor_model_parallel_size=2"],
            3,
            "parallel.tensor_model_parallel_size 2 x parallel.pipeline_model_parallel_size 1 does not divide the 3",
        ),
        (
            ["training.global_batch_size=100", "training.micro_batch_size=32"],
            1,
            "training.global_batch_size: 100 is not a multiple of training.micro_batch_size 32 x data-parallel size 1; "
            "the nearest that is: 96",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            1,
            "parallel.virtual_pipeline_model_parallel_size: needs parallel.pipeline_model_parallel_size of 2 or more",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=3"],
            2,
            "parallel.virtual_pipeline_model_parallel_size: 3 does not divide the layers of a pipeline rank, 2; "
            "possible: 1, 2",
        ),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "training.global_batch_size=96",
            ],
            2,
            "training.global_batch_size: 96 gives each rank 3 microbatches; with "
            "parallel.virtual_pipeline_model_parallel_size their number must be a multiple of "
            "parallel.pipeline_model_parallel_size 2, so the batch one of 64",
        ),
        (
            ["parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2"],
            2,
            "parallel.tensor_model_parallel_size 2 x parallel.pipeline_model_parallel_size 1 x "
            "parallel.context_parallel_size 2 does not divide the 2 processes of this job; start a multiple of 4",
        ),
        (["model.num_attention_heads=5"], 1, "model.num_attention_heads: 5 does not divide hidden_size 64"),
        (["model.num_query_groups=3"], 1, "model.num_query_groups: 3 does not divide num_attention_heads 4"),
        (["optimizer.min_lr=1", "optimizer.lr=0.1"], 1, "optimizer.min_lr: 1.0 is more than optimizer.lr 0.1"),
        (["training.pretrained_checkpoint=/nowhere"], 1, "training.pretrained_checkpoint: no checkpoint at /nowhere"),
        (["reference.checkpoint=/nowhere"], 1, "reference.checkpoint: no checkpoint at /nowhere"),
    ],
)
def test_impossible_runs_are_refused(overrides, world_size, message, tmp_path):
    assert refused([*overrides, f"training.output_dir={tmp_path}/run"], world_size).startswith(message)


SHARED = ["reference.strategy=shared"]
LORA = ["lora.dim=4"]
EIGHT_B = ["model.name=emu3-8b"]
AWARE = ["optimizer.use_precision_aware_optimizer=true", "training.precision=bf16"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            SHARED,
            "reference.strategy: shared is the policy with its LoRA adapters off, and this run has none; set lora",
        ),
        (
            [*SHARED, *LORA, "reference.checkpoint=/nowhere"],
            "reference.checkpoint: /nowhere cannot be shared, since the policy starts from random weights; leave",
        ),
        (
            [*SHARED, *LORA, "reference.precision=bf16"],
            "reference.precision: a shared reference computes as the policy",
        ),
        (
            [*SHARED, *LORA, "reference.fp8_param=true"],
            "reference.fp8_param: a shared reference computes as the policy",
        ),
        (
            ["reference.strategy=cached"],
            "reference.cache: missing; compute the log-probabilities with megatron-cca cache-ref",
        ),
        (["reference.cache=x"], "reference.cache: of no use with reference.strategy resident; set that to cached"),
        (
            [*EIGHT_B, "model.num_layers=320", "reference.strategy=offload", "training.global_batch_size=256"],
            "reference.strategy: offload needs 266G",
        ),
        (
            ["optimizer.use_precision_aware_optimizer=true", "optimizer.use_distributed_optimizer=false"],
            "optimizer.use_precision_aware_optimizer: needs optimizer.use_distributed_optimizer",
        ),
        (
            ["optimizer.use_precision_aware_optimizer=true", "training.precision=fp32"],
            "optimizer.use_precision_aware_optimizer: of no use with training.precision fp32",
        ),
        (
            [*AWARE, "optimizer.main_grads_dtype=bf16"],
            "optimizer.main_grads_dtype: bf16 needs optimizer.grad_reduce_in_fp32 false",
        ),
        (
            ["optimizer.optimizer_cpu_offload=true", "training.precision=bf16"],
            "optimizer.optimizer_cpu_offload: needs optimizer.use_precision_aware_optimizer, without which Megatron-Co",
        ),
        (
            [*AWARE, "optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=0"],
            "optimizer.optimizer_offload_fraction: 0 moves nothing; leave optimizer.optimizer_cpu_offload out",
        ),
        (
            [*AWARE, "optimizer.optimizer_cpu_offload=true", "optimizer.exp_avg_dtype=bf16"],
            "optimizer.exp_avg_dtype: bf16, but optimizer.optimizer_cpu_offload keeps fp32",
        ),
        (["optimizer.exp_avg_dtype=bf16"], "optimizer.exp_avg_dtype: bf16 needs optimizer.use_precision_aware_optim"),
        (
            ["optimizer.overlap_cpu_optimizer_d2h_h2d=true"],
            "optimizer.overlap_cpu_optimizer_d2h_h2d: of no use without optimizer.optimizer_cpu_offload",
        ),
    ],
)
def test_references_and_precisions_that_cannot_be_had_are_refused(overrides, message):
    assert refused(overrides).startswith(message)


def test_an_offloaded_reference_needs_room_for_every_process_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where there is no run of the examples
    overrides = [*EIGHT_B, "reference.strategy=offload", "training.precision=bf16", "training.micro_batch_size=1"]
    # 8,492,011,520 weights of two bytes.
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 2 * 8_492_011_520)
    check_run(a_run(overrides), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "offload needs 31.6GiB of host memory on this machine, 15.8GiB are available" in refused(overrides, 2)
    check_run(a_run([*overrides, "parallel.tensor_model_parallel_size=2"]), 2)
    # All but the LM head in one byte.
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: 2 * (8_492_011_520 + 184_622 * 4096))
    check_run(a_run([*overrides, "reference.fp8_param=true"]), 2)


def test_a_run_may_go_on_with_another_reference_strategy(run_folder):
    here = [f"training.output_dir={run_folder}"]
    check_run(a_run([*here, "reference.strategy=offload", "reference.allow_bias=1"]), 1)
    assert "reference.precision: 'bf16', but the run in" in refused([*here, "reference.precision=bf16"])
    assert "lora.dim: 4, but the run in" in refused([*here, "lora.dim=4"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path={}"], "data.path: names no folder"),
        (
            ["data.path=null"],
            "data.path: missing; name a folder of token shards, which megatron-cca tokenize writes",
        ),
        (["validation.interval=5"], "validation.interval: 5, but nothing to validate on; set validation.fraction"),
        (
            ["validation.fraction=0.1", "validation.path=shards"],
            "validation.fraction: of no use beside validation.path; leave one of them out",
        ),
    ],
)
def test_validations_of_nothing_are_refused(overrides, message):
    assert refused(overrides).startswith(message)


DROPOUT = ["model.hidden_dropout=0.1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (DROPOUT, "model.hidden_dropout: 0.1: must be 0 for objective cca, since dropout makes policy and reference"),
        (
            ["model.attention_dropout=0.2", "objective.name=dpo", "reference.strategy=offload"],
            "model.attention_dropout: 0.2: must be 0 for objective dpo",
        ),
        (
            [*DROPOUT, "reference.strategy=cached", "reference.cache=x", "reference.allow_bias=9"],
            "model.hidden_dropout: 0.1 draws other masks for the reference than for the policy, which "
            "reference.strategy cached cannot have; set it to 0, or use resident or offload",
        ),
        (
            [*DROPOUT, *SHARED, *LORA, "reference.allow_bias=9"],
            "model.hidden_dropout: 0.1 draws other masks for the reference than for the policy, which "
            "reference.strategy shared cannot have",
        ),
    ],
)
def test_dropout_beside_a_reference_must_be_asked_for(overrides, message):
    assert refused(overrides).startswith(message)


@pytest.mark.parametrize("strategy", ["resident", "offload"])
def test_dropout_beside_a_reference_can_be_had(strategy, tmp_path):
    overrides = [*DROPOUT, f"reference.strategy={strategy}", "reference.allow_bias=1"]
    check_run(a_run([*overrides, f"training.output_dir={tmp_path}"]), 1)


def test_partners_want_pairs_of_images():
    line = (
        "data.partner_path: elsewhere, but this run has no pairs of images; leave it out, or set data.pairs to images"
    )
    assert refused(["objective.name=dpo", "data.partner_path=elsewhere"], 2) == line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.pairs=conditions"],
            "data.pairs: conditions, but gft has no pairs; leave it out, or set objective.name",
        ),
        (["data.pairs=images"], "data.pairs: images, but gft has no pairs; leave it out"),
        (
            ["data.partner_path=elsewhere"],
            "data.partner_path: elsewhere, but this run has no pairs of images; leave it out, or set "
            "objective.name to one of ddo, dpo, ipo, kto, nca",
        ),
        (["reference.strategy=cached"], "reference.strategy: cached, but gft has no reference; leave it out"),
        (["reference.checkpoint=base"], "reference.checkpoint: base, but gft has no reference; leave it out"),
        (["reference.allow_bias=1"], "reference.allow_bias: 1.0, but gft has no reference; leave it out"),
        (
            ["parallel.context_parallel_size=2"],
            "parallel.context_parallel_size: 2, but gft mixes two rows whose images can lie on different ranks then; "
            "set it to 1",
        ),
    ],
)
def test_gft_has_neither_pairs_nor_a_reference(overrides, message):
    assert refused(["objective.name=gft", *overrides], 2).startswith(message)


def test_the_share_of_gft_is_a_share():
    for value in ("0", "1.5"):
        with pytest.raises(UserError, match=r"^objective\.beta: must be "):
            a_run(["objective.name=gft", f"objective.beta={value}"])
    assert a_run(["objective.name=gft", "objective.beta=1.0"]).objective.conditional_share == 1.0


def test_dropout_is_fine_for_next_token(tmp_path):
    overrides = ["model.hidden_dropout=0.1", "objective.name=next_token", f"training.output_dir={tmp_path}"]
    check_run(a_run(overrides), 1)


def test_data_parallel_size_is_what_is_left():
    config = load_config(None, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"])
    assert data_parallel_size(config, 8) == 2


@pytest.mark.parametrize(("tp", "rows"), [(1, 82), (2, 210), (4, 210), (8, 722)])
def test_emu3s_vocabulary_is_padded_as_megatron_pads_it(tp, rows):
    config = load_config(None, ["model.name=emu3-8b"]).model
    architecture = resolve_architecture(config)
    assert padded_vocab_size(architecture, config, tp) - architecture.vocabulary.size == rows


@pytest.fixture
def run_folder(tmp_path):
    """A finished run with a whole checkpoint (its tensors are not read here)."""
    root = tmp_path / "run" / layout.FOLDER
    partial = layout.partial_folder(root, 10)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"x" * 100)
    config = a_run([f"training.output_dir={tmp_path}/run"])
    layout.finalize(partial, root, 10, {"config": config_to_dict(explicit(config))})
    return tmp_path / "run"


def test_a_checkpoint_is_found_by_any_of_its_folders(run_folder):
    whole = run_folder / layout.FOLDER / "iter_0000010"
    for path in (run_folder, run_folder / layout.FOLDER, whole):
        assert layout.resolve(path, "key") == whole


def test_half_written_and_damaged_checkpoints_are_named(run_folder):
    whole = run_folder / layout.FOLDER / "iter_0000010"
    override = [f"training.pretrained_checkpoint={run_folder}", "training.output_dir=/nowhere/else"]
    check_run(a_run(override), 1)
    shard = whole / "__0_0.distcp"
    shard.write_bytes(b"x" * 99)
    assert "__0_0.distcp has 99 bytes instead of 100: it is truncated" in refused(override)
    shard.unlink()
    assert "__0_0.distcp is missing: the checkpoint is incomplete" in refused(override)
    (whole / layout.SUMMARY).write_text("{")
    assert "checkpoint.json is damaged" in refused(override)
    (whole / layout.SUMMARY).unlink()
    assert "has no checkpoint.json: it is half-written" in refused(override)
    (whole.parent / layout.LATEST).write_text("soon")
    assert "holds 'soon' instead of an iteration number" in refused(override)


def test_weights_of_another_size_are_refused(run_folder):
    message = refused([f"training.pretrained_checkpoint={run_folder}", "model.num_layers=2", "training.output_dir=/x"])
    assert "has num_layers 4, this run's model 2" in message
    longer = [f"training.pretrained_checkpoint={run_folder}", "model.max_position_embeddings=256"]
    check_run(a_run([*longer, "training.output_dir=/x"]), 1)


def test_what_is_held_out_stays_held_out_and_reading_may_change(run_folder):
    here = [f"training.output_dir={run_folder}"]
    check_run(a_run([*here, "data.prefetch=9", "data.pad_to_multiple_of=64"]), 1)
    for change in ("validation.fraction=0.1", "validation.seed=1", "data.length_bucketing=2"):
        assert "was started with" in refused([*here, change])


def test_a_run_does_not_continue_as_another_run(run_folder):
    same = [f"training.output_dir={run_folder}"]
    check_run(a_run([*same, "training.train_iters=99", "training.micro_batch_size=16"]), 1)
    message = refused([*same, "objective.beta=0.5"])
    assert message.startswith("objective.beta: 0.5, but the run in")
    assert "was started with 0.02" in message
    assert refused([*same, "training.seed=5"]).startswith("training.seed: 5, but the run in")


def test_the_summary_lists_every_file(run_folder):
    summary = json.loads((run_folder / layout.FOLDER / "iter_0000010" / layout.SUMMARY).read_text())
    assert summary["files"] == {"__0_0.distcp": {"bytes": 100, "xxh3": "add9998d55ed3962e18dc405a95cc094"}}
    assert summary["iteration"] == 10


ROOT = Path(__file__).resolve().parents[2] / "examples"
# Those are files of another kind, each with its own tests.
OTHERS = {"cluster", "scaling", "studies"}
EXAMPLES = sorted(file for file in ROOT.rglob("*.yaml") if file.parent.name not in OTHERS)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_can_run_on_eight_ranks_or_on_what_its_layout_takes(file, tmp_path):
    overrides = ["training.pretrained_checkpoint=null", f"training.output_dir={tmp_path}"]
    config = load_config(file, overrides)
    if config.model.name.endswith("-tiny"):
        config = load_config(file, [*overrides, "parallel.tensor_model_parallel_size=2"])
    parallel = config.parallel
    check_run(config, math.lcm(8, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))
