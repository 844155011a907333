"""A model of classes from shards to pictures: batches, resuming, sampling, pictures while training, a study."""

import json

import numpy as np
import pytest
import torch
import yaml

from megatron_cca.config.load import load_config
from megatron_cca.data.digits import ensure_digit_shards
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.models import resolve_architecture
from megatron_cca.training.batches import open_data, training_batches
from tests.distributed.launch import ROOT, run_tool, run_workers
from tests.distributed.test_batches import digest_of
from tests.distributed.test_generate_tool import generate, rows
from tests.distributed.test_study_tool import RUN, STUDY, run_study
from tests.references.code_folders import random_codes, write_codes

MODEL = ["model.name=llamagen-tiny", "model.num_layers=2"]
VOCABULARY = resolve_architecture(load_config(None, MODEL).model).vocabulary
CCA = [*MODEL, "model.init_method_std=0.2", "data.condition_dropout=0.2", "optimizer.lr=2e-3", "objective.beta=0.1"]
CCA += ["training.global_batch_size=8", "training.micro_batch_size=4"]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Shards of ten classes, whose 60 samples have 5 variants each."""
    folder = tmp_path_factory.mktemp("varied") / "shards"
    samples = [Sample(image[:, None], np.array([index % 10])) for index, image in enumerate(random_codes(60, 5))]
    write_shards(folder, samples, VOCABULARY, None)
    return str(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(ensure_digit_shards(VOCABULARY, tmp_path_factory.mktemp("classes") / "digits"))


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    overrides = [*CCA, f"data.path={digits}", f"training.output_dir={folder}/run"]
    run_workers(1, "checkpoint_workers.resume", {"overrides": overrides, "steps": 3, "save": True}, folder)
    return str(folder / "run")


def test_variants_are_the_same_bytes_in_every_layout(varied, tmp_path):
    common = [*CCA, f"data.path={varied}", "validation.fraction=0.1"]
    steps = (0, 1_000_000)
    config = load_config(None, [*common, "training.micro_batch_size=8"])
    batches = training_batches(config, open_data(config), with_pairs=True)
    expected = [[digest_of(batches, step + turn) for turn in range(3)] for step in steps]
    layouts = {
        "DP 2": ["training.micro_batch_size=2"],
        "TP 2": ["parallel.tensor_model_parallel_size=2"],
        "PP 2": ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=1", "data.prefetch=5"],
    }
    answers = run_workers(2, "batch_traces", {"common": common, "layouts": layouts, "steps": steps}, tmp_path)
    for name, found in answers.items():
        assert [answer["digests"] for answer in found] == expected, name


def test_a_run_on_variants_resumes_exactly(varied, tmp_path):
    common = [*CCA, f"data.path={varied}"]

    def run(ranks, folder, steps, *extra, save=False):
        overrides = [*common, f"training.output_dir={tmp_path / folder}", *extra]
        return run_workers(
            ranks, "checkpoint_workers.resume", {"overrides": overrides, "steps": steps, "save": save}, tmp_path
        )["rows"]

    whole = run(1, "whole", 5)
    run(1, "cut", 3, save=True)
    assert [row["loss"] for row in run(1, "cut", 2)] == [row["loss"] for row in whole[3:]]
    again = [row["loss"] for row in run(2, "cut", 2, "training.micro_batch_size=2")]
    torch.testing.assert_close(again, [row["loss"] for row in whole[3:]], rtol=1e-5, atol=0)


def test_the_tool_makes_shards_of_code_folders(digits, tmp_path):
    codes = random_codes(30, 3)
    write_codes(tmp_path / "extracted", codes, [index % 10 for index in range(30)])
    arguments = ["run", "--source", "extracted", "--output", "shards", "--model", "llamagen-tiny", "--block", "8"]
    done = tokenized(arguments, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wrote shards: 30 samples, " in done.stdout
    done = tokenized(["inspect", "shards", "--image-tokenizer", digits, "--picture", "sheet.png"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"visual codes        {30 * 3 * 16:,}, 3 variants of each sample" in done.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    done = tokenized([*arguments[:4], "other", "--model", "llamagen-l"], tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert "0.npy has 4 x 4 codes (64 x 64 pixels), the model takes 24 x 24 codes (384 x 384 pixels)" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "other" in path.name) in ([], ["other.parts"])


def tokenized(arguments, folder):
    return run_tool(str(ROOT / "tools" / "tokenize_images.py"), *arguments, "--device", "cpu", cwd=folder)


def test_classes_are_drawn_by_number_and_by_name(checkpoint, tmp_path):
    (tmp_path / "synsets.txt").write_text("".join(f"n0000000{label} name {label}, other\n" for label in range(10)))
    common = ["--checkpoint", checkpoint, "--guidance-scale", 0.5, "--images-per-prompt", 2]
    done = generate(*common, "--classes", 3, 7, "--output", "plain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = ["--classes", "name 3", 7, "--class-captions", "synsets.txt"]
    assert generate(*common, *names, "--output", "named", cwd=tmp_path).returncode == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"label": 3}\n{"label": 7, "prompt": "any text"}\n')
    assert generate(*common, "--prompts", prompts, "--output", "listed", cwd=tmp_path).returncode == 0
    found = {name: rows(tmp_path / name) for name in ("plain", "named", "listed")}
    assert [row["prompt_ids"] for row in found["plain"]] == [[131], [131], [135], [135]]
    assert [row["prompt"] for row in found["plain"]] == ["class 3"] * 2 + ["class 7"] * 2
    assert [row["prompt"] for row in found["named"]] == ["name 3"] * 2 + ["name 7"] * 2
    assert [row["prompt"] for row in found["listed"]] == ["class 3"] * 2 + ["any text"] * 2
    codes = [np.load(tmp_path / name / "codes.npy") for name in found]
    assert all(np.array_equal(one, codes[0]) for one in codes)
    assert codes[0].shape == (4, 4, 4)
    assert np.load(tmp_path / "plain" / "samples.npz")["arr_1"].tolist() == [3, 3, 7, 7]


def test_all_classes(checkpoint, tmp_path):
    done = generate("--checkpoint", checkpoint, "--classes", "all", "--output", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["label"] for row in rows(tmp_path / "all")] == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--caption", "a cat"],
            "--caption: this model takes classes, not texts; give --classes, such as",
        ),
        (
            ["--prompts", "texts.txt"],
            "--prompts: prompt 'a cat': this model takes classes, not texts; give the label of",
        ),
        (["--prompts", "far.jsonl"], "--prompts: prompt 'class 10': label 10 is beyond the model's classes, 0 to 9"),
        (["--classes", "10"], "--classes: '10' is no class; there are 10: 0 to 9; --class-captions gives them names"),
        (
            ["--classes", "1", "--class-captions", "texts.txt"],
            "--class-captions: texts.txt names 1 classes, the",
        ),
        (["--classes", "1", "--grid", "5", "5"], "grid 5*5: 5 x 5 codes, the model takes 4 x 4 alone; model.max_pos"),
        (
            ["--classes", "1", "--prompt-suffix", "x"],
            "--prompt-suffix: this model takes classes, not texts; leave it out",
        ),
        (
            ["--classes", "1", "--guidance-scale", "1", "--negative-prompt", "ugly"],
            "negative prompt 'ugly': this model takes classes, and its second stream has none; leave it out",
        ),
        (
            ["--classes", "1", "--text-tokenizer", "."],
            "--text-tokenizer: this model takes classes, not texts; leave it",
        ),
    ],
)
def test_it_refuses_in_one_line(arguments, message, checkpoint, tmp_path):
    (tmp_path / "texts.txt").write_text("a cat\n")
    (tmp_path / "far.jsonl").write_text('{"label": 10}\n')
    done = generate("--checkpoint", checkpoint, *arguments, "--output", "drawn", cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"megatron_cca: error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "drawn").exists()


def test_codes_that_nobody_can_decode_are_not_drawn(varied, tmp_path):
    overrides = [*CCA, f"data.path={varied}", f"training.output_dir={tmp_path}/run"]
    run_workers(1, "checkpoint_workers.resume", {"overrides": overrides, "steps": 1, "save": True}, tmp_path)
    done = generate("--checkpoint", tmp_path / "run", "--classes", "all", "--output", "drawn", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert done.stderr.startswith("megatron_cca: error: --image-tokenizer: ")
    assert "has no image tokenizer with it; give " in done.stderr
    assert not (tmp_path / "drawn").exists()


def test_pictures_while_training_leave_it_as_it_is(digits, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"label": 3}\n{"label": 9}\n')
    common = [*CCA, f"data.path={digits}", f"training.output_dir={tmp_path}/run"]
    common.append(f"logging.sample_prompts={tmp_path}/prompts.jsonl")
    layouts = {"with": ["logging.sample_interval=1"], "without": []}
    found = run_workers(1, "pictured_steps", {"common": common, "layouts": layouts, "steps": 2}, tmp_path)
    assert found["with"]["losses"] == found["without"]["losses"]
    assert np.array(found["with"]["after"]).shape == (2, 4, 4)


def test_data_of_another_grid_or_family_are_refused(digits, digit_shards, tmp_path):
    from megatron_cca.errors import UserError

    def opened(path, *more):
        config = load_config(None, [*CCA, f"data.path={path}", *more])
        with pytest.raises(UserError) as error:
            open_data(config)
        return str(error.value)

    wanted = f"data.path: sample 0 of {digits} has 4 x 4 codes, the model takes 5 x 5 alone; model.max_position_"
    assert opened(digits, "model.max_position_embeddings=26").startswith(wanted)
    assert "was tokenized for another vocabulary" in opened(digit_shards)


@pytest.mark.full
def test_a_study_of_classes(digits, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    for name, objective, steps in (("base", "next_token", 4), ("control", "next_token", 8), ("cca", "cca", 3)):
        config = {
            "model": {"name": "llamagen-tiny"},
            "objective": {"name": objective},
            "data": {"path": digits},
            "training": {**RUN, "train_iters": steps},
            "logging": {"tensorboard": False},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    methods = {**STUDY["methods"], "cca": {**STUDY["methods"]["cca"], "sweep": {}}}
    study = {**STUDY, "methods": methods, "plots": [{"kind": "comparison"}]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    done = run_study(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "out" / "tiny" / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} == {"base", "cfg", "control", "cca"}
