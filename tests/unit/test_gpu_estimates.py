"""What benchmarks/gpu.py asks of a GPU can be known before: runs that training accepts, that fit and end in time."""

import sys

import pytest

from tests.distributed.launch import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from gpu_parts.estimates import GIB, estimates, expected
from gpu_parts.settings import HEAD, LLAMAGEN, LORA, STEP, settings_of

from megatron_cca.lab.planner.hardware import gpu_named
from megatron_cca.training.checks import check_new_run

SETTINGS = {(part, one.name): one for part in (HEAD, STEP, LLAMAGEN, LORA) for one in settings_of(part, False, [])}


@pytest.fixture(scope="module")
def on_h200():
    return {(one.part, one.name): one for one in expected(gpu_named("h200"))}


def test_every_setting_has_an_estimate_that_its_time_suffices_for(on_h200):
    assert on_h200.keys() == SETTINGS.keys()
    short = {key: one.seconds for key, one in on_h200.items() if one.seconds > SETTINGS[key].seconds}
    assert not short, "settings that need more seconds than they ask for"


def test_every_run_fits_an_h200_and_the_first_ones_fit_80_gb(on_h200):
    h200 = gpu_named("h200").memory_bytes / GIB
    # 3 GiB for CUDA's context and what the allocator cannot use.
    assert all(one.gib + 3 < h200 for one in on_h200.values() if one.gib is not None)
    firsts = [next(one for key, one in on_h200.items() if key[0] == part) for part in (STEP, LLAMAGEN, LORA)]
    assert all(one.gib + 3 < gpu_named("h100-80gb").memory_bytes / GIB for one in firsts)


@pytest.mark.parametrize("part", [STEP, LLAMAGEN, LORA])
def test_training_accepts_every_run(part):
    from gpu_parts.training import configured

    for one in settings_of(part, False, []):
        check_new_run(configured(one.values)[0], 1)


def test_the_tables_say_how_long_each_part_takes():
    text = estimates("h200")
    assert all(f"{part} " in text.rpartition("each: ")[2] for part in (HEAD, STEP, LLAMAGEN, LORA))
    # 3 products of 8,192 x 4,096 x 184,622.
    assert "| dense, 8,192 tokens | 37.2 |" in text
