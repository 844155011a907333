"""Configurations that earlier versions wrote down are read with today's keys. Oracle: what those versions did."""

import json

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import Config, former
from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.data.reference_cache import ReferenceCache, ReferenceCacheWriter
from megatron_cca.errors import UserError
from megatron_cca.keys import values
from megatron_cca.models import explicit
from megatron_cca.training.resuming import check_resume

# What the first version wrote for a run of the defaults, but for the sizes of the model.
FIRST = json.loads("""{
"model": {"name": "emu3-tiny", "make_vocab_size_divisible_by": 128, "padded_vocab_size": null, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "init_method_std": 0.02, "transformer_impl": "auto"},
"parallel": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": false},
"objective": {"name": "cca", "beta": 0.02, "negative_weight": 1.0},
"reference": {"strategy": "resident", "checkpoint": null},
"data": {"path": "digits", "condition_dropout": 0.1},
"optimizer": {"lr": 1e-05, "min_lr": 0.0, "lr_decay_style": "constant", "lr_warmup_iters": 0, "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-08, "clip_grad": 1.0, "use_distributed_optimizer": true,
    "overlap_grad_reduce": false},
"training": {"train_iters": 60, "micro_batch_size": 32, "global_batch_size": 256, "seed": 1234, "precision": "fp32",
    "output_dir": "runs/emu3_tiny_cca", "pretrained_checkpoint": null, "save_interval": 0,
    "distributed_timeout_minutes": 10},
"logging": {"tensorboard": true, "progress_bar": true}
}""")
# What versions did before there was a key, or while its default was another one.
DID = {"data.path": "digits", "training.async_save": False, "training.logps_chunk_size": 1024}


@pytest.fixture
def written(tmp_path):
    """Write a checkpoint with a configuration into a run's folder; returns the folder of the checkpoint."""

    def write(tree):
        root = tmp_path / "run" / layout.FOLDER
        partial = layout.partial_folder(root, 10)
        partial.mkdir(parents=True)
        layout.finalize(partial, root, 10, {"config": tree})
        return layout.iteration_folder(root, 10)

    return write


def read(folder):
    return values(saved_config(folder, "training.pretrained_checkpoint"))


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_of_the_first_version_is_what_it_was(written):
    assert read(written(FIRST)) == values(explicit(Config())) | DID


def test_a_run_of_the_first_version_continues(written, tmp_path):
    written(FIRST)
    here = [f"training.output_dir={tmp_path}/run", "data.path=digits"]
    check_resume(load_config(None, here))
    assert refusal(check_resume, load_config(None, [*here, "objective.normalization=image"])).startswith(
        "objective.normalization: 'image', but the run in "
    )


@pytest.mark.parametrize("key", values(Config()))
def test_a_key_that_a_version_did_not_have_is_what_it_did(key, written):
    tree = config_to_dict(explicit(Config()))
    section, _, name = key.partition(".")
    del tree[section][name]
    expected = DID.get(key, values(explicit(Config()))[key])
    assert read(written(tree))[key] == expected


def test_what_a_version_wrote_is_not_replaced(written):
    given = {"data": {"path": "elsewhere"}, "training": {"async_save": True, "logps_chunk_size": 7}}
    found = read(written(given))
    assert [found[key] for key in DID] == ["elsewhere", True, 7]


def test_a_renamed_key_keeps_its_value_and_a_dropped_one_is_left_out(written, monkeypatch):
    monkeypatch.setitem(former.RENAMED, "training.rows", "training.micro_batch_size")
    monkeypatch.setitem(former.RENAMED, "loss.scale", "objective.beta")
    monkeypatch.setitem(former.DROPPED, "training.turbo", "leave it out, runs are always fast")
    found = read(written({"training": {"rows": 4, "turbo": True}, "loss": {"scale": 0.5}}))
    assert (found["training.micro_batch_size"], found["objective.beta"]) == (4, 0.5)
    assert refusal(load_config, None, ["training.rows=4"]) == (
        "training.rows: is called training.micro_batch_size now; rename it"
    )
    assert refusal(load_config, None, ["training.turbo=true"]) == (
        "training.turbo: is no key any more; leave it out, runs are always fast"
    )


def test_a_former_key_leads_to_one_of_today():
    assert set(former.WITHOUT) | set(former.RENAMED.values()) <= values(Config()).keys()
    assert not (former.RENAMED.keys() | former.DROPPED.keys()) & values(Config()).keys()


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"training": {"turbo": True}}, "training.turbo: unknown key"),
        ({"trainings": {"seed": 1}}, "trainings: unknown key; did you mean training?"),
        ({"training": 5}, "training: expected keys below this section, found 5"),
        ({"training": {"seed": "x"}}, "training.seed: "),
    ],
)
def test_what_no_version_wrote_is_refused_by_name(tree, said, written):
    folder = written(tree)
    assert f"{folder / layout.SUMMARY}: {said}" in refusal(read, folder)


def test_a_cache_of_a_version_without_a_key_was_computed_with_what_it_did(tmp_path):
    ReferenceCacheWriter(tmp_path, {"training.seed": 1}, {})
    cache = ReferenceCache(tmp_path)
    cache.check({"training.seed": 1, "objective.normalization": "vocabulary"})
    message = refusal(cache.check, {"training.seed": 1, "objective.normalization": "image"})
    assert "was computed with objective.normalization vocabulary, not with this run's image" in message
