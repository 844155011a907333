"""Calibrations: fitted to steps of known cost, and measured on this machine."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner import CalibrateSettings, PlanSettings, calibrate, measuring
from megatron_cca.lab.planner.calibrate import fit
from megatron_cca.lab.planner.hardware import DEFAULT, GPUS, Cluster, read_calibration
from megatron_cca.lab.planner.measuring import Observation, short_configs
from megatron_cca.lab.planner.program import _search_inputs as inputs_of
from megatron_cca.lab.planner.program import run_calibrate
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, Product, image_workload
from tests.unit.test_planner_throughput import EMU3

H100 = GPUS["h100-80gb"]
BASE = replace(DEFAULT, layer_launch_seconds=0, microbatch_overhead_seconds=0, step_overhead_seconds=0)


def observations(truth, noise=(0, 0, 0, 0, 0)):
    """What a machine would show whose calibration is ``truth``."""
    found = []
    for config, error in zip(short_configs(load_config(None, EMU3)), noise, strict=True):
        workload = image_workload(config, ImageShape(90, 90, 128))
        seconds = predict_step(config, Cluster(H100, 1, 1), workload, truth).total
        found.append(Observation(config, workload, seconds * (1 + error), 0.0))
    return found


def test_a_known_machine_is_found_again():
    slower = {name: getattr(BASE, name) / 1.5 for name in EFFICIENCIES}
    truth = replace(BASE, **slower, microbatch_overhead_seconds=0.02, step_overhead_seconds=0.1)
    fitted, errors = fit(observations(truth), H100, BASE)
    for name in (*EFFICIENCIES, "microbatch_overhead_seconds", "step_overhead_seconds"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert max(map(abs, errors)) < 1e-6
    assert fitted.relative_error < 1e-6


EFFICIENCIES = ("matmul_efficiency", "fp8_matmul_efficiency", "attention_efficiency", "memory_efficiency")


def test_the_error_bar_grows_with_what_the_model_does_not_explain():
    errors = [fit(observations(BASE, noise), H100, BASE)[0].relative_error for noise in NOISES]
    assert errors == sorted(errors)
    assert 0.02 < errors[1] < 0.3


NOISES = ((0, 0, 0, 0, 0), (0.03, -0.03, 0.02, -0.02, 0.03), (0.2, -0.2, 0.2, -0.1, 0.2))


def test_nothing_negative_is_fitted():
    # Steps that take less with more microbatches make no sense; overheads stay at nothing.
    fitted, _ = fit(observations(BASE, (0.3, 0.3, -0.1, -0.1, -0.1)), H100, BASE)
    assert fitted.microbatch_overhead_seconds >= 0
    assert fitted.step_overhead_seconds >= 0
    assert fitted.matmul_efficiency > 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    run = folder / "run.yaml"
    run.write_text("training: {micro_batch_size: 4, global_batch_size: 64}")
    output = folder / "new" / "calibration.json"
    settings = CalibrateSettings(config=run, image_grid="4x4", caption_tokens=8, steps=1, device="cpu", output=output)
    # Whether the numbers are good is not asked here.
    with mock.patch.multiple(measuring, _ENOUGH_SECONDS=0.0, _ENOUGH_REPEATS=2):
        run_calibrate(settings)
    return settings


def test_this_machine_can_be_measured(measured):
    calibration, device = read_calibration(measured.output, "cpu")
    assert device.name == calibration.gpu == "cpu"
    assert device.flops["fp32"] > 1e8
    assert calibration.relative_error > 0
    assert [path.name for path in measured.output.parent.iterdir()] == ["calibration.json"]


def test_a_processor_is_planned_for_as_it_was_measured(measured):
    keys = {"gpus": 1, "gpus_per_node": None, "image_grid": "4x4", "caption_tokens": 8, "vary": None}
    config = load_config(measured.config)
    rest = {"config": measured.config, "overrides": [], "top": 1, "output": None, "overwrite": False}
    inputs = inputs_of(PlanSettings(gpu="cpu", calibration=measured.output, **keys, **rest), config)
    assert inputs.cluster.gpu.name == "cpu"
    with pytest.raises(UserError, match=r"measured on cpu, not on h200"):
        inputs_of(PlanSettings(gpu="h200", calibration=measured.output, **keys, **rest), config)
    with pytest.raises(UserError, match=r"--gpu: cpu needs --calibration"):
        inputs_of(PlanSettings(gpu="cpu", calibration=None, **keys, **rest), config)


def test_a_processor_says_that_it_has_no_fp8(measured):
    found = json.loads(measured.output.read_text())
    assert found["not_measured"].endswith("overlaps, FP8 products: the defaults")
    share = DEFAULT.fp8_matmul_efficiency / DEFAULT.matmul_efficiency
    calibration = found["calibration"]
    assert calibration["fp8_matmul_efficiency"] == pytest.approx(share * calibration["matmul_efficiency"])


def test_fp8_products_are_measured_where_a_device_has_a_peak_for_them(monkeypatch):
    monkeypatch.setattr(measuring, "_ENOUGH_SECONDS", 0.0)
    small = (Product("linear_proj", 64, 32, splits_outputs=False), Product("linear_fc2", 128, 64, splits_outputs=False))
    # This processor's own speed at FP8 is that of a conversion; only that it is one product after another counts.
    share = calibrate.measured_fp8(small, 40, H100)
    assert 0 < share < 1
    slow = replace(H100, flops={**H100.flops, "fp8": H100.flops["fp8"] / 1000})
    assert 30 * share < calibrate.measured_fp8(small, 40, slow) < 30000 * share
    assert calibrate.measured_fp8(small, 40, GPUS["a100-80gb"]) is None
    assert calibrate.measured_fp8(small, 15, H100) is None
    assert calibrate.measured_fp8((Product("linear_fc1", 64, 40, splits_outputs=True),), 40, H100) is None


def test_the_fp8_products_that_are_timed_are_the_layers(monkeypatch):
    shapes = []

    def spy(inputs, weight, **options):
        shapes.append((*inputs.shape, weight.shape[1], inputs.dtype, options["out_dtype"]))

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    monkeypatch.setattr(measuring, "seconds_of", lambda work: work() or 2.0)
    assert measuring.fp8_products_seconds((Product("linear_fc1", 64, 96, splits_outputs=True),) * 2, 32) == 4.0
    assert shapes == [(32, 64, 96, torch.float8_e4m3fn, torch.bfloat16)] * 2


def test_plans_in_fp8_follow_the_measured_share():
    config = load_config(None, [*EMU3, "training.precision=fp8", "data.pad_to_multiple_of=128"])
    workload = image_workload(config, ImageShape(90, 90, 128))
    seconds = [
        predict_step(config, Cluster(H100, 1, 1), workload, replace(BASE, fp8_matmul_efficiency=share)).compute
        for share in (0.3, 0.6)
    ]
    assert seconds[0] > 1.4 * seconds[1]


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def measured(*_unused):
        raise AssertionError("measured before it was refused")

    for name in ("peak_flops", "memory_bandwidth"):
        monkeypatch.setattr(measuring, name, measured)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, r"--output: .*calibration.json exists; give another name or --overwrite"),
        ({"overwrite": True, "steps": 0}, "--steps: must be 1 or more"),
        ({"overwrite": True, "gpu": "h200"}, "--gpu: h200, but this machine has no GPU"),
        ({"overwrite": True, "image_grid": "90x90"}, "--image-grid: 90x90 .* needs"),
        ({"overwrite": True, "overrides": ["training.precision=fp8"]}, "training.precision: fp8 needs a GPU"),
    ],
)
def test_what_cannot_be_measured(measured, nothing_is_measured, options, problem):
    before = measured.output.read_bytes()
    with pytest.raises(UserError, match=problem):
        run_calibrate(replace(measured, **options))
    assert measured.output.read_bytes() == before
