"""Inception, CLIP and the user's own networks against the same networks run otherwise; nothing is downloaded."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3
from transformers import CLIPModel, CLIPProcessor

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation import FidelitySettings
from megatron_cca.lab.evaluation.clip import ClipScorer
from megatron_cca.lab.evaluation.extractors import INCEPTION_URL, PUBLISHED_SHA256, WIDTHS, open_extractor, widths
from megatron_cca.lab.evaluation.fidelity import ReferenceImages, fidelity
from tests.references import tiny_clip

PHRASES = ["a seven", "the digit one", "", "z", "a scan of a four which goes on and on and on for longer than it may"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random Inception whose activations neither vanish nor grow."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        state = Unloaded("random", ["2048"]).state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor *= 6**0.5
        elif name.endswith("bn.bias"):
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), dtype=np.uint8)


def test_inceptions_parts_are_those_of_torch_fidelitys_extractor(weights, pictures):
    layers = ["2048", "logits_unbiased"]
    plain = FeatureExtractorInceptionV3("plain", layers, feature_extractor_weights_path=weights)
    before = []
    plain.Mixed_6c.register_forward_hook(lambda module, inputs, output: before.append(output))
    features, logits = plain(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    block, norm = plain.Mixed_6d.branch1x1.conv, plain.Mixed_6d.branch1x1.bn
    maps = functional.conv2d(before[0], block.weight)
    maps = functional.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
    # TensorFlow's order: the mean and covariance in OpenAI's reference batches have it.
    spatial = np.moveaxis(np.maximum(maps.numpy(), 0), 1, 3)[..., :7].reshape(3, -1)
    extractor = open_extractor("inception", weights)
    found = ReferenceImages(pictures, extractor).parts({"features", "logits", "spatial"}, batch_size=2)
    assert spatial.shape == (3, 2023)
    assert spatial.std() > 0.05
    assert features.std() > 1e-3
    np.testing.assert_allclose(found["features"], features, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["spatial"], spatial, rtol=1e-4, atol=1e-5)
    assert widths(extractor, pictures) == WIDTHS["inception"]
    assert extractor.origin["weights"] == str(weights)
    assert len(extractor.origin["sha256"]) == 64


def test_the_published_weights_are_named_as_torch_fidelity_names_them():
    assert INCEPTION_URL == feature_extractor_inceptionv3.URL_INCEPTION_V3
    assert INCEPTION_URL.endswith(f"-{PUBLISHED_SHA256}.pth")


@pytest.mark.parametrize("named", [False, True])
def test_missing_inception_weights_are_refused_with_where_to_get_them(tmp_path, named):
    path = tmp_path / "none.pth"
    beginning = f"--inception-weights: the file {path} does not exist" if named else "--extractor: inception needs"
    with pytest.raises(UserError) as error:
        open_extractor("inception", path if named else None)
    assert str(error.value).startswith(beginning)
    assert str(error.value).endswith(f"; download {INCEPTION_URL} and name the file with --inception-weights FILE")


class Boom:
    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


@pytest.mark.parametrize("damage", ["text", "cut", "other", "code", "empty"])
def test_damaged_inception_weights_are_refused(tmp_path, weights, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if damage == "text":
        path.write_text("not found")
    elif damage == "cut":
        path.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "empty":
        path.touch()
    else:
        torch.save({"fc.weight": torch.zeros(3)} if damage == "other" else {"fc.weight": Boom()}, path)
    with pytest.raises(UserError) as error:
        open_extractor("inception", path)
    assert str(error.value).startswith(f"--inception-weights: {path} is damaged or holds other weights (")
    assert INCEPTION_URL in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("boom").exists()


def test_the_digits_network_gives_what_is_known_of_it_and_knows_its_images():
    train, held_out = load_scans()
    extractor = open_extractor("digits")
    assert widths(extractor, train.images) == WIDTHS["digits"]
    maps = extractor.network.trunk[:4](torch.from_numpy(held_out.images[:5, None]) / 255)
    found = ReferenceImages(held_out.images[:5], extractor).parts({"spatial"})["spatial"]
    assert torch.equal(found.reshape(5, 4, 8, 8), maps[:, :4])
    assert found.std() > 0.01
    assert open_extractor("digits").network is extractor.network
    settings = FidelitySettings(("fid", "sfid", "precision", "recall"))
    assert fidelity(held_out.images, train.images, extractor, settings)["fid"] < 10
    with pytest.raises(UserError, match="take images of 8 x 8 pixels, found 16 x 16"):
        fidelity(np.zeros((80, 16, 16), np.uint8), train.images, extractor)


OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Dropout(0.5)
    def forward(self, images):
        pixels = self.layer(images.flatten(1).float())
        return pixels[:, :4], pixels[:, 4:6]
def network():
    return Net()
def nothing():
    return None
"""


def test_an_own_extractor_is_a_function_in_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    images = load_scans()[0].images[:50]
    found = ReferenceImages(images, open_extractor(f"{file}:network")).parts({"features", "logits"})
    assert torch.equal(found["features"], torch.from_numpy(images).flatten(1)[:, :4].float())
    with pytest.raises(UserError, match=r"own.py:nothing must return a torch module, found NoneType"):
        open_extractor(f"{file}:nothing")
    with pytest.raises(UserError, match=r"--extractor: .*own.py:network failed at line \d+: "):
        open_extractor(f"{file}:network")(None)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        (
            "vgg16",
            None,
            "--extractor: 'vgg16' is none of digits, inception, dinov2:FOLDER, clip:FOLDER, "
            "FILE.py:FUNCTION and FILE.judge",
        ),
        (
            "digits",
            Path("w.pth"),
            "--inception-weights: only --extractor inception reads them, found --extractor digits",
        ),
        ("none.py:f", None, "--extractor: the file none.py does not exist"),
    ],
)
def test_unknown_extractors_are_refused(name, weights, message):
    with pytest.raises(UserError) as error:
        open_extractor(name, weights)
    assert str(error.value) == message


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


def test_clip_scores_equal_the_cosine_computed_one_by_one(clip, pictures):
    images = np.concatenate([pictures, pictures[:2] // 3])
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for image, phrase in zip(images, PHRASES, strict=True):
        pixels = processor.image_processor(image, return_tensors="pt", input_data_format="channels_last")
        text = processor.tokenizer(phrase, return_tensors="pt", truncation=True, max_length=20)
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(**pixels).pooler_output)[0].double().numpy()
            b = model.text_projection(model.text_model(**text).pooler_output)[0].double().numpy()
        cosines.append(a @ b / np.sqrt(a @ a * (b @ b)))
    progress = []
    scores = ClipScorer(clip, batch_size=2).scores(images, PHRASES, progress.append)
    assert scores.dtype == np.float32
    assert min(cosines) < 0 < max(cosines)
    np.testing.assert_allclose(scores, 100 * np.maximum(cosines, 0), atol=1e-4)
    assert progress == [2, 2, 1]


def test_a_folder_without_clip_is_refused(tmp_path, clip):
    with pytest.raises(UserError, match=r"^--clip: .*none has no config.json; give the folder of a CLIP"):
        ClipScorer(tmp_path / "none")
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(UserError, match=rf"^--clip: {tmp_path} holds no usable CLIP \(") as error:
        ClipScorer(tmp_path)
    assert "\n" not in str(error.value)
