"""GenEval's rules against an independent computation, and detectors in their real format."""

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
)

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.clip import ClipScorer
from megatron_cca.lab.evaluation.detectors import ColorNamer, Detector, check_detector, geneval_of
from megatron_cca.lab.evaluation.geneval import COLORS, Found, by_text, check_prompts, class_names, judged, relations
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.shares import ALONE
from tests.references import tiny_clip

WORDS = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "couch": "sofa"}
LABELS = {index: WORDS.get(name, name) for index, name in enumerate(class_names())}


def tiny_mask2former(folder):
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    config = Mask2FormerConfig(backbone_config=swin, **sizes, **layers, num_queries=6, id2label=LABELS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def tiny_detr(folder):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic")
    resnet.out_features = ["stage4"]
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=resnet, d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5,
        id2label=LABELS, **heads,
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 80}).save_pretrained(folder)


@pytest.mark.parametrize("make", [tiny_detr, tiny_mask2former])
def test_tiny_detectors_open_and_judge(make, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        make(tmp_path)
    images = np.random.default_rng(0).integers(256, size=(2, 64, 80, 3)).astype(np.uint8)
    found = Detector(tmp_path, "cpu").find(images)
    assert len(found) == 2
    for one in found:
        assert len(one.names) == len(one.scores) == len(one.boxes)
        assert (one.boxes >= 0).all() and (one.boxes <= [80, 64, 80, 64]).all()
    prompts = ["a photo of a bench", "a photo of two clocks"]
    result = geneval_of("a", ImageSet(images, prompts=prompts), Detector(tmp_path, "cpu"), None, 1, ALONE)
    assert [one.prompt for one in result.verdicts] == prompts
    assert result.missing == 551
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "person"}}))
    with pytest.raises(UserError, match="lacks 79 of COCO's 80 classes"):
        check_detector(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(UserError, match="looks like a 'clip', not like a detector"):
        check_detector(tmp_path)


def answered(detector, **outputs):
    """The objects that a detector finds in one image of 64 x 80 where its model gives these outputs."""

    class Model(dict):
        device = torch.device("cpu")

        def __call__(self, **_):
            return self

    detector._model = Model({name: torch.tensor(one)[None].float() for name, one in outputs.items()})
    (found,) = detector.find(np.zeros((1, 64, 80, 3), dtype=np.uint8))
    return found


def certain(*labels, others):
    """Logits that are certain of a label each; the last of them is that of nothing."""
    return [[20.0 * (place == label) for place in range(others)] for label in labels]


def test_boxes_are_in_pixels_and_nothing_is_no_object(tmp_path):
    tiny_detr(tmp_path)
    # Centre, width and height as shares of the image; the last one reaches over its edge.
    boxes = [[0.5, 0.5, 0.25, 0.5], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.4, 0.5]]
    logits = certain(3, 80, 7, others=81)
    found = answered(Detector(tmp_path, "cpu"), logits=logits, pred_boxes=boxes)
    assert found.names == [class_names()[3], class_names()[7]]
    np.testing.assert_allclose(found.boxes, [[30, 16, 50, 48], [56, 16, 80, 48]], atol=1e-4)
    np.testing.assert_allclose(found.scores, 1, atol=1e-3)


def test_masks_give_boxes_and_make_the_rest_grey(tmp_path):
    tiny_mask2former(tmp_path)
    masks = np.full((2, 16, 20), -20.0)
    masks[0, 4:8, 5:10] = masks[1, 10:12, 2:6] = 20.0
    found = answered(
        Detector(tmp_path, "cpu"), class_queries_logits=certain(3, 80, others=81), masks_queries_logits=masks
    )
    assert found.names == [class_names()[3]]
    # Four pixels are one of the model's; its edges are interpolated twice.
    np.testing.assert_allclose(found.boxes, [[20, 16, 40, 32]], atol=3)
    image = np.full((64, 80, 3), 7, dtype=np.uint8)
    corner = np.zeros((64, 80), dtype=bool)
    corner[20:24, 30:50] = corner[20:32, 30:34] = True
    kept = Found(["dog"], np.ones(1), np.array([[30.0, 20.0, 50.0, 32.0]]), corner[None])
    crop = np.asarray(ColorNamer._crop(image, kept, 0))
    assert crop.shape == (12, 20, 3)
    assert (crop[corner[20:32, 30:50]] == 7).all()
    assert (crop[~corner[20:32, 30:50]] == 153).all()


def by_angles(box, other):
    """The rule for positions, a number at a time."""
    names, lengths = set(), []
    for axis in (0, 1):
        apart = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        slack = 0.1 * (box[axis + 2] - box[axis] + other[axis + 2] - other[axis])
        lengths.append((apart, math.copysign(max(abs(apart) - slack, 0.0), apart)))
    distance = math.sqrt(sum(apart**2 for apart, _ in lengths))
    if max(abs(beyond) for _, beyond in lengths) < 1e-3:
        return names
    for (_, beyond), (less, more) in zip(lengths, (("left of", "right of"), ("above", "below")), strict=True):
        if abs(beyond) > distance / 2:
            names.add(less if beyond < 0 else more)
    return names


def test_positions_are_those_of_an_independent_computation():
    random, seen = np.random.default_rng(3), set()
    for _ in range(2000):
        corners = random.uniform(0, 100, (2, 2, 2))
        boxes = np.sort(corners, axis=1).reshape(2, 4)
        assert relations(*boxes) == by_angles(*boxes)
        seen |= {frozenset(relations(*boxes))}
    assert len(seen) == 9


def objects(*given):
    names, scores, boxes = zip(*given, strict=True)
    return Found(names, np.array(scores), np.array(boxes, dtype=float))


LEFT, RIGHT = (0, 40, 20, 60), (80, 40, 100, 60)
DOG = "a photo of a dog right of a teddy bear"


@pytest.mark.parametrize(
    ("prompt", "found", "reason"),
    [
        ("a photo of two clocks", objects(("clock", 0.95, LEFT), ("clock", 0.91, RIGHT)), ""),
        ("a photo of two clocks", objects(("clock", 0.95, LEFT), ("clock", 0.9, RIGHT)), "1 x clock, where 2 or more"),
        ("a photo of two clocks", objects(*[("clock", 0.95, LEFT)] * 3), "3 x clock, where fewer than 3"),
        ("a photo of a bench", objects(("bench", 0.31, LEFT)), ""),
        ("a photo of a bench", objects(("bench", 0.3, LEFT)), "0 x bench"),
        (DOG, objects(("dog", 0.9, RIGHT), ("teddy bear", 0.8, LEFT)), ""),
        (
            "a photo of a dog right of a teddy bear",
            objects(("dog", 0.9, LEFT), ("teddy bear", 0.8, RIGHT)),
            "dog is left",
        ),
        (
            "a photo of a dog right of a teddy bear",
            objects(("dog", 0.9, LEFT)),
            "0 x teddy bear, .*; no right teddy bear",
        ),
        (
            "a photo of a purple wine glass and a black apple",
            objects(("wine glass", 0.9, LEFT), ("apple", 0.9, RIGHT)),
            "wine glass is black, not purple",
        ),
    ],
)
def test_rules_by_hand(prompt, found, reason):
    verdict = judged(by_text()[prompt], found, lambda places, name: ["black"] * len(places))
    assert verdict.correct == (not reason)
    assert re.match(reason or "$", verdict.reason), verdict.reason


def test_colors_are_the_nearest_sentences(tmp_path):
    clip = ClipScorer(tiny_clip.save(tmp_path))
    image = np.random.default_rng(5).integers(256, size=(64, 64, 3)).astype(np.uint8)
    found = objects(("car", 0.9, (3.4, 2.6, 40, 41)), ("car", 0.8, (0, 0, 64, 64)))
    names = ColorNamer(clip).names(image, found, [0, 1], "car")
    model, processor = clip.model, clip.processor
    for name, crop in zip(names, (image[3:41, 3:40], image), strict=True):
        means = []
        for color in COLORS:
            texts = [f"a photo of a {color} car", f"a photo of a {color}-colored car", f"a photo of a {color} object"]
            options = {"padding": True, "truncation": True, "max_length": 20}
            inputs = processor(images=[crop], text=texts, return_tensors="pt", **options)
            with torch.no_grad():
                both = model(**inputs)
            mean = both.text_embeds.mean(0)
            means.append(float((mean / mean.norm()) @ both.image_embeds[0]))
        assert name == COLORS[int(np.argmax(means))]


@pytest.mark.parametrize(
    ("prompt", "side", "message"),
    [
        ("a fox", 64, "1 of 1 prompts of a are not GenEval's, such as 'a fox'"),
        ("a photo of a bench", 63, "63 x 63 pixels, too few"),
        ("a photo of a purple wine glass and a black apple", 64, "1 prompts of a ask for colors"),
    ],
)
def test_what_cannot_be_judged_is_refused(prompt, side, message):
    with pytest.raises(UserError, match=message):
        check_prompts("a", [prompt], (side, side), has_colors=False)
