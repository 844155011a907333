"""Models that no run here made, of vocabularies that are not the digits': drawn and trained as what they are."""

import json

import numpy as np
import pytest
import torch
import yaml

from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.tokenizers import train_tokenizer
from megatron_cca.models import resolve_architecture
from tests.distributed.launch import ROOT, run_tool, run_workers
from tests.distributed.test_generate_tool import generate, rows
from tests.references import llamagen, llamagen_vq, thin

CONVERT = ROOT / "tools" / "convert_checkpoint.py"
TOKENIZE = ROOT / "tools" / "tokenize_images.py"
GIVEN = [part for key, value in thin.LLAMAGEN_KEYS.items() for part in ("--set", f"model.{key}={value}")]
# A pixel for each code: a thousand pictures are soon drawn.
PIXELS = {"first": 32, "widths": (32,), "blocks": 1, "latent": 2, "codebook": (16_384, 2)}
STATE = llamagen.random_weights(thin.LLAMAGEN, std=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``made`` is imported; ``vq.pt`` is its image tokenizer; ``model.yaml`` what its runs need."""
    folder = tmp_path_factory.mktemp("imported")
    torch.save({"model": {f"module.{name}": value for name, value in STATE.items()}}, folder / "thin.pt")
    torch.save(llamagen_vq.random_vq(PIXELS), folder / "vq.pt")
    done = run_tool(CONVERT, "import", "--hf", "thin.pt", "--output", "made", *GIVEN, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()[-1]
    assert said.startswith("its runs need its sizes: model: {name: llamagen-b, num_layers: 2, ")
    (folder / "model.yaml").write_text(said.removeprefix("its runs need its sizes: "))
    verified = run_tool(CONVERT, "verify", "--hf", "thin.pt", "--checkpoint", "made", cwd=folder)
    assert "verdict: the same model" in verified.stdout
    return folder


def drawn(folder, checkpoint, *arguments):
    done = generate(
        *("--checkpoint", checkpoint, "--image-tokenizer", folder / "vq.pt", "--no-npz", "--output", "drawn"),
        *("--overwrite", *arguments),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return rows(folder / "drawn"), np.load(folder / "drawn" / "codes.npy")


def greedy(label):
    """The likeliest codes by the plain model, ``[16]``."""
    codes = torch.empty(1, 0, dtype=torch.int64)
    for _ in range(16):
        logits = llamagen.logits(STATE, torch.tensor([label]), codes, thin.LLAMAGEN)
        codes = torch.cat([codes, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return codes[0].tolist()


def test_any_of_1000_classes_is_drawn_as_the_plain_model_draws_it(folder):
    found, codes = drawn(folder, "made", "--classes", "207", "999", "--temperature", "0")
    assert [(row["prompt"], row["label"]) for row in found] == [("class 207", 207), ("class 999", 999)]
    assert codes.reshape(2, 16).tolist() == [greedy(207), greedy(999)]
    assert not (folder / "runs").exists()


@pytest.mark.full
def test_all_means_all_of_the_models_own(folder):
    found, _ = drawn(folder, "made", "--classes", "all")
    assert [(row["prompt"], row["label"]) for row in found] == [(f"class {label}", label) for label in range(1000)]
    (folder / "names.txt").write_text("".join(f"name {label}\n" for label in range(1000)))
    found, _ = drawn(folder, "made", "--classes", "name 42", "--class-captions", "names.txt")
    assert [(row["prompt"], row["label"]) for row in found] == [("name 42", 42)]


def test_a_class_that_is_not_there_is_counted_against_1000(folder):
    arguments = ["--checkpoint", "made", "--image-tokenizer", "vq.pt", "--classes", "1000", "--output", "none"]
    done = generate(*arguments, cwd=folder)
    assert done.stderr.startswith("megatron_cca: error: --classes: '1000' is no class; there are 1000: 0 to 999; ")


def test_an_import_is_trained_and_what_it_became_is_drawn(folder):
    overrides = [
        f"model.{key}={value}" for key, value in yaml.safe_load((folder / "model.yaml").read_text())["model"].items()
    ]
    vocabulary = resolve_architecture(load_config(None, overrides).model).vocabulary
    numbers = np.random.default_rng(0)
    samples = [Sample(numbers.integers(16_384, size=(1, 4, 4)), np.array([label])) for label in range(984, 1000)]
    write_shards(folder / "shards", samples, vocabulary, None)
    overrides += [f"data.path={folder}/shards", f"training.output_dir={folder}/run", "optimizer.lr=1e-3"]
    overrides += [f"training.pretrained_checkpoint={folder}/made", "training.global_batch_size=8"]
    settings = {"overrides": [*overrides, "training.micro_batch_size=4"], "steps": 2, "save": True}
    steps = run_workers(1, "checkpoint_workers.resume", settings, folder)["rows"]
    assert np.isfinite([row["loss"] for row in steps]).all()
    found, _ = drawn(folder, "run", "--classes", "999")
    assert found[0]["prompt_ids"] == [16_384 + 999]


def test_images_are_tokenised_for_the_vocabulary_of_an_import(folder):
    (folder / "extracted" / "mine_codes").mkdir(parents=True)
    (folder / "extracted" / "mine_labels").mkdir()
    for index, label in enumerate((3, 998)):
        np.save(folder / "extracted" / "mine_codes" / f"{index}.npy", np.full((1, 1, 16), 16_383))
        np.save(folder / "extracted" / "mine_labels" / f"{index}.npy", np.array([label]))
    arguments = ["run", "--source", "extracted", "--output", "own", "--model", "made", "--device", "cpu"]
    done = run_tool(TOKENIZE, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((folder / "own" / "manifest.json").read_text())
    vocabulary = resolve_architecture(load_config(None, ["model.name=llamagen-b"]).model).vocabulary
    assert vocabulary.fingerprint() in json.dumps(manifest)


def test_an_emu3_without_its_image_tokenizer_is_no_model_of_the_digits(tmp_path):
    hf = thin.save_emu3(tmp_path / "hf")
    train_tokenizer(["a cat"], 300).save(str(tmp_path / "tokenizer.json"))
    words = ["--text-tokenizer", tmp_path, "--caption", "a cat", "--output", "drawn"]
    done = run_tool(CONVERT, "import", "--hf", hf, "--output", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for checkpoint in (hf, "made"):
        done = generate("--checkpoint", checkpoint, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
        assert "--image-tokenizer: " in done.stderr
        assert done.stderr.endswith("has no image tokenizer with it; give the config.json and safetensors of Emu3's\n")
    assert not (tmp_path / "runs").exists()
