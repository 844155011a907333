"""Janus-Pro's folders on ranks: logits of codes by Megatron and by transformers, tokenizing, drawing."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import train_tokenizer
from megatron_cca.models.janus import tiny_vocabulary
from tests.distributed.launch import LIMIT, ROOT, end_job, run_tool, start_job
from tests.references.huggingface import edit_tensors, load_tensors
from tests.references.janus import CODES, code_logits, random_janus, save_janus

TOOL, TOKENIZE, GENERATE = (
    ROOT / "tools" / name for name in ("convert_checkpoint.py", "tokenize_images.py", "generate.py")
)


def imported(folder, form):
    hf = save_janus(folder / "hf", form, num_key_value_heads=2)
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return hf


@pytest.mark.parametrize("form", ["transformers", "original, pickled"])
def test_verify_compares_the_logits_of_codes(form, tmp_path):
    hf = imported(tmp_path, form)
    done = run_tool(TOOL, "verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors, logits, verdict = done.stdout.splitlines()
    assert tensors.endswith("identical bit for bit")
    assert logits.startswith(f"logits:  2 x 64 x {CODES} in fp32, greatest difference ")
    assert logits.endswith("top-1 agreement 100.0%")
    assert verdict == "verdict: the same model"


@pytest.mark.parametrize("name", ["generation_aligner.hidden_layers.0.bias", "generation_head.proj_out.weight"])
def test_verify_finds_a_change_in_what_draws_images(name, tmp_path):
    hf = imported(tmp_path, "transformers")
    edit_tensors(hf, lambda found: found[f"model.{name}"].view(-1)[3].add_(1))
    done = run_tool(TOOL, "verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    count = len(load_tensors(hf))
    assert f"  model.{name}: 1 of " in done.stdout
    assert f"tensors: {count - 1} of {count} identical bit for bit" in done.stdout
    assert "top-1 agreement 100.0%" not in done.stdout
    assert done.stdout.endswith("verdict: NOT the same model\n")


def test_verify_splits_the_model_over_ranks(tmp_path):
    hf = imported(tmp_path, "original")
    arguments = ["verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu"]
    jobs = start_job(2, TOOL, *arguments, cwd=tmp_path)
    jobs[0].join(LIMIT)
    assert jobs[0].exitcode == 0, (tmp_path / "rank0.err").read_text()
    end_job(jobs)
    assert (tmp_path / "rank0.out").read_text().endswith("verdict: the same model\n")


PLACES = ("river", "old mill", "lighthouse", "green hill")
THINGS = ("fox", "zebra", "window", "sailing boat", "mushroom")
CAPTIONS = [f"a {thing} at night by the {place}" for thing, place in itertools.product(THINGS, PLACES)]


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """A folder with a text tokenizer of as many words as the model, whose added tokens come behind, and its import."""
    folder = tmp_path_factory.mktemp("janus")
    hf = save_janus(folder / "hf", "original, pickled")
    whole = json.loads(train_tokenizer(CAPTIONS, 320).to_str())
    assert len(whole["model"]["vocab"]) == 320
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = ("<|begin_of_sentence|>", "<begin_of_image>", "<pad>")
    whole["added_tokens"] = [{"id": 320 + place, "content": name, **flags} for place, name in enumerate(names)]
    (hf / "tokenizer.json").write_text(json.dumps(whole))
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return folder


def words_of(janus, caption):
    """The ids of a caption with its template, by the library alone."""
    whole = Tokenizer.from_file(str(janus / "hf" / "tokenizer.json"))
    return [word for text in ("user:", f" {caption}", "\n:") for word in whole.encode(text).ids]


def test_images_are_tokenized_by_the_models_folder(janus, tmp_path):
    source, random = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    images = random.integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(CAPTIONS[number])
    own = ["--image-tokenizer", janus / "hf", "--text-tokenizer", janus / "hf", "--model", "janus-tiny"]
    done = run_tool(TOKENIZE, "run", "--source", source, *own, "--area", 256, "--output", "shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    shards = TokenShards(tmp_path / "shards", tiny_vocabulary())
    planes = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        codes = random_janus().model.vqmodel.encode(planes).image_tokens.view(6, 4, 4)
    found = {tuple(shards.caption(number)): shards.codes(number)[0].tolist() for number in range(len(shards))}
    assert found == {tuple(words_of(janus, CAPTIONS[number])): codes[number].tolist() for number in range(6)}


def test_a_text_tokenizer_of_another_size_is_refused(janus, tmp_path):
    train_tokenizer(CAPTIONS, 300).save(str(tmp_path / "tokenizer.json"))
    own = ["--image-tokenizer", janus / "hf", "--text-tokenizer", tmp_path, "--model", "janus-tiny"]
    (tmp_path / "source").mkdir()
    done = run_tool(TOKENIZE, "run", "--source", "source", *own, "--area", 256, "--output", "shards", cwd=tmp_path)
    assert done.returncode == 2
    assert "has 300 ids, model janus-tiny 320; give the folder of that model's checkpoint" in done.stderr


@pytest.mark.parametrize("checkpoint", ["hf", "megatron"])
def test_images_are_drawn_by_the_models_folder_and_by_its_import(checkpoint, janus, tmp_path):
    asked = [part for caption in CAPTIONS[:2] for part in ("--caption", caption)]
    options = ["--grid", 4, 4, "--temperature", 0, "--device", "cpu", "--output", "drawn"]
    done = run_tool(GENERATE, "--checkpoint", janus / checkpoint, *asked, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model = random_janus()
    for caption, drawn in zip(CAPTIONS, np.load(tmp_path / "drawn" / "codes.npy"), strict=False):
        ids = [CODES + word for word in (320, *words_of(janus, caption), 321)]
        for _ in range(16):
            ids.append(int(code_logits(model, torch.tensor([ids]))[0, -1].argmax()))
        assert drawn.reshape(-1).tolist() == ids[-16:]
        assert len(set(ids[-16:])) > 1
