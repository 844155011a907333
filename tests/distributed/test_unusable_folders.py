"""Programs in surroundings that cannot be used: one line, status 2, before any work."""

import sys

import pytest

from tests.distributed.launch import ROOT, SCRIPT, run_tool, typed

TOOLS, EXAMPLES = ROOT / "tools", ROOT / "examples"
CLOSED = "/sys/closed"
CONFIG = ["--config", EXAMPLES / "emu3_tiny_base.yaml"]
GRID = ["--image-grid", "4x4", "--caption-tokens", "4"]
# What every program is told; the option that says where to write, and what to write there, come last.
OUTPUTS = {
    SCRIPT: [[*CONFIG, "--set", "data.path=.", "--set", f"training.output_dir={CLOSED}"]],
    TOOLS / "cache_reference.py": [[*CONFIG, "--output", CLOSED]],
    TOOLS / "convert_checkpoint.py": [
        ["import", "--hf", "hf", "--output", CLOSED],
        ["export", "--checkpoint", "run", "--output", CLOSED],
    ],
    TOOLS / "evaluate.py": [["--samples", "a", "--reference", "b", "--output", CLOSED]],
    TOOLS / "generate.py": [["--checkpoint", "run", "--caption", "a", "--output", CLOSED]],
    TOOLS / "measure_reference_bias.py": [["--checkpoint", "run", "--data", "a", "--output", "/sys/closed.json"]],
    TOOLS / "plan.py": [
        [*CONFIG, *GRID, "--gpus", "8", "--gpu", "h200", "--output", CLOSED],
        ["dry-run", *CONFIG, *GRID, "--gpus", "8", "--output", CLOSED],
        ["calibrate", *CONFIG, *GRID, "--output", CLOSED],
    ],
    TOOLS / "report.py": [["run", "--output", "/sys/closed.html"]],
    TOOLS / "study.py": [["--study", EXAMPLES / "studies" / "figure4.yaml", "--output", CLOSED]],
    TOOLS / "tokenize_images.py": [["run", "--source", "a", "--output", CLOSED]],
    EXAMPLES / "scaling" / "run.py": [["--output", CLOSED], ["point", "--output", CLOSED]],
    EXAMPLES / "quickstart" / "run.py": [["--output", CLOSED]],
    EXAMPLES / "self_play" / "run.py": [["--base", "run", "--output", CLOSED]],
}


def test_every_program_says_first_that_its_output_cannot_be_written(tmp_path):
    assert OUTPUTS.keys() == {*TOOLS.glob("*.py"), *EXAMPLES.glob("*/run.py"), SCRIPT}
    for program, calls in OUTPUTS.items():
        for words in calls:
            done = run_tool(program, *words, cwd=tmp_path)
            option = "training.output_dir" if program == SCRIPT else "--output"
            assert done.returncode == 2, (words, done.stderr)
            assert done.stderr.startswith(f"megatron_cca: error: {option}: {CLOSED}"), (words, done.stderr)
            assert "cannot be written (" in done.stderr and done.stderr.count("\n") == 1, (words, done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def parquet(tmp_path):
    """A folder that nothing is wrong with."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b"x", "path": None}], "text": ["a"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "pq").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pq" / "train.parquet")
    return tmp_path / "pq"


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_not_laid_on_the_data(variable, parquet, digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, CLOSED)
    tokenizers = ["--image-tokenizer", digit_shards, "--text-tokenizer", digit_shards]
    model = ["--model", "emu3-tiny", "--area", "64"]
    words = ["run", "--source", parquet, "--output", tmp_path / "out", *model, *tokenizers]
    done = run_tool(TOOLS / "tokenize_images.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron_cca: error: {variable}: {CLOSED}")
    assert done.stderr.endswith(f"; set {variable} to a folder that can be written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pq"]


@pytest.mark.full
@pytest.mark.parametrize("program", OUTPUTS, ids=lambda program: f"{program.parent.name}/{program.name}")
def test_a_current_folder_that_is_gone_is_said_by_a_cold_start(program, tmp_path):
    gone = 'import os, sys; os.mkdir("a"); os.chdir("a"); os.rmdir("../a"); os.execv(sys.argv[1], sys.argv[1:])'
    done = typed(sys.executable, "-c", gone, sys.executable, program, *OUTPUTS[program][0], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "megatron_cca: error: the current folder has been removed; change to one that exists\n",
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "program", [SCRIPT, TOOLS / "generate.py", TOOLS / "plan.py"], ids=lambda program: program.name
)
def test_a_cache_that_is_wanted_at_import_is_said_by_a_cold_start(program, tmp_path):
    """Torch makes its folder for compiled kernels when Megatron-Core is imported."""
    words = {
        "generate.py": ["--checkpoint", "run", "--caption", "a", "--output", "drawn"],
        "plan.py": ["dry-run", *CONFIG, *GRID, "--gpus", "1"],
    }.get(program.name, [])
    done = typed(sys.executable, program, *words, cwd=tmp_path, HOME="/sys", TORCHINDUCTOR_CACHE_DIR=CLOSED)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"megatron_cca: error: TORCHINDUCTOR_CACHE_DIR: {CLOSED} cannot be written ("
    )
    assert "Traceback" not in done.stderr
