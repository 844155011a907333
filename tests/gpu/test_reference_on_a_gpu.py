"""One GPU: every reference strategy gives the same numbers, holds what it says, and overlaps what it copies."""

import pytest
import torch

from megatron_cca.config.load import load_config
from tests.distributed.test_layout_parity import CCA
from tests.gpu.memory import bytes_in_use

pytestmark = pytest.mark.gpu
WIDE = [
    "model.hidden_size=512",
    "model.ffn_hidden_size=1024",
    "model.num_attention_heads=8",
    "model.num_query_groups=8",
]
OFFLOAD, SHARED = "reference.strategy=offload", "reference.strategy=shared"
LORA, FP8_WEIGHTS = "lora.dim=8", "reference.fp8_param=true"
BF16 = "training.precision=bf16"


def start(digit_shards, folder, *overrides):
    return started(*CCA, f"data.path={digit_shards}", f"training.output_dir={folder}", *overrides)


def started(*overrides):
    from megatron_cca.parallel.ranks import initialize_distributed
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.setup import set_up

    config = load_config(None, list(overrides))
    initialize_distributed(config)
    return set_up(config, open_data(config))


def trace(run, steps=5):
    from megatron_cca.training.step import train_step

    with run.loader:
        return [train_step(run) for _ in range(steps)]


def numbers(reports):
    return [(report.metrics, report.grad_norm, report.log_ratio.worst) for report in reports]


def cached(digit_shards, folder, *overrides):
    """The overrides of a run that reads what this run's reference says."""
    from megatron_cca.training.batches import open_data
    from megatron_cca.training.caching import cache_reference

    config = load_config(None, [*CCA, f"data.path={digit_shards}", *overrides])
    cache_reference(config, open_data(config), folder / "cache", 0, 5)
    return ["reference.strategy=cached", f"reference.cache={folder}/cache"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_strategies_agree_to_the_last_bit(precision, implementation, digit_shards, tmp_path):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    common = [f"training.precision={precision}", f"model.transformer_impl={implementation}"]
    resident = numbers(trace(start(digit_shards, tmp_path / "a", *common)))
    assert resident[0][2] == 0.0 and resident[1][2] > 0.0
    assert numbers(trace(start(digit_shards, tmp_path / "b", *common, OFFLOAD))) == resident
    uses = cached(digit_shards, tmp_path, *common)
    assert numbers(trace(start(digit_shards, tmp_path / "c", *common, *uses))) == resident
    adapted = numbers(trace(start(digit_shards, tmp_path / "d", *common, LORA)))
    assert numbers(trace(start(digit_shards, tmp_path / "e", *common, LORA, SHARED))) == adapted


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_weights_in_fp8_are_near_and_the_same_offloaded(implementation, digit_shards, tmp_path):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    common = [BF16, f"model.transformer_impl={implementation}", FP8_WEIGHTS]
    resident = numbers(trace(start(digit_shards, tmp_path / "a", *common)))
    assert 0.0 < resident[0][2] < 5.0
    assert numbers(trace(start(digit_shards, tmp_path / "b", *common, OFFLOAD))) == resident


def held_bytes(digit_shards, folder, *overrides):
    before = bytes_in_use()
    run = start(digit_shards, folder, BF16, *WIDE, *overrides)
    trace(run, 2)
    held = bytes_in_use() - before
    del run
    return held


@pytest.mark.needs_hardware("memory")
def test_each_strategy_keeps_on_the_gpu_what_it_says(digit_shards, tmp_path):
    held = {
        name: held_bytes(digit_shards, tmp_path / name, *overrides)
        for name, overrides in {"resident": [], "offload": [OFFLOAD], "fp8": [FP8_WEIGHTS]}.items()
    }
    weights = held["resident"] - held["offload"]
    assert weights > 10e6
    assert held["fp8"] - held["offload"] < 0.56 * weights


@pytest.mark.needs_hardware("streams")
def test_copies_of_an_offloaded_reference_run_beside_the_computation(tmp_path):
    """The copy waits for what was queued before it, and the queue for the copy only where its tensors are used."""
    from megatron_cca.platform.host_weights import Fetcher, host_copy

    busy = torch.randn(4096, 4096, device="cuda")
    hosts = [host_copy(torch.full((2**22,), float(value), device="cuda")) for value in range(3)]
    fetcher = Fetcher()
    arriving = fetcher.start(hosts)
    for _ in range(20):
        busy = busy @ busy / 64
    for value, tensor in enumerate(arriving.wait()):
        assert (tensor == value).all()
    assert all(tensor.is_pinned() for tensor in hosts)


@pytest.mark.needs_hardware("streams")
def test_what_a_dropped_copy_held_is_not_overwritten_by_it():
    from megatron_cca.platform.host_weights import Fetcher, host_copy

    host = host_copy(torch.ones(2**24, device="cuda"))
    fetcher = Fetcher()
    for _ in range(20):
        arriving = fetcher.start([host])
        arriving.wait()
        del arriving
        fresh = torch.zeros(2**24, device="cuda")
        torch.cuda.synchronize()
        assert not fresh.any()
