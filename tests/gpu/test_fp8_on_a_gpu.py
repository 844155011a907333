"""One GPU with FP8 and Transformer Engine: recipes, exactness of the reference, training, checkpoints."""

import pytest
import torch

from megatron_cca.errors import UserError
from tests.gpu.fp8_runs import FALLING, FP8, IN_BF16, SIZES, SMALL_WEIGHTS, losses
from tests.gpu.test_reference_on_a_gpu import BF16, FP8_WEIGHTS, OFFLOAD, numbers, start, trace

pytestmark = pytest.mark.gpu
te = pytest.importorskip("transformer_engine.pytorch")
BLOCKWISE = pytest.param("blockwise", marks=pytest.mark.needs_hardware("FP8 with a scale a block"))
RECIPES = ["tensorwise", "delayed", BLOCKWISE]


@pytest.fixture(params=RECIPES)
def recipe(request):
    from megatron_cca.models.fp8_devices import check_fp8_device

    try:
        check_fp8_device(request.param)
    except UserError as error:
        pytest.skip(str(error))
    return request.param


def test_the_layers_products_are_fp8(recipe, digit_shards, tmp_path):
    """FP8 changes the numbers by more than bf16 does, and by no more than FP8 should."""
    losses = {}
    for name, overrides in {
        "fp32": SIZES,
        "bf16": [*SIZES, BF16],
        "fp8": [*FP8, f"training.fp8_recipe={recipe}"],
    }.items():
        run = start(digit_shards, tmp_path / name, *overrides)
        with run.loader:
            batch = run.loader.get(0)
            losses[name] = torch.cat(list(run.forward.logps(run.policy, batch).values())).double()
    errors = {name: (losses[name] - losses["fp32"]).norm() / losses["fp32"].norm() for name in ("bf16", "fp8")}
    assert errors["bf16"] < errors["fp8"] < 0.1


def fall(trace):
    return trace[:4].mean() - trace[-4:].mean()


@pytest.fixture(scope="module")
def in_float32(digit_shards, tmp_path_factory):
    overrides = [*SIZES, *FALLING, "model.transformer_impl=local"]
    return losses(digit_shards, tmp_path_factory.mktemp("float32"), *overrides, steps=16)


def test_fp8_training_lowers_the_loss_as_float32_does(recipe, in_float32, digit_shards, tmp_path):
    """From the same weights over the same batches, so that what is left between the two losses is FP8."""
    found = losses(digit_shards, tmp_path, *FP8, *FALLING, f"training.fp8_recipe={recipe}", steps=16)
    assert fall(in_float32) > 0.05
    assert (found - in_float32).abs().mean() < 0.25 * fall(in_float32)


@pytest.mark.parametrize("recipe", ["tensorwise", BLOCKWISE], indirect=True)
def test_policy_and_reference_in_fp8_start_from_exactly_0(recipe, digit_shards, tmp_path):
    """Scales that come from the tensor at hand are right from the first batch on, and the same for both models."""
    common = [*FP8, f"training.fp8_recipe={recipe}"]
    resident = numbers(trace(start(digit_shards, tmp_path / "a", *common)))
    assert resident[0][2] == 0.0
    assert numbers(trace(start(digit_shards, tmp_path / "b", *common, OFFLOAD))) == resident


def test_delayed_scales_have_settled_before_the_first_step(digit_shards, tmp_path):
    """Without that, weights far below 1 would be rounded with a scale of 1, to nearly nothing."""
    errors = {}
    for name in ("tensorwise", "delayed"):
        reports = trace(start(digit_shards, tmp_path / name, *FP8, f"training.fp8_recipe={name}", *IN_BF16), 1)
        errors[name] = reports[0].log_ratio.root_mean_square
    assert errors["delayed"] < 2 * errors["tensorwise"]


def test_a_frozen_models_answers_do_not_depend_on_what_it_saw_before(recipe, digit_shards, tmp_path):
    run = start(digit_shards, tmp_path, *FP8, f"training.fp8_recipe={recipe}")
    with run.loader:
        batches = [run.loader.get(step) for step in range(3)]
    first = run.reference.logps(batches[0], 0)
    for step, batch in enumerate(batches):
        run.reference.logps(batch, step)
    again = run.reference.logps(batches[0], 0)
    assert all(torch.equal(first[index], again[index]) for index in first)


@pytest.fixture(scope="module")
def bf16_error(digit_shards, tmp_path_factory):
    """The log-ratio that a reference in bfloat16 has under the same model in float32."""
    overrides = [*SIZES, *IN_BF16, "reference.allow_bias=100"]
    return trace(start(digit_shards, tmp_path_factory.mktemp("bf16"), *overrides), 1)[0].log_ratio.root_mean_square


@pytest.mark.parametrize("more", [[], [FP8_WEIGHTS], [FP8_WEIGHTS, OFFLOAD]])
def test_the_reference_may_be_in_fp8_under_a_bf16_policy(more, bf16_error, digit_shards, tmp_path):
    """E4M3 has 4 bits of mantissa fewer than bfloat16, so that it rounds 16 times as coarsely.

    Both round weights and activations. Weights kept in FP8 are rounded once more: at most sqrt(2) times as much.
    """
    common = [*SIZES, BF16, SMALL_WEIGHTS, "reference.precision=fp8", "reference.allow_bias=100", *more]
    reports = trace(start(digit_shards, tmp_path, *common), 2)
    assert bf16_error < reports[0].log_ratio.root_mean_square < 16 * 2**0.5 * bf16_error


def test_no_fp8_copy_of_a_frozen_weight_stays_behind(digit_shards, tmp_path):
    run = start(digit_shards, tmp_path, *FP8)
    trace(run, 2)
    for chunk in run.reference.chunks:
        for module in chunk.modules():
            assert not getattr(module, "_fp8_workspaces", None)


@pytest.mark.parametrize("options", [["offload"], ["precision aware"]])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_memory_saving_optimizers_train_and_resume(options, precision, digit_shards, tmp_path):
    from megatron_cca.training.saving import begin_save

    aware = ["optimizer.use_precision_aware_optimizer=true"]
    if options == ["precision aware"]:
        options = ["optimizer.grad_reduce_in_fp32=false", "optimizer.main_grads_dtype=bf16"]
        options += ["optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"]
    else:
        options = ["optimizer.optimizer_cpu_offload=true"]
    options = [*aware, *options]
    common = [*SIZES, f"training.precision={precision}", "reference.allow_bias=100", *options]
    whole = [report.metrics["loss"] for report in trace(start(digit_shards, tmp_path / "whole", *common), 8)]
    run = start(digit_shards, tmp_path / "cut", *common)
    first = [report.metrics["loss"] for report in trace(run, 4)]
    (tmp_path / "cut").mkdir(exist_ok=True)
    begin_save(run)
    run.saver.finish()
    assert run.saver.last_saved == run.iteration
    rest = [report.metrics["loss"] for report in trace(start(digit_shards, tmp_path / "cut", *common), 4)]
    torch.testing.assert_close(torch.tensor(first + rest), torch.tensor(whole), rtol=1e-3, atol=0)


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("products", ["bf16", "tensorwise", "delayed", BLOCKWISE])
def test_recomputation_changes_nothing(products, granularity, digit_shards, tmp_path):
    """In FP8, too. Delayed scales need not be those of a run without: they are compared to FP8's own precision."""
    common = [*SIZES, BF16] if products == "bf16" else [*FP8, *FALLING, f"training.fp8_recipe={products}"]
    tolerance = 2e-2 if products == "delayed" else 1e-4
    plain = trace(start(digit_shards, tmp_path / "a", *common), 3)
    recomputed = trace(start(digit_shards, tmp_path / "b", *common, f"training.recompute_granularity={granularity}"), 3)
    for one, other in zip(plain, recomputed, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=10 * tolerance)
