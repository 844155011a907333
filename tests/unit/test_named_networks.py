"""Published networks from folders, and the metrics on their features, against independent computations."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, Dinov2Config, Dinov2Model

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation import FidelitySettings
from megatron_cca.lab.evaluation.clip import ClipScorer, check_scorer, open_scorer
from megatron_cca.lab.evaluation.extractors import check_extractor, extract, open_extractor
from megatron_cca.lab.evaluation.fidelity import fidelity
from megatron_cca.lab.evaluation.manifolds import cmmd, density_and_coverage, vendi_score
from megatron_cca.lab.evaluation.named_networks import normalised
from tests.references import tiny_clip

IMAGES = np.kron(np.random.default_rng(0).integers(256, size=(5, 4, 4, 3)), np.ones((1, 7, 7, 1))).astype(np.uint8)
PROMPTS = ["a seven", "two dogs", "z", "a red apple", "a" * 40]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14)).save_pretrained(folder)
    return folder


def features(name, images):
    return extract("samples", images, open_extractor(name), {"features"}, 2, None)["features"].double().numpy()


def by_pillow(side):
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in IMAGES])


@pytest.mark.parametrize("side", [14, 224])
def test_images_are_resized_as_pillow_does(side):
    ours = normalised(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), side, (0, 0, 0), (1, 1, 1)).permute(0, 2, 3, 1)
    # Pillow rounds after each of its two passes.
    assert np.abs(255 * ours.numpy() - by_pillow(side)).max() < 1.01


def test_dinov2_gives_the_class_token_at_224_pixels(dinov2):
    found = features(f"dinov2:{dinov2}", by_pillow(224))
    model = Dinov2Model.from_pretrained(dinov2).eval().double()
    pixels = (by_pillow(224) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state[:, 0].numpy()
    assert found.shape == (5, 16)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # Small images are enlarged first.
    np.testing.assert_allclose(features(f"dinov2:{dinov2}", IMAGES), expected, atol=0.01 * expected.std())


def test_clip_gives_the_embedding_that_cmmd_compares(clip):
    found = features(f"clip:{clip}", by_pillow(16))
    model, images = CLIPModel.from_pretrained(clip).eval().double(), CLIPProcessor.from_pretrained(clip).image_processor
    pixels = (by_pillow(16) / 255 - images.image_mean) / images.image_std
    with torch.no_grad():
        hidden = model.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
        expected = model.visual_projection(hidden).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - found[:1]).max() > 0.2


def test_pickscore_is_the_scaled_cosine(clip):
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        inputs = processor(
            images=list(IMAGES), text=PROMPTS, return_tensors="pt", padding="max_length",
            truncation=True, max_length=20, input_data_format="channels_last",
        )  # fmt: skip
        text = model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output).numpy()
        seen = model.visual_projection(model.vision_model(inputs.pixel_values).pooler_output).numpy()
    cosines = (text * seen).sum(1) / np.linalg.norm(text, axis=1) / np.linalg.norm(seen, axis=1)
    scorer = open_scorer(f"pickscore:{clip}", "cpu")
    np.testing.assert_allclose(scorer(IMAGES, PROMPTS), np.exp(2.6592) * cosines, rtol=1e-3, atol=1e-3)
    assert cosines.min() < 0
    assert scorer.cut(PROMPTS).prompts == 1


def test_a_folder_of_another_model_is_refused_with_what_it_looks_like(clip, dinov2, tmp_path):
    with pytest.raises(
        UserError, match=r"^--extractor: .* looks like a 'clip', not like a DINOv2; give the folder of a"
    ):
        check_extractor(f"dinov2:{clip}", None)
    with pytest.raises(
        UserError, match=r"^--scorer: .* looks like a 'dinov2', not like a PickScore; give .*PickScore_v1"
    ):
        check_scorer(f"pickscore:{dinov2}")
    with pytest.raises(UserError, match=r"^--extractor: .*none has no config.json; give the folder of a DINOv2"):
        check_extractor(f"dinov2:{tmp_path / 'none'}", None)


def test_weights_that_are_missing_are_refused(clip, dinov2, tmp_path):
    from safetensors.torch import load_file, save_file

    for kind, source in (("dinov2", dinov2), ("clip", clip)):
        folder = shutil.copytree(source, tmp_path / kind)
        weights = load_file(folder / "model.safetensors")
        del weights[{"dinov2": "layernorm.weight", "clip": "visual_projection.weight"}[kind]]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"^--extractor: .* holds no usable .*1 weights are missing"):
            open_extractor(f"{kind}:{folder}")
    with pytest.raises(UserError, match="1 weights are missing"):
        ClipScorer(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="names no model_type"):
        ClipScorer(tmp_path / "clip")


def two_sets():
    random = np.random.default_rng(5)
    return random.normal(size=(60, 8)), random.normal(size=(50, 8)) * 0.8 + 0.3


def test_density_and_coverage_are_those_of_a_plain_computation():
    ours, theirs = two_sets()
    between = np.linalg.norm(theirs[:, None] - theirs[None], axis=2)
    radius = np.sort(between, axis=1)[:, 3]
    inside = np.linalg.norm(theirs[:, None] - ours[None], axis=2) < radius[:, None]
    found = density_and_coverage(torch.from_numpy(ours), torch.from_numpy(theirs), 3)
    np.testing.assert_allclose(found, [inside.sum() / (3 * 60), inside.any(1).mean()], rtol=1e-12)
    prdc = pytest.importorskip("prdc")
    authors = prdc.compute_prdc(theirs, ours, 3)
    np.testing.assert_allclose(found, [authors["density"], authors["coverage"]], rtol=1e-12)


def test_vendi_counts_what_is_different():
    ours, _ = two_sets()
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.ones(9, 5)) == pytest.approx(1)
    for rows in (ours, ours[:5]):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        values = np.linalg.eigvalsh(unit @ unit.T / len(rows)).clip(1e-300)
        assert vendi_score(torch.from_numpy(rows)) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_cmmd_is_the_double_sum_of_kernels():
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in two_sets())
    kernel = lambda a, b: np.mean([[np.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a])  # noqa: E731
    expected = 1000 * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs))
    assert cmmd(torch.from_numpy(ours), torch.from_numpy(theirs)) == pytest.approx(expected, rel=1e-8)


def test_metrics_on_request_reach_the_report_and_cmmd_wants_a_clip(clip, dinov2):
    settings = FidelitySettings(metrics=("density", "coverage", "vendi", "cmmd"), neighborhood=2)
    found = fidelity(IMAGES, IMAGES[:4], open_extractor(f"clip:{clip}"), settings)
    assert list(found) == ["density", "coverage", "vendi", "cmmd"]
    assert found["coverage"] == 1
    assert 1 < found["vendi"] < 5
    with pytest.raises(UserError, match="gives no embeddings of a CLIP, on which CMMD is computed"):
        fidelity(IMAGES, IMAGES, open_extractor(f"dinov2:{dinov2}"), settings)
