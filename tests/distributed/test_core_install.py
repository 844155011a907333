"""An installation without extras trains and continues; what it lacks, it names in one line."""

import json
import os
import sys

import pytest
from PIL import Image

from tests.distributed.launch import ROOT, SCRIPT, run_tool, typed
from tests.selection import Computed, mostly_full

pytest.importorskip("nvidia.dali")

TOKENIZE = str(ROOT / "tools" / "tokenize_images.py")
LACKING = {
    "loader": "data.loader: dali is not installed here; pip install -e '.[data]', or set it to torch",
    "images": "--resize: dali needs NVIDIA DALI; pip install -e '.[data]', or take authors, which needs Pillow alone",
    "digits": "data.path: digits needs scikit-learn; pip install 'megatron-cca[eval]'",
    "inspect": "matplotlib is not installed; pip install -e '.[data,eval,hf]'",
}
QUICK = ("train", "resume", "loader", "images")


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


@pytest.fixture(scope="module")
def core(digit_shards, tmp_path_factory):
    """By program: its status, output and errors in an installation without extras. And where they ran."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "images").mkdir()
    for name in ("one", "two"):
        Image.new("L", (64, 64)).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("the digit one")
    tokenizers = ["--image-tokenizer", digit_shards, "--text-tokenizer", digit_shards, "--model", "emu3-tiny"]
    programs = {
        "train": training(digit_shards, "run", 2),
        "resume": training(digit_shards, "run", 3),
        "loader": training(digit_shards, "other", 2, data__loader="dali"),
        "images": [TOKENIZE, "run", "--source", "images", "--output", "shards", *tokenizers],
        "digits": training("digits", "other", 2),
        "inspect": [TOKENIZE, "inspect", digit_shards, "--picture", "sheet.png"],
        "authors": [TOKENIZE, "run", "--source", "images", "--output", "ours", "--resize", "authors", *tokenizers],
    }

    def run(wanted):
        names = QUICK if wanted in QUICK else [name for name in programs if name not in QUICK]
        words = json.dumps([list(map(str, programs[name])) for name in names])
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = typed(sys.executable, "-m", "tests.references.core_install", words, cwd=folder, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        forgotten, answers = json.loads(done.stdout).values()
        assert {"matplotlib", "nvidia.dali", "pytest", "scipy", "sklearn", "transformers"} <= {*forgotten}
        return dict(zip(names, answers, strict=True))

    return Computed(run), folder


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
