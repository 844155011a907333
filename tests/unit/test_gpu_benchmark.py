"""benchmarks/gpu.py keeps its time, writes every result at once, goes on after a failure, and continues.

The processes are real and do what parts' processes do, but for the measuring.
"""

import json
import sys
import time
from dataclasses import replace

import pytest

from tests.distributed.launch import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from gpu_parts import lines, runner
from gpu_parts.goals import goals
from gpu_parts.runner import Runner, shares
from gpu_parts.settings import BF16, BF16_FEW, DENSE, FP8, FP8_FEW, GEMM, LLAMAGEN, LORA, STEP, TESTS, settings_of
from gpu_parts.tables import tables

CPU = {"card": "a processor", "cuda_visible": False, "torch": "2", "python": "3"}
GPU = {**CPU, "card": "NVIDIA H200", "cuda_visible": True}

# Acts on the part's second setting, in its first process only.
PROCESS = """
import os, signal, sys, time
from gpu_parts.channel import Channel, task
todo = task()
channel = Channel(todo["descriptor"])
for position, setting in enumerate(todo["settings"]):
    act = sys.argv[1] if setting["name"] == sys.argv[2] else "measure"
    channel.started(setting["name"], 0.5 if act == "hang" else 60)
    if act in ("hang", "take long"):
        time.sleep(60)
    if act == "crash":
        print("a word before the end", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    channel.result(setting["name"], "measured", figures={"ms": {"median": 2.0, "least": 1.0, "most": 3.0}})
"""


@pytest.fixture
def run_parts(tmp_path):
    """Run parts with processes that do ``act`` at a setting; returns the file's lines and how many are of this call."""
    program, output, said = tmp_path / "process.py", tmp_path / "found.jsonl", []
    program.write_text(PROCESS)

    def run(parts, act="measure", seconds=60, again=False, setting="bf16, local layers", about=CPU):
        before = len(output.read_text().splitlines()) if output.exists() else 0
        command = [sys.executable, str(program), act, setting]
        one = Runner(output, about, time.time() + seconds, again=again, command=lambda part: command, say=said.append)
        one.run(parts)
        text = output.read_text() if output.exists() else ""
        return [json.loads(line) for line in text.splitlines()[before:]], one

    run.output, run.said = output, said
    return run


def names(part):
    return [one.name for one in settings_of(part, True, [])]


def statuses(found):
    return [(line["part"], line["setting"], line["status"]) for line in found]


def test_time_is_divided_by_weight_and_what_is_left_over_goes_on():
    assert shares({"a": 1, "b": 3}, 100) == {"a": 25, "b": 75}
    assert shares({"b": 3, "c": 1}, 96)["b"] == 72


@pytest.mark.parametrize(
    "act,reason", [("crash", "SIGSEGV; a word before the end"), ("hang", "it hangs: ended after its limit")]
)
def test_a_setting_that_ends_its_process_is_a_line_and_the_next_one_starts(run_parts, act, reason):
    found, _ = run_parts([LLAMAGEN], act)
    first, second, third = names(LLAMAGEN)
    assert sorted(statuses(found)) == sorted(
        [(LLAMAGEN, first, "measured"), (LLAMAGEN, second, "failed"), (LLAMAGEN, third, "measured")]
    )
    assert reason in found[1]["reason"]
    assert all(line["rehearsal"] == lines.REHEARSAL and line["about"] == CPU for line in found)


def test_a_part_that_is_late_is_ended_and_only_what_is_missing_is_measured_by_the_next_call(run_parts, monkeypatch):
    def hasty(part, rehearses, found):
        return [replace(one, seconds=0) for one in settings_of(part, rehearses, found)]

    monkeypatch.setattr(runner, "settings_of", hasty)
    monkeypatch.setattr(runner, "START_SECONDS", 0)
    began = time.time()
    found, _ = run_parts([LLAMAGEN, LORA], "take long", seconds=12, about=GPU)
    assert time.time() - began < 30
    assert (LLAMAGEN, "bf16, local layers", "out of time") in statuses(found)
    assert [one for one in statuses(found) if one[0] == LORA and one[2] == "measured"], "the next part started"
    assert not any("rehearsal" in line for line in found)
    missing = {(part, name) for part in (LLAMAGEN, LORA) for name in names(part)}
    missing -= {one[:2] for one in statuses(found) if one[2] == "measured"}
    second, _ = run_parts([LLAMAGEN, LORA], about=GPU)
    assert {one[:2] for one in statuses(second)} == missing
    third, _ = run_parts([LLAMAGEN, LORA], about=GPU)
    assert not third
    fourth, _ = run_parts([LLAMAGEN], again=True, about=GPU)
    assert [line["setting"] for line in fourth] == names(LLAMAGEN)


def test_nothing_starts_that_there_is_no_time_for(run_parts):
    found, one = run_parts([LLAMAGEN, LORA], seconds=20, about=GPU)
    assert not found
    assert [reason.partition(":")[0] for reason in one.left_out] == [LLAMAGEN, LORA]


def test_a_result_is_compared_with_its_baseline(run_parts):
    found, _ = run_parts([LLAMAGEN])
    assert found[1]["beside"] == {"baseline": BF16, "time": 1.0}


def test_half_a_line_of_a_crash_is_cut_off_and_another_programs_file_is_refused(run_parts):
    run_parts([LLAMAGEN])
    whole = run_parts.output.read_text()
    run_parts.output.write_text(whole + '{"part": "ste')
    assert len(lines.read([run_parts.output])) == 3
    run_parts([LORA])
    assert run_parts.output.read_text().startswith(whole)
    assert len(lines.read([run_parts.output])) == 3 + len(names(LORA))
    run_parts.output.write_text('{"x": 1}\n' + whole)
    with pytest.raises(SystemExit, match="line 1: not a line"):
        lines.read([run_parts.output])


def test_every_test_is_a_line_whatever_the_one_before_did_to_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_some.py").write_text(
        "import os, signal, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'no'\n"
        "def test_c(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_d(): pass\n"
        "def test_e(): pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_that_name\n")
    output = tmp_path / "found.jsonl"
    options = ["-p", "no:cacheprovider", "-p", "gpu_parts.pytest_lines", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path), *options]
    one = Runner(output, CPU, time.time() + 120, command=lambda part: command, say=lambda text: None)
    one.run([TESTS])
    found = {line["setting"].rpartition("::")[2]: line for line in lines.read([output])}
    wanted = {"test_a": "passed", "test_b": "failed", "test_c": "failed", "test_d": "skipped", "test_e": "passed"}
    assert {name: found[name]["status"] for name in wanted} == wanted
    assert "no" in found["test_b"]["reason"] and "SIGKILL" in found["test_c"]["reason"]
    assert found["test_d"]["reason"] == "why not"
    assert found["test_unreadable.py"]["status"] == "failed"
    assert found[runner.ALL_TESTS]["status"] == "measured"
    assert not Runner(output, CPU, time.time() + 9, say=lambda text: None).has_work(TESTS)


def step(name, milliseconds, tflop, mfu):
    figures = {"ms": {"median": milliseconds, "least": milliseconds, "most": milliseconds}, "repetitions": 5}
    figures |= {"tokens_per_second": 30_000, "tflops": 400, "mfu": mfu, "peak_bytes": 50 << 30, "model_tflop": tflop}
    figures |= {"peak_tflops": 989.5, "predicted": {"ms": 500.0, "peak_bytes": 48 << 30}}
    return line(STEP, name, figures)


def line(part, name, figures, **settings):
    known = {"part": part, "setting": name, "status": "measured", "date": "2026-01-02T03:04:05", "overrides": []}
    return {**known, "about": GPU, "settings": settings, "figures": figures}


def head(name, milliseconds, tflops, **settings):
    total = {"median": milliseconds, "least": milliseconds, "most": milliseconds}
    return line("head", name, {"total_ms": total, "repetitions": 10, "tflops": tflops, "extra_bytes": 1}, **settings)


PRODUCTS = {"side": 8192, "dtype": "bfloat16", "square_tflops": 700.0, "head_shape_tflops": 600.0, "fp8": "none here"}
FOUND = [
    line("head", GEMM, PRODUCTS),
    head(f"{DENSE}, 8,192 tokens", 100.0, 370, peer=DENSE, tokens=8192),
    head("ours, 8,192 tokens", 90.0, 412, peer="ours", tokens=8192),
    step(BF16, 500.0, 230.0, 0.46),
    step(BF16_FEW, 350.0, 165.0, 0.44),
    step(FP8, 420.0, 230.0, 0.3),
    step(FP8_FEW, 310.0, 165.0, 0.3),
]


def test_goals_stand_beside_figures():
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in goals(FOUND).splitlines()[2:]]
    by_goal = {what: (found, met) for what, _, found, met in rows}
    assert by_goal["MFU of a bf16 step"] == ("0.460", "yes")
    # 65 TFLOP in 150 ms of 989.5 TFLOP/s; 150 ms beside 110 ms; 412 beside 600; 90 beside 100.
    assert by_goal["MFU of bf16 layers outside the head"] == ("0.438", "**no**")
    assert by_goal["layers outside the head, bf16 time / FP8"] == ("1.364", "yes")
    assert by_goal["head, ours, 8,192 tokens (the fastest), of the measured products"] == ("0.687", "yes")
    assert by_goal["head, ours, 8,192 tokens (the fastest), time / dense"] == ("0.900", "yes")


def test_tables_have_each_machine_by_itself_and_say_what_has_no_figures():
    failed = {**line(LORA, "bf16, shared", {}), "status": "out of memory", "reason": "out of memory at 139.1 GiB"}
    rehearsed = {**line(STEP, BF16, FOUND[3]["figures"]), "about": CPU, "rehearsal": lines.REHEARSAL}
    text = tables([*FOUND, failed, rehearsed])
    gpu, cpu = text.split("## 2026-01-02, a processor")
    assert "## 2026-01-02, NVIDIA H200" in gpu and lines.REHEARSAL not in gpu and lines.REHEARSAL in cpu
    assert "| lora | bf16, shared | out of memory | out of memory at 139.1 GiB |" in gpu
    # Measured beside predicted: 500 ms and 50 GiB, 500 ms and 48 GiB.
    assert "| bf16, resident | 500 | 500 to 500 | 5 | 30,000 | 400 | 46.0% |  | 50.0 |  | 500 | 48.0 |" in gpu
    assert "68.7%" in gpu and "FP8 none here" in gpu
    assert tables([]) == "no results"
