"""HPSv2 and ImageReward from files, against computations that share no code with them."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.clip import check_scorer, open_scorer
from megatron_cca.lab.evaluation.reward_files import read_weights
from tests.references import tiny_rewards as tiny

MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RANDOM = np.random.default_rng(0)
# Upright, lying and square, each smaller or larger than what the models see.
IMAGES = [
    np.kron(RANDOM.integers(256, size=(3, height, width, 3)), np.ones((1, 6, 6, 1))).astype(np.uint8)
    for height, width in ((4, 7), (7, 5), (2, 2))
]
NETWORK = """
import torch
def network():
    class Means(torch.nn.Module):
        def forward(self, images):
            means = images.float().mean((2, 3))
            return means, means
    return Means()
"""
PROMPTS = ["a photo of a cat", "zebra", "one two three four five six seven eight nine ten eleven twelve"]


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory):
    file = tmp_path_factory.mktemp("hpsv2") / "HPS_v2.1_compressed.pt"
    return file, tiny.hpsv2(file)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    return folder / "ImageReward.pt", {name: value.double() for name, value in tiny.image_reward(folder).items()}


def as_clip(weights):
    """The same CLIP of transformers, in float64."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {**sizes, "hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 12, "eos_token_id": 49407}
    vision = {**sizes, "hidden_size": 160, "intermediate_size": 640, "image_size": 16, "patch_size": 4}
    found = {
        "logit_scale": weights["logit_scale"],
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T,
        "visual_projection.weight": weights["visual.proj"].T,
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
    }
    for theirs, ours in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):
        found |= {f"{ours}.{end}": weights[f"{theirs}.{end}"] for end in ("weight", "bias")}
    for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for index in range(2):
            old, new = f"{theirs}.resblocks.{index}", f"{ours}.encoder.layers.{index}"
            for end in ("weight", "bias"):
                parts = weights[f"{old}.attn.in_proj_{end}"].chunk(3)
                found |= {f"{new}.self_attn.{name}_proj.{end}": part for name, part in zip("qkv", parts, strict=True)}
                for one, other in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{new}.{other}.{end}"] = weights[f"{old}.{one}.{end}"]
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.load_state_dict(found)
    return model.eval().double()


def fitted(image, side):
    """Longer side to ``side`` in unrounded levels by Pillow, black beside it."""
    scale = side / max(image.shape[:2])
    height, width = (round(size * scale) for size in image.shape[:2])
    canvas = np.zeros((side, side, 3))
    top, left = (side - height) // 2, (side - width) // 2
    for channel in range(3):
        plane = Image.fromarray(image[..., channel].astype(np.float32) / 255, "F")
        resized = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
        canvas[top : top + height, left : left + width, channel] = resized
    return canvas


def test_hpsv2_is_the_cosine_of_image_and_prompt(hpsv2):
    import open_clip

    file, weights = hpsv2
    scorer, clip = open_scorer(f"hpsv2:{file}", "cpu"), as_clip(weights)
    ids = open_clip.tokenize(PROMPTS, context_length=12)
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    found = []
    for images in IMAGES:
        pixels = np.stack([(fitted(image, 16) - MEAN) / DEVIATION for image in images]).transpose(0, 3, 1, 2)
        with torch.no_grad():
            outputs = clip(input_ids=ids, pixel_values=torch.from_numpy(pixels))
        expected = (outputs.image_embeds * outputs.text_embeds).sum(1).numpy()
        found.append(scorer(images, PROMPTS))
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert np.std(found) > 0.05
    cut = scorer.cut(PROMPTS)
    assert (cut.prompts, cut.tokens) == (1, 12)
    assert cut.line() == (
        "1 of 3 prompts are longer than the 12 tokens that this HPSv2 reads; their ends are not scored"
    )


def test_the_sizes_of_the_published_hpsv2_are_open_clips_own():
    import open_clip

    from megatron_cca.lab.evaluation.hpsv2 import _model

    with torch.device("meta"):
        whole = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        found = _model(whole.state_dict(), 49408)
    assert {name: one.shape for name, one in found.state_dict().items()} == {
        name: one.shape for name, one in whole.state_dict().items()
    }
    for part in ("visual.transformer", "transformer"):
        ours, theirs = (model.get_submodule(part).resblocks for model in (found, whole))
        assert len(ours) == len(theirs)
        assert ours[0].attn.num_heads == theirs[0].attn.num_heads == 16
    assert (found.visual.image_size, found.context_length) == ((224, 224), 77)


def linear(weights, name, rows):
    return rows @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]


def norm(weights, name, rows, epsilon):
    return layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def attend(queries, keys, values):
    heads = [part.unflatten(-1, (2, 64)).transpose(0, 1) for part in (queries, keys, values)]
    shares = (heads[0] @ heads[1].transpose(1, 2) / 8).softmax(-1)
    return (shares @ heads[2]).transpose(0, 1).flatten(1)


def seen(weights, pixels):
    """The patches of one image behind the vision transformer."""
    names, rows = "blip.visual_encoder", []
    for top in range(0, tiny.SIDE, tiny.PATCH):
        for left in range(0, tiny.SIDE, tiny.PATCH):
            rows.append(pixels[:, top : top + tiny.PATCH, left : left + tiny.PATCH].flatten())
    rows = linear(weights, f"{names}.patch_embed.proj", torch.stack(rows))
    rows = torch.cat([weights[f"{names}.cls_token"][0], rows]) + weights[f"{names}.pos_embed"][0]
    for block in (f"{names}.blocks.{index}" for index in range(tiny.BLOCKS)):
        parts = linear(weights, f"{block}.attn.qkv", norm(weights, f"{block}.norm1", rows, 1e-6)).chunk(3, -1)
        rows = rows + linear(weights, f"{block}.attn.proj", attend(*parts))
        hidden = linear(weights, f"{block}.mlp.fc1", norm(weights, f"{block}.norm2", rows, 1e-6))
        rows = rows + linear(weights, f"{block}.mlp.fc2", gelu(hidden))
    return norm(weights, f"{names}.norm", rows, 1e-6)


def reward(weights, pixels, ids):
    """The reward of one image and the ids of one prompt without padding."""
    image, names = seen(weights, pixels), "blip.text_encoder"
    rows = weights[f"{names}.embeddings.word_embeddings.weight"][ids]
    rows = rows + weights[f"{names}.embeddings.position_embeddings.weight"][: len(ids)]
    rows = norm(weights, f"{names}.embeddings.LayerNorm", rows, 1e-12)
    for layer in (f"{names}.encoder.layer.{index}" for index in range(tiny.BLOCKS)):
        for part, source in (("attention", None), ("crossattention", image)):
            other = rows if source is None else source
            parts = (
                linear(weights, f"{layer}.{part}.self.query", rows),
                *(linear(weights, f"{layer}.{part}.self.{name}", other) for name in ("key", "value")),
            )
            mixed = linear(weights, f"{layer}.{part}.output.dense", attend(*parts))
            rows = norm(weights, f"{layer}.{part}.output.LayerNorm", rows + mixed, 1e-12)
        hidden = gelu(linear(weights, f"{layer}.intermediate.dense", rows))
        rows = norm(
            weights, f"{layer}.output.LayerNorm", rows + linear(weights, f"{layer}.output.dense", hidden), 1e-12
        )
    score = rows[0]
    for place in (0, 2, 4, 6, 7):
        score = linear(weights, f"mlp.layers.{place}", score)
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def cropped(image, side):
    """Shorter side to ``side`` by Pillow, and the centre of it."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((one - side) / 2) for one in size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def spelled(prompt):
    """The first 35 ids: each word's first letter alone, the others as its continuations; begin and end."""
    pieces = [f"##{letter}" if place else letter for word in prompt.split() for place, letter in enumerate(word)]
    return [2, *[tiny.WORDS.index(piece) for piece in pieces][:33], 3]


def test_image_reward_is_that_of_a_plain_computation(image_reward):
    file, weights = image_reward
    scorer, found = open_scorer(f"imagereward:{file}", "cpu"), []
    for images in IMAGES:
        # What Pillow's resizing does to one level, torch's may do to its neighbour.
        images = np.stack([cropped(image, tiny.SIDE) for image in images])
        pixels = torch.from_numpy((images / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2)
        expected = [reward(weights, *pair) for pair in zip(pixels, map(spelled, PROMPTS), strict=True)]
        found.append(scorer(images, PROMPTS))
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert np.std(found) > 0.05
    cut = scorer.cut(PROMPTS)
    assert (cut.prompts, cut.tokens) == (1, 35)


def test_image_reward_resizes_as_pillow_does(image_reward):
    scorer = open_scorer(f"imagereward:{image_reward[0]}", "cpu")
    for images in IMAGES:
        by_pillow = np.stack([cropped(image, tiny.SIDE) for image in images])
        ours, theirs = scorer(images, PROMPTS), scorer(by_pillow, PROMPTS)
        np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_a_scorer_leaves_the_random_numbers_of_the_sampler_alone(hpsv2, image_reward):
    before = torch.random.get_rng_state()
    open_scorer(f"hpsv2:{hpsv2[0]}", "cpu")
    open_scorer(f"imagereward:{image_reward[0]}", "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_models_file_is_refused_with_what_it_looks_like(hpsv2, image_reward, tmp_path):
    with pytest.raises(UserError, match=r"^--scorer: .*\.pt looks like an ImageReward, not like an HPSv2; give a copy"):
        check_scorer(f"hpsv2:{image_reward[0]}")
    with pytest.raises(UserError, match=r"looks like a CLIP in open_clip's form, not like an ImageReward; give a copy"):
        check_scorer(f"imagereward:{hpsv2[0]}")
    torch.save({"model": {"a": torch.zeros(1)}, "b.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"looks like another model, with 'b.weight', not like an HPSv2"):
        check_scorer(f"hpsv2:{tmp_path / 'other.pt'}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="looks like no model: no weights, not like an HPSv2"):
        check_scorer(f"hpsv2:{tmp_path / 'list.pt'}")
    tiny.hpsv2(tmp_path / "large.pt", width=64, head_width=64)
    with pytest.raises(UserError, match="an HPSv2 is a ViT-H-14 with heads of 80 and 64 numbers, found widths 64 and"):
        open_scorer(f"hpsv2:{tmp_path / 'large.pt'}", "cpu")
    with pytest.raises(UserError, match=r"the file .*none does not exist; give a copy of HPS_v2.1_compressed.pt"):
        check_scorer(f"hpsv2:{tmp_path / 'none'}")
    with pytest.raises(UserError, match=r"is none of clip:FOLDER, pickscore:FOLDER, hpsv2:FILE, imagereward:FILE and"):
        check_scorer("aesthetic:file")


def test_weights_that_are_missing_are_refused(hpsv2, image_reward, tmp_path):
    torch.save({name: value for name, value in hpsv2[1].items() if name != "visual.proj"}, tmp_path / "hpsv2.pt")
    with pytest.raises(UserError, match=r"hpsv2.pt holds no usable HPSv2 .*visual.proj"):
        open_scorer(f"hpsv2:{tmp_path / 'hpsv2.pt'}", "cpu")
    lacking = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    torch.save({name: value for name, value in image_reward[1].items() if name != lacking}, tmp_path / "reward.pt")
    with pytest.raises(UserError, match=r"^--scorer: .*vocab.txt is missing; put vocab.txt of google-bert/bert-base-"):
        check_scorer(f"imagereward:{tmp_path / 'reward.pt'}")
    (tmp_path / "vocab.txt").write_text("\n".join(tiny.WORDS))
    with pytest.raises(UserError, match=r"holds no usable ImageReward .*1.crossattention.self.key.bias"):
        open_scorer(f"imagereward:{tmp_path / 'reward.pt'}", "cpu")


def test_scores_that_are_no_numbers_are_refused(image_reward, tmp_path):
    broken = dict(image_reward[1]) | {"mlp.layers.7.bias": torch.tensor([float("nan")])}
    torch.save(broken, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(tiny.WORDS))
    scorer = open_scorer(f"imagereward:{tmp_path / 'ImageReward.pt'}", "cpu")
    with pytest.raises(UserError, match="ImageReward gives numbers that are not finite; its weights are damaged"):
        scorer(IMAGES[0], PROMPTS)


def test_studies_have_a_column_of_rewards(image_reward, tmp_path):
    from megatron_cca.generation.prompts import Prompt
    from megatron_cca.lab.studies.results import METRICS
    from megatron_cca.lab.studies.running import evaluated
    from megatron_cca.lab.studies.tasks import EvaluationInputs

    images = RANDOM.integers(256, size=(70, 8, 8, 3), dtype=np.uint8)
    prompts = [Prompt("zebra" if place % 2 else "one two", None) for place in range(70)]
    scorer = f"imagereward:{image_reward[0]}"
    (tmp_path / "own.py").write_text(NETWORK)
    np.savez(tmp_path / "real.npz", images[::-1])
    own = f"{tmp_path / 'own.py'}:network"
    inputs = EvaluationInputs("digits", str(tmp_path / "real.npz"), own, None, None, scorer, ("fid",), 1)
    found = evaluated(inputs, images, prompts)
    expected = open_scorer(scorer, "cpu")(images, [one.text for one in prompts])
    assert found["reward"] == pytest.approx(expected.mean(), abs=1e-4)
    assert found.keys() == {"fid", "reward"} <= METRICS.keys()


def test_a_wrong_vocabulary_is_refused(image_reward, tmp_path):
    file = tmp_path / "ImageReward.pt"
    file.symlink_to(image_reward[0])
    for text, said in (
        ("a\nb\n", r"vocab.txt lacks \[PAD\]"),
        ("\n".join([*tiny.WORDS, *"ABCD"]), "the model only 58"),
    ):
        (tmp_path / "vocab.txt").write_text(text)
        with pytest.raises(UserError, match=rf"holds no usable ImageReward .*{said}"):
            open_scorer(f"imagereward:{file}", "cpu")


class Stroke:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_pickle_of_more_than_tensors_does_nothing(write, tmp_path):
    file, victim = tmp_path / "HPS.pt", tmp_path / "victim"
    write({"state_dict": {"visual.class_embedding": torch.zeros(2), "more": Stroke(victim)}}, file)
    with pytest.raises(UserError, match=r"^--scorer: .*HPS.pt is not read \("):
        check_scorer(f"hpsv2:{file}")
    assert not victim.exists()


def test_safetensors_are_read_too(hpsv2, tmp_path):
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in hpsv2[1].items()}, tmp_path / "hpsv2.safetensors")
    found = read_weights("hpsv2", tmp_path / "hpsv2.safetensors", "--scorer")
    assert found.keys() == hpsv2[1].keys()
    assert all(torch.equal(value, hpsv2[1][name]) for name, value in found.items())
