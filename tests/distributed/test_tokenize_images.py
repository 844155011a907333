"""tools/tokenize_images.py as a user runs it: on several processes, killed midway, with wrong input."""

import json
import os
import signal
import time

import pytest

from megatron_cca.data.manifest import TOKEN_FILES
from tests.distributed.launch import ROOT, ended, run_tool, start_job, start_tool, torchrun
from tests.references.scans import write_scans

TOOL = ROOT / "tools" / "tokenize_images.py"
NUMBER = 600


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "images", NUMBER)


@pytest.fixture(scope="module")
def options(scans, digit_shards):
    tokenizers = ["--image-tokenizer", str(digit_shards), "--text-tokenizer", str(digit_shards)]
    return ["run", "--source", str(scans), *tokenizers, "--model", "emu3-tiny", "--area", "64", "--block", "50"]


def digests(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in TOKEN_FILES}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run_tool(TOOL, *options, "--output", "shards", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"wrote shards: {NUMBER} samples, " in done.stdout
    assert "images/s" in done.stdout
    return folder / "shards"


def test_two_processes_make_the_same_shards(options, whole, tmp_path):
    jobs = start_job(2, TOOL, *options, "--output", "shards", cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    assert digests(tmp_path / "shards") == digests(whole)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("rank")] == ["shards"]


@pytest.mark.full
def test_torchrun_makes_the_same_shards(options, whole, tmp_path):
    done = torchrun(2, TOOL, *options, "--output", "shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "shards") == digests(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_goes_on_where_it_was(number, options, whole, tmp_path):
    output = tmp_path / "shards"
    job = start_tool(TOOL, *options, "--output", output, "--threads", "1", cwd=tmp_path, log=tmp_path / "log")
    parts = output.with_name("shards.parts")
    while len(list(parts.glob("0*"))) < 2 and job.is_alive():
        time.sleep(0.01)
    os.kill(job.pid, number)
    assert ended([job], 60) == [-number if number == signal.SIGKILL else 130]
    assert not output.exists()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*/part.json")}
    if number != signal.SIGKILL:
        assert (tmp_path / "log.err").read_text().strip() == "megatron_cca: interrupted"
        assert list((parts).glob("rank*/*")) == []
    done = run_tool(TOOL, *options, "--output", str(output), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(output) == digests(whole)
    assert before
    assert not parts.exists()


@pytest.mark.full
def test_a_rank_that_meets_an_error_ends_all(options, tmp_path):
    done = torchrun(2, TOOL, *options, "--output", "shards", "--max-caption-tokens", "1", cwd=tmp_path)
    assert done.returncode != 0
    assert "--source:" in done.stderr
    assert "--max-skipped 0.1 allows 60" in done.stderr
    assert not (tmp_path / "shards").exists()


def test_inspect_prints_counts_and_draws_a_sheet(whole, tmp_path):
    done = run_tool(TOOL, "inspect", str(whole), "--picture", "sheet.png", "--samples", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{NUMBER} samples, every file as it was written" in done.stdout
    assert "4 x 4" in done.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_source_with_links_and_lists_of_captions(options, scans, whole, tmp_path):
    """What is refused says the option; with it the job does what it says, and tells what it left out."""
    names = sorted(path.name for path in scans.iterdir() if path.suffix == ".png")[:6]
    (tmp_path / "mine").mkdir()
    for name in names:
        (tmp_path / "mine" / name).symlink_to(scans / name)
    listed = [{"file_name": name, "caption": ["a one", "a two"]} for name in [*names, "gone.png"]]
    text = "\r\n\r\n".join(map(json.dumps, listed))
    (tmp_path / "mine/captions.jsonl").write_text(f"\ufeff{text}", encoding="utf-8", newline="")
    (tmp_path / "mine/more.heic").write_bytes(b"x")
    run = [*options, "--source", "mine", "--output", "shards", "--max-skipped", "0.2"]
    for option, hint in (
        (
            ["--caption-of-list", "first"],
            "leaves the folder; copy the files there, or allow the folder where they are by",
        ),
        (["--allow-outside", scans], "caption must be a string, found a list of 2; choose one of each list with"),
    ):
        done = run_tool(TOOL, *run, *option, cwd=tmp_path)
        assert done.returncode == 2
        assert hint in done.stderr.splitlines()[-1]
        assert not (tmp_path / "shards").exists()
    done = run_tool(TOOL, *run, "--caption-of-list", "first", "--allow-outside", scans, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--source: not read: 1 .heic (more.heic)" in done.stderr
    assert "skipped 1: gone.png is missing\nwrote shards: 6 samples, 1 skipped (see skipped.jsonl there)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "SHARDS: nowhere/manifest.json is missing"),
        (["inspect", "{whole}", "--image-tokenizer", "."], "--image-tokenizer: "),
        (["run", "--source", "nowhere", "--output", "x", "--text-tokenizer", "."], "--text-tokenizer: "),
    ],
)
def test_wrong_input_is_one_line(arguments, message, whole, tmp_path):
    done = run_tool(TOOL, *(argument.format(whole=whole) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("megatron_cca: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []
