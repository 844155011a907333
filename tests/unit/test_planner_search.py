"""The search beside brute force, its refusals, and the files that a plan leaves."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.lab import reserved_folder
from megatron_cca.lab.planner import PlanSettings, candidates
from megatron_cca.lab.planner.candidates import Layout, SearchInputs, laid_out
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.memory import MemoryEstimate
from megatron_cca.lab.planner.program import run_search
from megatron_cca.lab.planner.report import FILES, Report, as_json, text, write_report, yaml_of
from megatron_cca.lab.planner.search import search, usual_alternatives
from megatron_cca.lab.planner.sizes import sizes_of
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import ImageShape, image_workload
from megatron_cca.models import explicit
from megatron_cca.training.checks import check_new_run
from tests.distributed.launch import run_tool
from tests.unit.test_planner_throughput import EMU3

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ImageShape(90, 90, 128)
SHALLOW = "model.num_layers=8"


def rough_memory(config, world_size, workload, **_unused):
    """Enough for a search to have something to weigh; the real one has tests of its own."""
    sizes, training = sizes_of(config, world_size, workload), config.training
    kept = 4 if training.recompute_granularity == "full" else 34
    shards = sizes.data * sizes.context if config.optimizer.use_distributed_optimizer else 1
    return MemoryEstimate(
        weights=int(2 * sizes.trained_weights),
        reference=0 if config.reference.strategy == "cached" else int(2 * sizes.trained_weights),
        gradients=int(4 * sizes.trained_weights),
        optimizer=int(12 * sizes.trained_weights / shards),
        activations=int(kept * sizes.tokens * 4096 / sizes.tensor * sizes.layers * min(sizes.pipeline, 8)),
        head=2**30,
        communication=0,
        overhead=2**30,
    )


@pytest.fixture(autouse=True)
def known_memory(monkeypatch):
    monkeypatch.setattr(candidates, "predict_memory", rough_memory)


def emu3(*overrides):
    return load_config(None, [*EMU3, "data.pad_to_multiple_of=128", *overrides])


def inputs(gpus, gpu="h100-80gb", per_node=8, **options):
    return SearchInputs(Cluster(GPUS[gpu], gpus, per_node), IMAGES, **options)


def found(config, some, top=10):
    return search(config, some, top)


def keys(config):
    parallel, training = config.parallel, config.training
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.context_parallel_size,
        training.micro_batch_size,
        training.recompute_granularity or "none",
    )


def by_brute_force(gpus, batch, gpu):
    """Every combination through the configuration's own reader; nothing is pruned or shared."""
    fits = []
    for tp, pp, vpp, cp, micro in itertools.product(range(1, 9), range(1, 9), range(1, 9), (1, 2, 4, 8), range(1, 17)):
        if gpus % (tp * pp * cp) or 8 % tp or batch % micro:
            continue
        for granularity in ("null", "full"):
            overrides = {
                "parallel.tensor_model_parallel_size": tp,
                "parallel.pipeline_model_parallel_size": pp,
                "parallel.virtual_pipeline_model_parallel_size": vpp if vpp > 1 else "null",
                "parallel.context_parallel_size": cp,
                "parallel.sequence_parallel": str(tp > 1).lower(),
                "optimizer.overlap_grad_reduce": str(gpus > tp * pp).lower(),
                "optimizer.overlap_param_gather": str(gpus > tp * pp).lower(),
                "training.micro_batch_size": micro,
                "training.global_batch_size": batch,
                "training.recompute_granularity": granularity,
            }
            try:
                config = emu3(SHALLOW, *(f"{key}={value}" for key, value in overrides.items()))
                check_new_run(config, gpus)
            except UserError:
                continue
            workload = image_workload(config, IMAGES)
            if rough_memory(config, gpus, workload).total <= 0.92 * GPUS[gpu].memory_bytes:
                fits.append((predict_step(config, Cluster(GPUS[gpu], gpus, 8), workload).total, keys(config)))
    return sorted(fits)


@pytest.mark.parametrize(
    ("gpus", "batch", "gpu"),
    [(4, 8, "h100-80gb"), pytest.param(16, 32, "a100-80gb", marks=pytest.mark.full), (6, 12, "b200")],
)
def test_the_search_finds_what_brute_force_finds(gpus, batch, gpu, monkeypatch):
    two = ({"recompute_granularity": None}, {"recompute_granularity": "full"})
    monkeypatch.setattr("megatron_cca.lab.planner.candidates._RECOMPUTE", two)
    config = emu3(SHALLOW, f"training.global_batch_size={batch}")
    some = inputs(gpus, gpu, vary=("micro_batch", "recompute", "optimizer"))
    expected = by_brute_force(gpus, batch, gpu)
    best = found(config, some, top=len(expected) + 10).best
    assert len(expected) > 3
    assert sorted(keys(one.config) for one in best) == sorted(key for _, key in expected)
    assert [one.step.total for one in best] == pytest.approx([seconds for seconds, _ in expected])


def test_every_candidate_is_a_configuration_that_training_accepts():
    plan = found(emu3("training.global_batch_size=64"), inputs(64, vary=("recompute", "reference")), top=200)
    assert len(plan.best) > 20
    for one in plan.best:
        config = replace(one.config, reference=replace(one.config.reference, strategy="resident", cache=None))
        check_new_run(config, 64)
        assert one.memory.total <= 0.92 * GPUS["h100-80gb"].memory_bytes
        assert one.config.parallel.tensor_model_parallel_size <= 8
        assert one.config.parallel.sequence_parallel == (one.config.parallel.tensor_model_parallel_size > 1)
    totals = [one.step.total for one in plan.best]
    assert totals == sorted(totals)


def test_splitting_the_optimizer_is_never_slower_and_never_more_memory():
    """Why the search does not try the other way."""
    for layout in (Layout(), Layout(tensor=8), Layout(pipeline=4), Layout(tensor=2, context=2)):
        split = laid_out(emu3("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"), layout)
        off = {"use_distributed_optimizer": False, "overlap_param_gather": False}
        for overlap in (False, True):
            whole = replace(split, optimizer=replace(split.optimizer, **off, overlap_grad_reduce=overlap))
            one, other = (candidates.candidate_of(config, inputs(64)) for config in (split, whole))
            assert one.step.total <= other.step.total
            assert one.memory.total <= other.memory.total


@pytest.mark.full
def test_recomputation_that_saves_no_memory_is_not_listed():
    """Of the rough memory above only full recomputation saves any."""
    listed = found(emu3(), inputs(64, vary=("recompute",)), top=1000).best
    assert {one.config.training.recompute_granularity for one in listed} == {None, "full"}


def test_only_what_may_vary_varies():
    config = emu3("reference.strategy=offload", "training.recompute_granularity=full", "optimizer.lr=1e-4")
    plan = found(config, inputs(8, vary=()))
    for one in plan.best:
        # What follows from the layout.
        layout = {"parallel": config.parallel, "model": config.model}
        assert replace(one.config, **layout) == config
    assert plan.cached is None


def test_precision_varies_if_asked():
    config = emu3()
    own = found(config, inputs(8, vary=("recompute",)), top=1000).best
    assert {one.config.training.precision for one in own} == {"bf16"}
    both = found(config, inputs(8, vary=("precision", "recompute")), top=1000).best
    assert {one.config.training.precision for one in both} == {"bf16", "fp8"}
    on_a100 = found(config, inputs(16, "a100-80gb", vary=("precision", "recompute")), top=1000).best
    assert {one.config.training.precision for one in on_a100} == {"bf16"}


def test_a_cache_is_offered_beside_the_plan_but_not_planned_with():
    plan = found(emu3(), inputs(8, vary=("recompute", "reference")))
    assert all(one.config.reference.strategy != "cached" for one in plan.best)
    assert plan.cached.config.reference.strategy == "cached"
    assert plan.cached.step.samples_per_second > plan.best[0].step.samples_per_second
    asked = found(emu3(), inputs(8, vary=("recompute", "cached")))
    assert asked.best[0].config.reference.strategy == "cached"


def test_sharing_the_policy_needs_lora():
    strategies = {
        one.config.reference.strategy
        for one in found(emu3("lora.dim=8"), inputs(8, vary=("reference",)), top=1000).best
    }
    assert strategies == {"resident", "offload", "shared"}
    plain = {
        one.config.reference.strategy
        for one in found(emu3(), inputs(8, vary=("recompute", "reference")), top=1000).best
    }
    assert plain == {"resident", "offload"}


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (
            12,
            {},
            r"^--gpus: 12 is no whole number of nodes of 8; the nearest are 8 and 16, or give another --nodes-of$",
        ),
        (7, {}, r"^--gpus: 7 cannot be divided .* possible: 4 GPUs or 8 GPUs or training.global_batch_size 259$"),
        (56, {}, r"possible: 32 GPUs or 64 GPUs or training.global_batch_size 259$"),
        (
            1,
            {},
            r"^--gpus: 1 x h100-80gb are too little for this model: the best layout needs \d+\.\d GiB on a GPU, of ",
        ),
        (2, {"gpu": "a100-40gb"}, r"too little .* would do: 8 of them, or 2 x h200$"),
        (8, {"vary": ("precision",)}, None),
    ],
)
def test_clusters_that_do_not_suit(gpus, options, message):
    if message is None:
        assert found(emu3(), inputs(gpus, **options)).best
        return
    with pytest.raises(UserError, match=message):
        found(emu3(), inputs(gpus, **options))


def test_what_is_said_to_do_does():
    with pytest.raises(UserError) as refused:
        found(emu3(), inputs(1))
    words = str(refused.value).partition("would do: ")[2].split()
    assert found(emu3(), inputs(int(words[0]))).best


def test_fp8_where_there_is_none():
    with pytest.raises(UserError, match=r"^training\.precision: a100-80gb computes no fp8"):
        found(emu3("training.precision=fp8"), inputs(8, "a100-80gb"))
    with pytest.raises(UserError, match=r"^reference\.precision: a100-80gb computes no fp8"):
        found(emu3("reference.precision=fp8"), inputs(8, "a100-80gb"))


def test_images_too_large_for_the_model():
    with pytest.raises(UserError, match=r"^--image-grid: 99x99 with captions of 128 tokens needs \d+ positions"):
        search(emu3(), SearchInputs(Cluster(GPUS["h200"], 8, 8), ImageShape(99, 99, 128)), 1)


def test_rows_are_as_long_as_training_makes_them():
    config = emu3("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true")
    # BOS, the caption, BOI, "90*90", IMG; 90 rows with their breaks, EOF, EOI, EOS; one less; a multiple of 128.
    assert image_workload(config, IMAGES).seq_length == -(-(1 + 128 + 1 + 5 + 1 + 90 * 91 + 3 - 1) // 128) * 128
    assert image_workload(config, IMAGES).image_tokens == 8100


def report_of(config, some):
    plan = search(config, replace(some, vary=("recompute",)), 10)
    return Report(plan, config, usual_alternatives(plan.best[0], some))


def test_the_usual_alternatives_each_have_a_reason():
    others = {
        other.name: other.verdict
        for other in report_of(emu3("training.global_batch_size=64"), inputs(128)).alternatives
    }
    assert others["data parallelism alone"].startswith("refused: training.global_batch_size: 64 is not a multiple of")
    assert len(others) > 5
    assert all(
        verdict.startswith(("refused: ", "does not fit: ")) or verdict.endswith(("% slower", "as fast", "% faster"))
        for verdict in others.values()
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora.dim=4", "lora.target_modules=[linear_qkv]"],
        ["data.path={shards/a: 0.7, 'shards/b, c #d': 1e-3}", "training.output_dir='runs/ä: \"x\" 😀'"],
        ["objective.name=next_token", "validation.interval=5", "validation.path='null'"],
    ],
)
def test_the_yaml_that_is_written_is_the_planned_run(overrides, tmp_path):
    report = report_of(emu3(*overrides), inputs(8))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml_of(report), encoding="utf-8")
    assert load_config(path) == report.best.config
    assert explicit(report.best.config) == report.best.config
    assert "# planned" in path.read_text()
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_a_plan_is_written_whole(tmp_path):
    report = report_of(emu3(), inputs(8))
    output = tmp_path / "plan"
    for overwrite in (False, True):
        with reserved_folder(output, FILES, overwrite=overwrite):
            names = write_report(output, report)
    assert sorted(names) == sorted(path.name for path in output.iterdir())
    written = json.loads((output / "plan.json").read_text())
    assert written == json.loads(json.dumps(as_json(report)))
    assert written["model"]["hidden_size"] == 4096
    first = written["best"][0]
    parts = {name: value for name, value in first["step_seconds"].items() if name not in ("total", "low", "high")}
    assert sum(parts.values()) == pytest.approx(first["step_seconds"]["total"])
    assert sum(first["memory_groups_bytes"].values()) == first["memory_bytes"]["total"]
    with Image.open(output / "plan.png") as image:
        assert image.width > 1000
    assert (output / "table.md").read_text() == text(report) + "\n"
    with pytest.raises(UserError, match="already holds"), reserved_folder(output, FILES, overwrite=False):
        pass


def settings(config, tmp_path, **options):
    path = tmp_path / "run.yaml"
    path.write_text(config)
    defaults = {
        "config": path,
        "overrides": [],
        "gpu": "h100-80gb",
        "gpus": 8,
        "gpus_per_node": None,
        "image_grid": "9x9",
        "caption_tokens": 8,
        "vary": None,
        "calibration": None,
        "top": 3,
        "output": None,
        "overwrite": False,
    }
    return PlanSettings(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_grid": "9"}, "--image-grid: '9' is not of the form HxW"),
        ({"image_grid": "0x9"}, "--image-grid: '0x9'"),
        ({"caption_tokens": -1}, "--caption-tokens: must be 0 or more"),
        ({"vary": "speed"}, "--vary: 'speed' is unknown; known: micro_batch"),
        ({"gpus": 0}, "--gpus: must be 1 or more"),
        ({"gpus_per_node": 0}, "--nodes-of: must be 1 or more"),
        ({"top": 0}, "--top: must be 1 or more"),
        ({"gpu": "abacus"}, "--gpu: 'abacus' is unknown"),
        ({"calibration": Path("none.json")}, "--calibration: none.json: No such file"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_search(settings("", tmp_path, **options))


def test_a_refused_plan_leaves_nothing(tmp_path):
    output = tmp_path / "plan"
    with pytest.raises(UserError):
        run_search(settings("", tmp_path, gpus=12, output=output))
    assert not output.exists()


def test_other_weights_are_refused(tmp_path, monkeypatch):
    """A checkpoint that is there must be of the planned model; its sizes are all that is read."""
    checkpoint = tmp_path / "weights"
    checkpoint.mkdir()
    theirs = load_config(None, ["model.hidden_size=128"])
    monkeypatch.setattr("megatron_cca.training.checks.saved_config", lambda folder, key: theirs)
    monkeypatch.setattr("megatron_cca.training.checks.layout.resolve", lambda path, key: Path(path))
    with pytest.raises(UserError, match=r"training.pretrained_checkpoint: .* has hidden_size 128, this run's model 64"):
        run_search(settings(f"training: {{pretrained_checkpoint: {checkpoint}}}", tmp_path))


def test_the_plan_s_yaml_refuses_other_weights(monkeypatch, tmp_path):
    report = report_of(emu3(), inputs(8))
    (tmp_path / "plan.yaml").write_text(yaml_of(report))
    planned = load_config(tmp_path / "plan.yaml", ["training.pretrained_checkpoint=other"])
    monkeypatch.setattr("megatron_cca.training.checks.saved_config", lambda folder, key: emu3("model.num_layers=16"))
    monkeypatch.setattr("megatron_cca.training.checks.layout.resolve", lambda path, key: Path(path))
    with pytest.raises(UserError, match=r"other has num_layers 16, this run's model 32"):
        check_new_run(planned, 8)


def test_the_command_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("training: {precision: bf16}")
    refused = run_tool(ROOT / "tools" / "plan.py", "--config", config, "--gpus", 8, "--gpu", "abacus", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("megatron_cca: error: --gpu: 'abacus' is unknown")
    assert len(refused.stderr.splitlines()) == 1
