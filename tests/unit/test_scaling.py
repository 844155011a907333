"""Scaling sweeps: what a file may say, which points follow, where waiting is counted, what is kept and shown."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import laid_out
from megatron_cca.lab.scaling import measure, program, report
from megatron_cca.lab.scaling.measure import ideal_bubble
from megatron_cca.lab.scaling.report import plot
from megatron_cca.lab.scaling.sweep import (
    RESULTS,
    PointRecord,
    forget_failed,
    open_sweep,
    point_named,
    read_record,
    record_path,
    rows_of,
    write_failed,
    write_finished,
)
from megatron_cca.lab.scaling.waiting import Span, exposed_parts, merged, shortest, spans_of, union, waiting
from megatron_cca.objectives import OBJECTIVES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PP2 = {"pipeline_model_parallel_size": 2}
SWEEP = {
    "name": "small",
    "config": "run.yaml",
    "world_sizes": [1, 2],
    "layouts": [{}, PP2],
    "samples_per_gpu": 16,
    "global_batch_size": 32,
    "image_grid": [4, 4],
    "caption_tokens": 24,
    "oversubscribe": True,
}
PLANNED = {"gpu": "h100-80gb", "world_sizes": [8, 16], "samples_per_gpu": 64, "global_batch_size": 1024}
RUN = {"training": {"micro_batch_size": 4, "global_batch_size": 64}}


def written(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    tree = {key: value for key, value in {**SWEEP, **changes}.items() if value is not None}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    return folder / "sweep.yaml"


def opened(folder, *, is_elsewhere=False, **changes):
    return open_sweep(written(folder, **changes), "cpu", is_elsewhere=is_elsewhere)


def finished(speed=100.0, **changes):
    return {
        "step_seconds": [1.0, 1.1, 0.9],
        "tokens_per_second_per_gpu": speed,
        "low": 0.9 * speed,
        "high": 1.1 * speed,
        "mfu": 0.1,
        "peak_flops": 1e11,
        "seq_length": 58,
        "memory_gib": 0.5,
        "communication": 0.2,
        "bubble": 0.1,
        "ideal_bubble": 0.2,
        "layout": "DP 1",
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "device": "CPU (1 threads)",
        "host": "here",
        "date": "2026-01-02T03:04:05+00:00",
        "code": "0.1.0",
        "versions": {"torch": "2"},
        **changes,
    }


def rows(points, *found):
    return [
        PointRecord(point, {"num_gpus": point.num_gpus, "status": "finished", **one})
        for point, one in zip(points, found, strict=True)
    ]


def test_points_are_modes_by_layouts_by_sizes_that_divide(tmp_path):
    sweep = opened(tmp_path)
    assert [point.title for point in sweep.measured] == [
        "weak-1-dp",
        "weak-2-dp",
        "weak-2-pp2",
        "strong-1-dp",
        "strong-2-dp",
        "strong-2-pp2",
    ]
    assert [point.config.training.global_batch_size for point in sweep.measured] == [16, 32, 32, 32, 32, 32]
    assert opened(tmp_path, mode="strong", global_batch_size=None).measured[0].config.training.global_batch_size == 64


def test_another_objective_keeps_the_keys_that_it_has_too(tmp_path):
    sweep = opened(tmp_path, set={"objective.name": "next_token", "objective.normalization": "image"})
    assert {point.config.objective for point in sweep.measured} == {OBJECTIVES["next_token"](normalization="image")}
    with pytest.raises(UserError, match=r"set: objective\.beta: next_token has no such key"):
        opened(tmp_path, set={"objective.name": "next_token", "objective.beta": 0.1})


def test_auto_goes_as_far_as_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.platform.num_devices", lambda choice: ("cuda", 6))
    sweep = opened(tmp_path, world_sizes="auto", layouts=[{}], mode="weak")
    assert [point.num_gpus for point in sweep.measured] == [1, 2, 4]


def test_planned_points_take_the_sweeps_run_where_they_name_none(tmp_path):
    sweep = opened(tmp_path, planned={"gpu": "h200", "world_sizes": [16, 8], "layouts": [PP2]}, mode="weak")
    assert [point.num_gpus for point in sweep.planned] == [8, 16]
    assert sweep.planned[0].images == sweep.measured[0].images
    assert [point.config.training.global_batch_size for point in sweep.planned] == [128, 256]


def test_keys_are_of_what_determines_the_result(tmp_path):
    def keys(**changes):
        return {point.title: point.key for point in opened(tmp_path, **changes).measured}

    base = keys()
    assert keys() == keys(name="other", timeout_seconds=5, mode="both") == base
    # A batch is a batch, whatever curve it is a point of.
    assert base["weak-2-dp"] == base["strong-2-dp"] != base["weak-2-pp2"]
    for changes in ({"steps": 7}, {"warmup_steps": 9}, {"set": {"optimizer.lr": 0.5}}, {"caption_tokens": 23}):
        assert not set(keys(**changes).values()) & set(base.values()), changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world_size": [1]}, "world_size: unknown key; did you mean world_sizes?"),
        ({"layouts": [{"tensor": 2}]}, "layouts.0.tensor: unknown key; known here: tensor_model"),
        ({"planned": {"gpus": "h200"}}, "planned"),
        ({"mode": "fast"}, "mode"),
        ({"world_sizes": [0]}, "world_sizes"),
        ({"image_grid": [4]}, "image_grid"),
        ({"config": "gone.yaml"}, "gone.yaml is not there"),
        ({"set": {"training": 1}}, "training is not of the form section.key"),
        ({"set": {"training.lr": 1}}, "training.lr: unknown key"),
        ({"world_sizes": [3], "layouts": [PP2]}, "none of them divides a world size of 3"),
        ({"calibration": "gone.json"}, "gone.json: No such file"),
        ({"world_sizes": [999], "oversubscribe": False}, "999 is more than the"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, changes, says):
    with pytest.raises(UserError) as refusal:
        opened(tmp_path, **changes)
    assert says in str(refusal.value) and "sweep.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_points_of_a_cluster_are_not_held_against_this_machine(tmp_path):
    sweep = opened(tmp_path, world_sizes=[999], layouts=[{}], oversubscribe=False, is_elsewhere=True)
    assert point_named(sweep, "weak-999-dp", 999).num_gpus == 999


def test_a_job_finds_its_point(tmp_path):
    # Both modes have it: one run.
    assert point_named(opened(tmp_path, layouts=[{}], world_sizes=[2]), None, 2).num_gpus == 2
    sweep = opened(tmp_path)
    with pytest.raises(UserError, match=r"is missing; of 2 processes .* has weak-2-dp, weak-2-pp2"):
        point_named(sweep, None, 2)
    with pytest.raises(UserError, match=r"weak-4-dp: .* has weak-1-dp"):
        point_named(sweep, "weak-4-dp", 4)


def test_a_job_of_another_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"weak-2-dp is of 2 processes, this job has 1"):
        program.measure_point(written(tmp_path), tmp_path / "out", "weak-2-dp", "cpu")
    assert not (tmp_path / "out").exists()


def test_waiting_beyond_the_transfer_is_the_bubble():
    mine = [
        Span("recv 8", True, 0.50, 0.50),
        Span("recv 8", True, 0.02, 0.02),
        Span("allreduce 4", False, 0.10, 0.06),
    ]
    theirs = [Span("recv 8", True, 0.01, 0.01)]
    transfers = merged([shortest(mine), shortest(theirs)])
    found = waiting(mine, transfers, seconds=2.0)
    assert found.bubble == pytest.approx((0.49 + 0.01) / 2)
    assert found.communication == pytest.approx((0.01 + 0.01 + 0.06) / 2)
    assert waiting([], {}, 1.0) == waiting([], transfers, 2.0)


def test_only_what_no_computing_hides_is_exposed():
    busy = union([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (9.0, 9.5)])
    assert busy == [(0.0, 2.0), (3.0, 4.0), (9.0, 9.5)]
    assert exposed_parts([(1.0, 3.5), (0.0, 0.5), (8.0, 10.0)], busy) == [1.0, 0.0, 1.5]
    # Of two streams that communicate at once the time counts once.
    assert exposed_parts([(5.0, 6.0), (5.5, 7.0)], busy) == [1.0, 1.0]
    assert exposed_parts([(5.0, 7.0), (5.5, 6.0)], busy) == [2.0, 0.0]


def test_nccl_kernels_in_a_trace():
    def kernel(name, start, microseconds, **details):
        return {"cat": "kernel", "name": name, "ts": start, "dur": microseconds, "args": details}

    long = {"Global rank start": 0, "Global rank stride": 1, "Group size": 3}
    events = [
        kernel("gemm", 0, 100),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 50, 100, **{"Process Group Ranks": "[0, 1]"}),
        kernel("ncclDevKernel_SendRecv(x)", 200, 30, **{"Process Group Ranks": "[0, 2]", "In msg nelems": 8}),
        kernel("ncclDevKernel_SendRecv(x)", 300, 10),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 400, 10, **{"Process Group Ranks": "[0, 1, ...]"}),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 500, 10, **{"Process Group Ranks": "[0, 1, ...]", **long}),
        {"cat": "gpu_user_annotation", "name": "nccl:all_reduce", "ts": 0, "dur": 1000},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
        {"ph": "M", "name": "process_name"},
    ]
    found = spans_of(events, {0: 0, 1: 0, 2: 1}.__getitem__)
    assert [span.crosses_stages for span in found] == [False, True, True, False, True]
    assert [round(1e6 * span.exposed) for span in found] == [50, 30, 10, 10, 10]
    assert found[1].kind != found[2].kind


def test_the_even_bubble_is_the_textbooks(tmp_path):
    point = opened(tmp_path).measured[2]
    config = laid_out(point.config, measure.layout_of(point.layout, point))
    assert ideal_bubble(config, 2) == pytest.approx(1 / (8 + 1))


def test_records_are_kept_by_key_and_failures_once(tmp_path):
    one, two, *_ = opened(tmp_path).measured
    out = tmp_path / "out"
    assert read_record(out, one) is None
    write_failed(out, one, "out of\nmemory")
    write_failed(out, one, "a peer is gone")
    write_finished(out, two, finished())
    assert read_record(out, one)["reason"] == "out of memory"
    assert [row.is_finished for row in rows_of(out, [one, two])] == [False, True]
    forget_failed(out, [one, two])
    assert [row.point for row in rows_of(out, [one, two])] == [two]
    record_path(out, two).write_text('{"status": "finished"}')
    with pytest.raises(UserError, match="is damaged"):
        read_record(out, two)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("x\nmegatron_cca: error: data.path: gone\nmore\n", "data.path: gone"),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried\n", "OutOfMemoryError: CUDA out of memory. Tried"),
        ("Killed\n", None),
    ],
)
def test_a_jobs_log_says_why_it_failed(tmp_path, log, reason):
    (tmp_path / "log").write_text(log)
    assert program._reason(tmp_path / "log") == reason


def test_planned_points_that_cannot_be_do_not_end_the_sweep(tmp_path):
    layouts = [{}, {"tensor_model_parallel_size": 16}]
    points = opened(tmp_path, planned={**PLANNED, "layouts": layouts}, mode="weak").planned
    measure.plan_all(tmp_path / "out", points)
    found = {row.point.title: row for row in rows_of(tmp_path / "out", points)}
    assert found["weak-16-dp"].is_finished and not found["weak-16-tp16"].is_finished
    record = found["weak-16-dp"].record
    assert record["low"] < record["tokens_per_second_per_gpu"] < record["high"]
    assert record["layout"] == "DP 16" and record["global_batch_size"] == 1024


def test_a_cpu_plans_its_layouts_only_with_a_calibration(tmp_path):
    point = opened(tmp_path, layouts="planned").measured[0]
    with pytest.raises(UserError, match="needs calibration"):
        measure.planned_candidate(point)


def test_measured_and_planned_share_axes_only_on_the_same_gpu(tmp_path):
    sweep = opened(tmp_path, planned=PLANNED, layouts=[{}], mode="weak")
    theirs = rows(sweep.planned, finished(device="h100-80gb"), finished(device="h100-80gb"))
    on_cpu = rows(sweep.measured, finished(), finished())
    on_gpu = rows(sweep.measured, *[finished(device="NVIDIA H100 80GB HBM3")] * 2)
    assert [group.kinds for group in report.diagrams_of(on_cpu, theirs)] == [["measured"], ["planned"]]
    assert [group.kinds for group in report.diagrams_of(on_gpu, theirs)] == [["measured", "planned"]]
    other = opened(tmp_path / "other", planned={**PLANNED, "image_grid": [8, 8]}, layouts=[{}], mode="weak")
    assert len(report.diagrams_of(on_gpu, rows(other.planned, *[row.record for row in theirs]))) == 2


def test_efficiency_is_of_the_smallest_point_of_the_mode(tmp_path):
    sweep = opened(tmp_path)
    found = rows(sweep.measured, *[finished(speed) for speed in (100.0, 90.0, 60.0, 200.0, 100.0, 50.0)])
    assert [report.efficiency(row, found) for row in found] == pytest.approx([1, 0.9, 0.6, 1, 0.5, 0.25])


def test_mfu_is_of_the_best_peak_that_was_measured(tmp_path):
    sweep = opened(tmp_path, layouts=[{}], mode="weak")
    found = report.with_one_peak(rows(sweep.measured, finished(mfu=0.2, peak_flops=5e10), finished()))
    assert [row.record["mfu"] for row in found] == pytest.approx([0.1, 0.1])


def test_table_and_picture(tmp_path):
    sweep = opened(tmp_path, planned=PLANNED, layouts=[{}], mode="weak")
    measured = rows(sweep.measured[:1], finished())
    measured.append(PointRecord(sweep.measured[1], {"num_gpus": 2, "status": "failed", "reason": "not enough memory"}))
    theirs = rows(sweep.planned, *[finished(device="h100-80gb")] * 2)
    text = report.table(sweep, measured, theirs)
    assert "## Measured" in text and "host here; 2026-01-02; torch 2" in text
    assert "## Planned, not run" in text and "- measured weak-2-dp: not enough memory" in text
    plot(tmp_path / "scaling.png", sweep, measured, theirs)
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > picture.height > 100


def test_points_of_two_machines_are_not_drawn_as_one_curve(tmp_path):
    sweep = opened(tmp_path, layouts=[{}], mode="weak")
    for point, device in zip(sweep.measured, ("CPU (1 threads)", "NVIDIA H100 80GB HBM3"), strict=True):
        write_finished(tmp_path / "out", point, finished(device=device))
    settings = program.RunSettings(tmp_path / "sweep.yaml", tmp_path / "out", Path("run.py"), "cpu", False, True)
    with pytest.raises(UserError, match=r"holds points of CPU .* and of NVIDIA"):
        program.run_sweep(settings)


def test_points_of_a_gpu_are_not_gone_on_with_on_a_cpu(tmp_path):
    sweep = opened(tmp_path, layouts=[{}], mode="weak")
    write_finished(tmp_path / "out", sweep.measured[0], finished(device="NVIDIA H100 80GB HBM3"))
    settings = program.RunSettings(tmp_path / "sweep.yaml", tmp_path / "out", Path("run.py"), "cpu", False, False)
    with pytest.raises(UserError, match="holds points of NVIDIA H100 80GB HBM3, this is a CPU"):
        program.run_sweep(settings)


def test_collecting_takes_what_jobs_have_left(tmp_path, capsys):
    sweep = opened(tmp_path, layouts=[{}], mode="weak", world_sizes=[1, 64], is_elsewhere=True)
    write_finished(tmp_path / "out", sweep.measured[1], finished())
    settings = program.RunSettings(tmp_path / "sweep.yaml", tmp_path / "out", Path("run.py"), "cpu", False, True)
    program.run_sweep(settings)
    lines = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert [json.loads(line)["point"] for line in lines] == ["weak-64-dp"]
    assert "1 of 2 points have not been run" in capsys.readouterr().out
    program.list_points(tmp_path / "sweep.yaml", tmp_path / "out", "cpu")
    assert "weak-64-dp" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny.yaml", "emu3_8b.yaml"])
def test_the_examples_can_be_read(name):
    sweep = open_sweep(EXAMPLES / "scaling" / name, "cpu", is_elsewhere=True)
    assert sweep.measured and max(point.num_gpus for point in sweep.planned) == 4096
