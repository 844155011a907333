"""What this machine's device cannot do, and sizes that FP8 cannot take: refused by name."""

import sys
import types

import pytest

from megatron_cca import platform
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import layers
from megatron_cca.training import computes_plainly
from megatron_cca.training.kernel_checks import check_devices

FP8 = ["training.precision=fp8", "data.pad_to_multiple_of=16"]
EIGHT_B = ["model.name=emu3-8b", "data.path=x"]


def refused(*overrides):
    config = load_config(None, overrides)
    with pytest.raises(UserError) as error:
        check_devices(config)
    # Else a run would not ask.
    assert not computes_plainly(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def gpu(monkeypatch):
    """Transformer Engine's answers about a GPU, in their form of version 2.11; nothing is computed."""

    def answers(fp8=(True, ""), blockwise=(True, "")):
        engine = types.ModuleType("transformer_engine.pytorch")
        engine.is_fp8_available = lambda return_reason: fp8
        engine.is_fp8_block_scaling_available = lambda return_reason: blockwise
        monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)

    monkeypatch.setattr(layers, "HAVE_TE", True)
    monkeypatch.setattr(platform, "current", lambda: types.SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(platform, "device_name", lambda: "NVIDIA A100")
    answers()
    return answers


@pytest.mark.parametrize("key", ["training.precision", "reference.precision"])
def test_fp8_without_transformer_engine_is_refused(key):
    assert refused(f"{key}=fp8").startswith(
        f"{key}: fp8 needs a GPU of the Ada, Hopper or Blackwell generation and the package transformer-engine (pip "
    )


def test_fp8_on_hardware_that_lacks_it_is_refused_with_the_reason(gpu):
    gpu(fp8=(False, "Device compute capability 8.9 or higher required for FP8 execution."))
    assert refused(*FP8) == (
        "training.precision: fp8 with recipe tensorwise is not for NVIDIA A100: "
        "Device compute capability 8.9 or higher required for FP8 execution. Use bf16 here"
    )


def test_each_recipe_asks_for_its_own_hardware(gpu):
    gpu(blockwise=(False, "FP8 block scaled GEMM requires compute capability 9.0 or higher."))
    check_devices(load_config(None, FP8))
    # The preset's widths are no multiples of 128: hardware comes first.
    assert "recipe blockwise is not for" in refused(*FP8, "reference.fp8_recipe=blockwise")


def test_a_cached_reference_needs_no_fp8_here(gpu):
    gpu(fp8=(False, "none"))
    check_devices(load_config(None, ["reference.precision=fp8", "reference.strategy=cached", "reference.cache=x"]))
    check_devices(load_config(None, ["reference.precision=fp8", "objective.name=next_token"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*FP8, "model.ffn_hidden_size=40"],
            "training.precision: fp8 with recipe tensorwise needs widths that are multiples of 16; "
            "model.ffn_hidden_size is 40",
        ),
        (
            [*EIGHT_B, "training.precision=fp8", "training.micro_batch_size=1"],
            "data.pad_to_multiple_of: 1, but training.precision fp8 needs microbatches whose tokens are a multiple of "
            "16 on each rank; with 2 rows use a multiple of 8",
        ),
        (
            [*FP8, "reference.fp8_recipe=blockwise"],
            "reference.precision: fp8 with recipe blockwise needs widths that are multiples of 128; model.hidden_size",
        ),
        (
            [*FP8, "parallel.tensor_model_parallel_size=2", "model.ffn_hidden_size=176"],
            "training.precision: fp8 with recipe tensorwise needs widths that are multiples of 16; "
            "model.ffn_hidden_size on each of 2 tensor-parallel ranks is 88",
        ),
        (
            [*FP8, "model.transformer_impl=local"],
            "model.transformer_impl: training.precision fp8 needs Transformer Engine's layers; use auto",
        ),
    ],
)
def test_sizes_that_fp8_cannot_take_are_refused(gpu, overrides, message):
    assert refused(*overrides).startswith(message)


def test_sequence_parallel_ranks_each_need_whole_blocks(gpu):
    overrides = [*FP8, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    overrides += ["model.hidden_size=128", "model.ffn_hidden_size=256", "training.micro_batch_size=1"]
    check_devices(load_config(None, overrides))
    assert "with 2 rows use a multiple of 16" in refused(*overrides, "data.pad_to_multiple_of=8")


def test_optimizer_settings_for_gpus_are_refused_without_one():
    assert refused("optimizer.optimizer_cpu_offload=true") == (
        "optimizer.optimizer_cpu_offload: there is no GPU to offload from; leave it out"
    )
    assert refused("optimizer.use_precision_aware_optimizer=true").startswith(
        "optimizer.use_precision_aware_optimizer: needs a GPU and the package transformer-engine"
    )


OFFLOAD, FORK = "reference.strategy=offload", "training.async_save=true"


def test_a_fork_beside_locked_host_memory_is_refused(gpu):
    assert refused(OFFLOAD, FORK).startswith("training.async_save: true forks a process at each save, which either")
    for overrides in ([OFFLOAD], [FORK], [OFFLOAD, FORK, "objective.name=next_token"]):
        check_devices(load_config(None, overrides))


def test_a_cpu_locks_no_memory():
    check_devices(load_config(None, [OFFLOAD, FORK]))
