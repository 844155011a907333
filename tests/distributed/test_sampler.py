"""Sampling: the cached path is the training path; seeds decide the image, not batch size or tensor parallelism."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.checkpoint.huggingface import import_checkpoint
from tests.distributed.launch import ROOT, environment, run_workers
from tests.distributed.test_layout_parity import CCA
from tests.references.huggingface import save_emu3

PARAMETERS = {"images": 8, "guidance_scale": 0.7, "batch_size": 8}


@pytest.fixture(scope="module")
def checkpoint(digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    overrides = [*CCA, f"data.path={digit_shards}", f"training.output_dir={folder}/run"]
    run_workers(1, "resume", {"overrides": overrides, "steps": 3, "save": True}, folder)
    return str(folder / "run")


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory):
    settings = {**PARAMETERS, "checkpoint": checkpoint}
    return run_workers(1, "sampled", settings, tmp_path_factory.mktemp("one"))


def test_batch_size_and_tensor_parallelism_do_not_change_the_images(checkpoint, one_process, tmp_path):
    small_batches = run_workers(1, "sampled", {**PARAMETERS, "checkpoint": checkpoint, "batch_size": 1}, tmp_path)
    assert small_batches == one_process
    assert run_workers(2, "sampled", {**PARAMETERS, "checkpoint": checkpoint}, tmp_path) == one_process


def test_the_guidance_scale_changes_them(checkpoint, one_process, tmp_path):
    settings = {**PARAMETERS, "checkpoint": checkpoint, "guidance_scale": 0.0}
    assert run_workers(1, "sampled", settings, tmp_path) != one_process


@pytest.fixture(scope="module")
def model(checkpoint):
    from megatron_cca.config import load_config
    from megatron_cca.generation.loading import load_for_sampling
    from megatron_cca.parallel.process_groups import initialize_distributed

    initialize_distributed(load_config())
    return load_for_sampling(checkpoint)


def test_cached_logits_equal_the_whole_forward_pass(model):
    from megatron_cca.generation.sampler import _Stream

    gpt, architecture = model
    gpt.eval()
    tokens = torch.randint(0, architecture.vocabulary.size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = gpt(tokens, torch.arange(20).expand(3, -1), None)
        stream = _Stream(gpt, tokens[:, :6], num_new=14)
        cached = [stream.prefill()] + [stream.decode(tokens[:, position]) for position in range(6, 20)]
    torch.testing.assert_close(torch.stack(cached, 1), whole[:, 5:], rtol=1e-5, atol=1e-5)


def test_megatrons_logits_equal_the_plain_reference(model):
    from tests.references import emu3

    gpt, architecture = model
    tokens = torch.randint(0, architecture.vocabulary.size, (3, 20), generator=torch.Generator().manual_seed(1))
    weights = {name: value.detach() for name, value in gpt.named_parameters()}
    with torch.no_grad():
        ours = gpt(tokens, torch.arange(20).expand(3, -1), None)[..., : architecture.vocabulary.size]
        plain = emu3.logits(weights, tokens, architecture)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_drawn_codes_follow_the_models_distribution(model):
    """First token of 4,000 images against its exact probabilities: chi-square over the frequent codes."""
    from scipy.stats import chisquare

    from megatron_cca.generation.sampler import ImageRequest, SamplingSettings, sample_codes
    from megatron_cca.models.emu3.grammar import prompt_ids

    gpt, architecture = model
    vocabulary, words, caption = architecture.vocabulary, [1, 2, 3], np.array([9, 8])
    codes = sample_codes(
        gpt, vocabulary, [ImageRequest(caption, seed) for seed in range(4000)], SamplingSettings(1, 1, words)
    ).reshape(-1)
    prompt = torch.from_numpy(prompt_ids(vocabulary, caption, words))[None]
    with torch.no_grad():
        logits = gpt(prompt, torch.arange(prompt.size(1))[None], None)[0, -1]
    exact = logits[vocabulary.visual_start : vocabulary.visual_start + vocabulary.codebook_size].softmax(-1).numpy()
    counts = np.bincount(codes, minlength=vocabulary.codebook_size)
    frequent = exact * 4000 > 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(exact[frequent], exact[~frequent].sum()).astype(float)
    assert chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-3


def generate(*arguments, cwd):
    tool = str(ROOT / "tools" / "generate.py")
    command = [sys.executable, tool, "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_the_tool_draws_a_picture(checkpoint, digit_shards, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--caption", "a handwritten seven", "--caption", "sept, à la main"]
    arguments += ["--shards", str(digit_shards), "--images", "3", "--guidance-scale", "0.5", "--output", "drawn.png"]
    done = generate(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "wrote drawn.png: 6 pictures\n"), done.stderr[-2000:]
    with Image.open(tmp_path / "drawn.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "checkpoint: no checkpoint at nowhere"),
        ({"--images": "0"}, "--images: must be 1 or more, found 0"),
        ({"--output": "no/such/folder.png"}, "--output: the folder no/such does not exist"),
        ({"--guidance-scale": "-1"}, "guidance scale: must be 0 or more and finite, found -1.0"),
        ({"--caption": "seven " * 100}, "caption 'seven seven"),
    ],
)
def test_the_tool_refuses_in_one_line(change, message, checkpoint, digit_shards, tmp_path):
    arguments = {"--checkpoint": checkpoint, "--caption": "a", "--output": "drawn.png", "--shards": str(digit_shards)}
    done = generate(*(word for pair in {**arguments, **change}.items() for word in pair), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron_cca: error: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_image_tokens_are_not_known_is_refused(digit_shards, tmp_path):
    import_checkpoint(save_emu3(tmp_path / "hf", "Emu3ForCausalLM", vocab_size=1000), tmp_path / "megatron")
    arguments = ["--checkpoint", "megatron", "--caption", "a", "--output", "drawn.png", "--shards", str(digit_shards)]
    done = generate(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "has a vocabulary of 1000, whose image tokens are not known; nothing can be drawn with it" in done.stderr
