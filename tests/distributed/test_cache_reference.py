"""The cache of a reference: computed by its program, continued, refused to any other run."""

import sys

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.fingerprint import weights_fingerprint
from megatron_cca.config.load import load_config
from megatron_cca.data.reference_cache import BLOCK
from megatron_cca.errors import UserError
from megatron_cca.training.batches import open_data
from megatron_cca.training.caching import check_cache
from tests.distributed.launch import ROOT, SCRIPT, run_tool, run_workers, typed
from tests.distributed.test_layout_parity import CCA

TOOL = ROOT / "tools" / "cache_reference.py"
SHORT = ["training.global_batch_size=4", "training.micro_batch_size=2"]
STEPS = BLOCK + 2


def cold(*command, cwd):
    return typed(sys.executable, *command, cwd=cwd)


@pytest.fixture(scope="module")
def overrides(digit_shards):
    return [*CCA, *SHORT, f"data.path={digit_shards}", "validation.interval=5", "validation.fraction=0.01"]


@pytest.fixture(scope="module")
def cache(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    settings = {"overrides": overrides, "folder": str(folder / "cache"), "steps": STEPS}
    first, before, second, after = run_workers(1, "continued_cache", settings, folder)
    # What was done is not done again, and what was lost comes back as it was.
    assert first == second and before == after
    return folder / "cache"


def check(overrides, cache, *more):
    uses = ["reference.strategy=cached", f"reference.cache={cache}", f"training.train_iters={STEPS}"]
    config = load_config(None, [*overrides, *uses, "training.output_dir=/nowhere", *more])
    check_cache(config, open_data(config))


def refused(*arguments):
    with pytest.raises(UserError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_run_that_it_was_computed_for_may_use_it(overrides, cache):
    check(overrides, cache)
    # These do not change a reference's log-probabilities.
    for change in ("optimizer.lr=1", "objective.beta=9", "training.micro_batch_size=4", "model.transformer_impl=local"):
        check(overrides, cache, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("objective.normalization=image", "objective.normalization vocabulary, not with this run's image"),
        ("training.seed=5", "training.seed 1234, not with this run's 5"),
        ("training.global_batch_size=8", "training.global_batch_size 4, not with this run's 8"),
        ("data.condition_dropout=0.3", "data.condition_dropout 0.2, not with this run's 0.3"),
        ("data.length_bucketing=2", "data.length_bucketing 1, not with this run's 2"),
        ("validation.fraction=0.02", "validation.fraction 0.01, not with this run's 0.02"),
        ("validation.seed=2", "validation.seed 0, not with this run's 2"),
        ("model.num_layers=2", "model.num_layers 4, not with this run's 2"),
        ("model.init_method_std=0.1", "weights drawn from seed 1234 with std 0.2, not with this run's drawn from seed"),
        ("reference.precision=bf16", "reference.precision fp32, not with this run's bf16"),
        ("training.precision=bf16", "reference.precision fp32, not with this run's bf16"),
        ("reference.fp8_param=true", "reference.fp8_param False, not with this run's True"),
        (f"training.train_iters={STEPS + 1}", f"holds training steps 0 to {STEPS - 1}, this run needs 0 to {STEPS}"),
        ("validation.iters=99", "holds validation steps 0 to 2, this run needs 0 to 98"),
    ],
)
def test_other_runs_are_refused(overrides, cache, change, words):
    assert words in refused(overrides, cache, change)


def test_other_data_are_refused(overrides, cache, tmp_path):
    from tests.references.token_shards import random_samples, write

    other = write(tmp_path / "shards", random_samples(300))
    assert " data " in refused(overrides, cache, f"data.path={other}")


def test_other_weights_are_refused(overrides, cache, checkpoints):
    one, other = checkpoints
    key = "training.pretrained_checkpoint"
    assert weights_fingerprint(one, key) != weights_fingerprint(other, key)
    assert "weights drawn from seed 1234 with std 0.2, not with this run's " in refused(
        overrides, cache, f"{key}={one}"
    )


@pytest.fixture(scope="module")
def checkpoints(overrides, tmp_path_factory):
    """Two checkpoints of the same sizes that differ in their weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("one", 1), ("other", 2)):
        changes = [f"training.seed={seed}", f"training.output_dir={folder}/{name}"]
        run_workers(
            1, "checkpoint_workers.resume", {"overrides": [*overrides, *changes], "steps": 1, "save": True}, folder
        )
    return [layout.resolve(folder / name, "key") for name in ("one", "other")]


@pytest.mark.parametrize(
    ("start", "example"),
    [
        (run_tool, "emu3_tiny_cca"),
        (run_tool, "var_d16_cca"),
        pytest.param(cold, "emu3_tiny_cca", marks=pytest.mark.full),
    ],
)
def test_from_cache_to_run(start, example, digit_shards, tiny_var, tmp_path):
    config = ROOT / "examples" / f"{example}.yaml"
    of_emu3 = ["training.pretrained_checkpoint=null", f"data.path={digit_shards}"]
    settings = of_emu3 if example == "emu3_tiny_cca" else tiny_var
    settings = [*settings, "training.train_iters=2", "training.global_batch_size=8", "training.micro_batch_size=4"]
    settings += [f"training.output_dir={tmp_path}/run"]
    command = ["--config", str(config), *(word for setting in settings for word in ("--set", setting))]
    done = start(TOOL, *command, "--output", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote cache: steps 0 to 1" in done.stdout
    uses = ["--set", "reference.strategy=cached", "--set", "reference.cache=cache"]
    done = run_tool(SCRIPT, *command, *uses, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-0 log-ratio: exactly 0" in done.stdout


def test_what_dropout_drew_is_not_kept(tmp_path):
    settings = ["model.hidden_dropout=0.1", "reference.allow_bias=9", f"training.output_dir={tmp_path}/run"]
    command = [
        *("--config", ROOT / "examples" / "emu3_tiny_cca.yaml", "--output", "cache"),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    done = run_tool(TOOL, *command, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.hidden_dropout: 0.1 draws other masks for the reference than for the policy" in done.stderr
    assert not (tmp_path / "cache").exists()
