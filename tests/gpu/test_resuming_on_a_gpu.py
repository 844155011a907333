"""One GPU: what only its optimizers and FP8 put into a checkpoint; interrupted and resumed equals uninterrupted."""

import os

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from megatron_cca.training import setup
from tests.gpu.test_reference_on_a_gpu import BF16, start, trace

pytestmark = pytest.mark.gpu
te = pytest.importorskip("transformer_engine.pytorch")
BEFORE, AFTER = 3, 3
AWARE = [BF16, "optimizer.use_precision_aware_optimizer=true"]
OFFLOAD = [*AWARE, "optimizer.optimizer_cpu_offload=true"]
OVERLAP, HALF = "optimizer.overlap_cpu_optimizer_d2h_h2d=true", "optimizer.optimizer_offload_fraction=0.5"
# Products in FP8 need 16 tokens and channels.
DELAYED = ["data.pad_to_multiple_of=16", "training.precision=fp8", "training.fp8_recipe=delayed"]
UNSAFE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def save(run):
    from megatron_cca.training.saving import begin_save

    run.checkpoints.parent.mkdir(exist_ok=True)
    begin_save(run)
    run.saver.finish()
    assert run.saver.last_saved == run.iteration


def rows(run, steps):
    return torch.tensor([[report.metrics["loss"], report.grad_norm] for report in trace(run, steps)])


def interrupted(digit_shards, folder, overrides, resumed_with=None):
    """The rows of an uninterrupted run and of one that was saved and continued; and the run that has continued."""
    whole = rows(start(digit_shards, folder / "whole", *overrides), BEFORE + AFTER)
    run = start(digit_shards, folder / "cut", *overrides)
    first = rows(run, BEFORE)
    save(run)
    resumed = start(digit_shards, folder / "cut", *(overrides if resumed_with is None else resumed_with))
    assert resumed.iteration == BEFORE
    return whole, torch.cat([first, rows(resumed, AFTER)]), resumed


# The embedding's gradient adds in any order on a GPU, and bf16 rounds what differs.
def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def contents(run):
    stored = StoredTensors(layout.iteration_folder(run.checkpoints, run.iteration), "checkpoint")
    shapes = {name: stored.shape(name) for name in stored.names()}
    return {name: stored.read_block(name, [0] * len(shape), shape) for name, shape in shapes.items()}


def test_a_save_waits_by_default_and_a_fork_that_is_asked_for_writes_the_same(digit_shards, tmp_path):
    """CUDA does not promise the fork: here it is measured."""
    waits = start(digit_shards, tmp_path / "waits", BF16)
    assert not waits.saver._in_background
    trace(waits, 2)
    save(waits)
    for asked in (True, False):
        run = start(digit_shards, tmp_path / "waits", BF16, f"training.async_save={str(asked).lower()}")
        assert run.saver._in_background == asked
        before = contents(run)
        save(run)
        after = contents(run)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("more", [[], [HALF], [OVERLAP]], ids=["all", "half", "overlapped"])
def test_an_offloaded_optimizer_resumes(more, digit_shards, tmp_path):
    whole, resumed, run = interrupted(digit_shards, tmp_path, [*OFFLOAD, *more])
    assert_same(resumed, whole)
    optimizer = run.optimizer.chained_optimizers[0].optimizer
    on_gpu = optimizer.gpu_optimizer
    assert (on_gpu is not None) == (more == [HALF])
    counts = [group["step"] for group in on_gpu.param_groups] if on_gpu is not None else []
    counts += [int(state["step"]) for part in optimizer.cpu_optimizers for state in part.state.values()]
    assert {*counts} == {BEFORE + AFTER}


def test_an_optimizer_may_move_to_the_host_and_back(digit_shards, tmp_path):
    """It goes on as one of the two runs that stay where they are: their roundings differ by themselves."""
    stayed, moved = [], []
    for name, before, after in (("there", AWARE, OFFLOAD), ("back", OFFLOAD, AWARE)):
        (tmp_path / name).mkdir()
        whole, resumed, _ = interrupted(digit_shards, tmp_path / name, before, after)
        stayed.append(whole)
        moved.append(resumed)
    for one in moved:
        assert_same(one, min(stayed, key=lambda whole, one=one: ((one - whole) / whole).abs().max()))


@pytest.mark.parametrize("moments", [[], ["optimizer.exp_avg_dtype=bf16"], ["optimizer.main_params_dtype=fp16"]])
def test_a_precision_aware_optimizer_resumes(moments, digit_shards, tmp_path):
    whole, resumed, _ = interrupted(digit_shards, tmp_path, [*AWARE, *moments])
    assert_same(resumed, whole)


def test_a_precision_aware_optimizer_may_become_a_plain_one(digit_shards, tmp_path):
    """Its master weights are whole, whoever reads them."""
    whole, resumed, _ = interrupted(digit_shards, tmp_path, AWARE, [BF16])
    assert_same(resumed, whole)


def test_remainders_of_master_weights_are_not_resumed(digit_shards, tmp_path, monkeypatch):
    """Megatron-Core's default, which earlier versions of this package took."""
    settings = setup.optimizer_settings

    def with_remainders(config):
        found = settings(config)
        found.store_param_remainders = True
        return found

    monkeypatch.setattr(setup, "optimizer_settings", with_remainders)
    run = start(digit_shards, tmp_path, *AWARE)
    trace(run, 2)
    save(run)
    for overrides in (AWARE, [BF16]):
        with pytest.raises(UserError, match="its master weights are not those of its weights"):
            start(digit_shards, tmp_path, *overrides)


@pytest.fixture
def strict_engine(monkeypatch):
    """Transformer Engine refuses pickled extra states as 2.16 and later do, also where it is older."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    take, taken = TransformerEngineBaseModule.set_extra_state, []

    def take_if_allowed(module, state):
        if state is not None and state.numel():
            if os.environ.get(UNSAFE, "0") != "1":
                raise RuntimeError(f"Refusing to load pickled Transformer Engine extra state; set {UNSAFE}=1")
            taken.append(module)
        take(module, state)

    monkeypatch.delenv(UNSAFE, raising=False)
    monkeypatch.setattr(TransformerEngineBaseModule, "set_extra_state", take_if_allowed)
    return taken


def test_delayed_scales_resume_whatever_the_engine_thinks_of_pickles(strict_engine, digit_shards, tmp_path):
    overrides = [*DELAYED, "reference.allow_bias=100"]
    whole, resumed, _ = interrupted(digit_shards, tmp_path, overrides)
    assert_same(resumed, whole)
    assert strict_engine and UNSAFE not in os.environ
