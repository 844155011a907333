"""An installation without extras, outside of a checkout: its programs run; what it lacks, it names in one line."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from megatron_cca.__main__ import programs
from tests.distributed.launch import ROOT, SCRIPT, run_tool, typed
from tests.selection import Computed, mostly_full

pytest.importorskip("nvidia.dali")

TOKENIZE = str(ROOT / "tools" / "tokenize_images.py")
TINY = ("--config", "emu3_tiny_cca")
LACKING = {
    "loader": "data.loader: dali is not installed here; pip install 'megatron-cca[data]', or set it to torch",
    "images": "--resize: dali needs NVIDIA DALI; pip install 'megatron-cca[data]', or take authors, which needs "
    "Pillow alone",
    "digits": "data.path: digits needs scikit-learn; pip install 'megatron-cca[eval]'",
    "inspect": "matplotlib is not installed; pip install 'megatron-cca[eval]'",
}
HELP = {f"{name} --help": name for name in programs()}
INSTALLED = ("help", "plan", "example", "no example")
QUICK = ("train", "resume", "loader", "images", *INSTALLED, *HELP)


def training(data, output, steps, **changes):
    values = {
        "data.path": data,
        "training.output_dir": output,
        "training.pretrained_checkpoint": "null",
        "training.train_iters": steps,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 16,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [str(SCRIPT), *(word for key, value in values.items() for word in ("--set", f"{key}={value}"))]


def install(folder):
    """Install the package into an empty folder, as pip does without ``--editable``."""
    source = folder / "source"
    for name in ("megatron_cca", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What it requires is here already, and core_install.py hides the rest; building fetches nothing.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--target", folder / "site", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def core(site, digit_shards, tmp_path_factory):
    """By program: its status, output and errors in an installation without extras. And where they ran."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "images").mkdir()
    for name in ("one", "two"):
        Image.new("L", (64, 64)).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("the digit one")
    program = site / "megatron_cca" / "__main__.py"
    tokenizers = ["--image-tokenizer", digit_shards, "--text-tokenizer", digit_shards, "--model", "emu3-tiny"]
    calls = {
        "train": training(digit_shards, "run", 2),
        "resume": training(digit_shards, "run", 3),
        "loader": training(digit_shards, "other", 2, data__loader="dali"),
        "images": [TOKENIZE, "run", "--source", "images", "--output", "shards", *tokenizers],
        "help": [program, "--help"],
        **{key: [program, name, "--help"] for key, name in HELP.items()},
        "plan": [
            program,
            "plan",
            *TINY,
            "--gpus",
            "8",
            "--gpu",
            "h100-80gb",
            "--image-grid",
            "4x4",
            "--caption-tokens",
            "8",
        ],
        "example": [program, "train", *TINY, *training(digit_shards, "named", 2)[1:]],
        "no example": [program, "train", "--config", "emu3_tiny"],
        "digits": training("digits", "other", 2),
        "inspect": [TOKENIZE, "inspect", digit_shards, "--picture", "sheet.png"],
        "authors": [TOKENIZE, "run", "--source", "images", "--output", "ours", "--resize", "authors", *tokenizers],
    }

    def run(wanted):
        names = QUICK if wanted in QUICK else [name for name in calls if name not in QUICK]
        words = json.dumps([list(map(str, calls[name])) for name in names])
        path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = typed(sys.executable, "-m", "tests.references.core_install", words, cwd=folder, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        forgotten, package, answers = json.loads(done.stdout).values()
        assert package == str(site / "megatron_cca")
        assert {"matplotlib", "nvidia.dali", "pytest", "scipy", "sklearn", "transformers"} <= {*forgotten}
        return dict(zip(names, answers, strict=True))

    return Computed(run), folder


def test_programs_of_an_installation_find_each_other_and_the_examples(core):
    answers, folder = core
    for name in (*INSTALLED[:3], *HELP):
        assert answers[name][0] == 0, answers[name][2]
    for key, name in HELP.items():
        assert answers[key][1].startswith(f"usage: megatron-cca {name} ")
    assert re.findall(r"^  ([a-z-]+) +\S", answers["help"][1], re.MULTILINE) == [*HELP.values()]
    assert answers["plan"][1].startswith("8 x h100-80gb, 8 a node. ")
    assert len(losses(folder / "named")) == 2
    status, output, errors = answers["no example"]
    assert (status, output, errors.count("\n")) == (2, "", 1)
    line = "megatron_cca: error: --config: 'emu3_tiny' is neither a file nor an example; the examples are "
    assert errors.startswith(line) and "emu3_tiny_cca, " in errors


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_needs_no_extra(core, digit_shards, tmp_path):
    """Steps, a checkpoint and what continues it; the losses are those of an installation that has everything."""
    answers, folder = core
    for name in ("train", "resume"):
        status, output, errors = answers[name]
        assert (status, errors) == (0, ""), errors
        assert "batches through torch" in output.splitlines()[0]
    assert "continuing at step 2" in answers["resume"][1].splitlines()[0]
    done = run_tool(*training(digit_shards, "run", 3), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batches through dali" in done.stdout.splitlines()[0]
    assert len(losses(folder / "run")) == 3
    assert losses(folder / "run") == losses(tmp_path / "run")


@pytest.mark.parametrize("name", mostly_full(LACKING, QUICK))
def test_what_an_extra_would_bring_is_named_in_one_line(name, core):
    answers, folder = core
    status, output, errors = answers[name]
    assert (status, output, errors) == (2, "", f"megatron_cca: error: {LACKING[name]}\n")
    assert not {"other", "shards", "sheet.png"} & {path.name for path in folder.iterdir()}


@pytest.mark.full
def test_images_are_tokenized_without_dali_as_the_authors_do(core):
    answers, folder = core
    assert answers["authors"][0] == 0, answers["authors"][2]
    assert json.loads((folder / "ours" / "manifest.json").read_text())["resize"] == "authors"
