"""Sampling: the cached path is the training path; seeds decide the image, not batch size, layout or neighbours."""

import itertools

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_workers

TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
GUIDED = {"guidance_scale": 0.7, "batch_size": 8}


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory):
    return drawn(1, checkpoint, tmp_path_factory.mktemp("one"), {"one": []})["one"]


def drawn(ranks, checkpoint, folder, layouts, **options):
    settings = {"checkpoint": checkpoint, "layouts": layouts, "options": {**GUIDED, **options}}
    return run_workers(ranks, "logits_workers.sampled", settings, folder)


def test_neither_batch_size_nor_layout_changes_the_images(checkpoint, one_process, tmp_path):
    """Prompts of three lengths: alone, in one ragged batch, in batches of three, on two and four ranks."""
    assert drawn(1, checkpoint, tmp_path, {"alone": []}, batch_size=1)["alone"] == one_process
    assert drawn(1, checkpoint, tmp_path, {"threes": []}, batch_size=3)["threes"] == one_process
    two = drawn(2, checkpoint, tmp_path, {"TP 2": TP2, "PP 2": PP2})
    assert two == dict.fromkeys(two, one_process)
    four = drawn(4, checkpoint, tmp_path, {"TP 2 x PP 2": [*TP2, *PP2], "TP 2 x DP 2": TP2})
    assert four == dict.fromkeys(four, one_process)


SETTINGS = {
    "no guidance": {"guidance_scale": 0.0},
    "contrastive decoding": {"guidance_scale": 0.0, "contrastive_top_k": 8},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0": {"temperature": 0.0},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.3},
}


def test_every_setting_changes_them(checkpoint, one_process, tmp_path):
    found = {name: drawn(1, checkpoint, tmp_path, {"one": []}, **own)["one"] for name, own in SETTINGS.items()}
    assert [name for name, images in found.items() if images == one_process] == []


def test_cached_logits_are_those_of_the_training_path(checkpoint, tmp_path):
    """Megatron's schedule without a cache is the oracle; prompts of unequal lengths, then token by token."""
    found = run_workers(
        1, "logits_workers.cached_and_whole_logits", {"checkpoint": checkpoint, "layouts": {"one": []}}, tmp_path
    )
    layouts = {"TP 2": TP2, "PP 2": PP2}
    found |= run_workers(
        2, "logits_workers.cached_and_whole_logits", {"checkpoint": checkpoint, "layouts": layouts}, tmp_path
    )
    for name, (difference, largest, afterwards) in found.items():
        assert largest > 0.01, name
        assert difference < 1e-5, name
        assert afterwards == 0, f"{name}: the model is not as it was before it drew"


def loaded(checkpoint):
    from megatron_cca.config.load import load_config
    from megatron_cca.generation.model_loading import load_for_sampling
    from megatron_cca.parallel.ranks import initialize_distributed

    initialize_distributed(load_config())
    return load_for_sampling(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return loaded(checkpoint)


def whole_logits(model, ids):
    tokens = torch.tensor(ids)
    with torch.no_grad():
        return model.chunks[0](tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)


def test_megatrons_logits_equal_the_plain_reference(model):
    from tests.references import emu3

    size = model.architecture.vocabulary.size
    tokens = torch.randint(0, size, (3, 20), generator=torch.Generator().manual_seed(1))
    weights = {name: value.detach() for name, value in model.chunks[0].named_parameters()}
    with torch.no_grad():
        plain = emu3.logits(weights, tokens, model.architecture)
    torch.testing.assert_close(whole_logits(model, tokens.tolist())[..., :size], plain, rtol=1e-5, atol=1e-5)


CODEBOOK, GRID, COUNT = 5, (1, 3), 20_000


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        pytest.param({}, 1, marks=pytest.mark.full),
        ({"guidance_scale": 1.5}, 2),
        ({"contrastive_top_k": 2, "contrastive_alpha": 0.7}, 2),
        ({"temperature": 3.0, "top_k": 4, "top_p": 0.9}, 1),
    ],
)
def test_drawn_images_follow_the_exact_probabilities(options, passes, toy):
    """All 125 images of three codes: how often each is drawn against its probability by the chain rule, chi-square."""
    from scipy.stats import chisquare

    from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes

    vocabulary = toy.architecture.vocabulary
    settings = SamplingSettings(*GRID, batch_size=5000, **options)
    assert settings.forwards_per_token == passes
    prompts = [prompt(vocabulary, caption) for caption in ([9, 8], [])]
    requests = [ImageRequest(prompts[0], seed, prompts[1]) for seed in range(COUNT)]
    codes = sample_codes(toy.chunks, vocabulary, requests, settings).reshape(COUNT, 3)
    exact = exact_probabilities(toy, prompts, options)
    assert exact.sum() == pytest.approx(1)
    counts = np.bincount(codes @ [CODEBOOK**2, CODEBOOK, 1], minlength=CODEBOOK**3)
    assert counts[exact == 0].sum() == 0
    frequent = exact * COUNT > 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(exact[frequent], exact[~frequent].sum()) * COUNT
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(expected) > 10
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.fixture(scope="module")
def toy(checkpoint):
    """The same weights, of whose codebook only five codes count; enlarged, so that they differ."""
    from dataclasses import replace

    model = loaded(checkpoint)
    small = replace(model.architecture.vocabulary, codebook_size=CODEBOOK)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.mul_(1.4)
    return replace(model, architecture=replace(model.architecture, vocabulary=small))


def prompt(vocabulary, caption):
    return vocabulary.prompt(np.array(caption, dtype=np.int64), np.array([1, 2, 3]))


def exact_probabilities(model, prompts, options):
    """float64 of every image, by three whole forward passes of every sequence and NumPy."""
    start = model.architecture.vocabulary.visual_start
    images = np.array(list(itertools.product(range(CODEBOOK), repeat=3)))
    rows = [np.concatenate([np.tile(ids, (len(images), 1)), images + start], axis=1) for ids in prompts]
    streams = [
        whole_logits(model, row.tolist())[:, len(ids) - 1 : -1, start : start + CODEBOOK].double().numpy()
        for row, ids in zip(rows, prompts, strict=True)
    ]
    probabilities = distribution(*streams, **options)
    return np.take_along_axis(probabilities, images[..., None], axis=2)[..., 0].prod(axis=1)


def distribution(
    conditional,
    unconditional,
    guidance_scale=0.0,
    contrastive_top_k=0,
    contrastive_alpha=1.0,
    temperature=1.0,
    top_k=CODEBOOK,
    top_p=1.0,
):
    """What one code is drawn from, ``[..., K]``, written from the papers."""
    expert, amateur = softmax(conditional), softmax(unconditional)
    scores = (1 + guidance_scale) * conditional - guidance_scale * unconditional
    if contrastive_top_k:
        kth = np.sort(expert, axis=-1)[..., -contrastive_top_k, None]
        scores = np.where(expert >= contrastive_alpha * kth, np.log(expert / amateur), -np.inf)
    scores = scores / temperature
    scores = np.where(scores >= np.sort(scores, axis=-1)[..., -top_k, None], scores, -np.inf)
    p = softmax(scores)
    order = np.argsort(-p, axis=-1)
    reached = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    kept = np.zeros_like(p, dtype=bool)
    np.put_along_axis(kept, order, reached < top_p, -1)
    p = p * kept
    return p / p.sum(-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
