"""FID and IS against their definitions in NumPy and SciPy; judges that know digits; pictures that open."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError
from megatron_cca.evaluation.digit_judges import DigitJudges
from megatron_cca.evaluation.fidelity import fidelity
from megatron_cca.evaluation.plots import SampleColumn, sample_sheet, training_curves


class Linear(torch.nn.Module):
    """Features and logits by fixed random projections of the pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(64, 12, generator=generator)
        self.classes = torch.randn(64, 5, generator=generator)

    def forward(self, images):
        pixels = images[:, 0].flatten(1).float() / 255
        return pixels @ self.features, pixels @ self.classes


@pytest.fixture(scope="module")
def scans():
    return load_scans()


def features(images):
    return [part.double().numpy() for part in Linear()(torch.from_numpy(images)[:, None])]


def test_fid_and_inception_score_equal_their_definitions(scans):
    train, held_out = scans
    samples, reference = held_out.images, train.images[:500]
    (a, logits), (b, _) = features(samples), features(reference)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    inception = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    found = fidelity(samples, reference, Linear())
    assert found["fid"] == pytest.approx(fid, rel=1e-4)
    assert found["inception_score"] == pytest.approx(inception, rel=1e-4)


def test_the_same_images_have_fid_zero(scans):
    assert fidelity(scans[0].images, scans[0].images, Linear())["fid"] == pytest.approx(0, abs=1e-6)


def test_colour_images_are_taken_as_they_are(scans):
    grey = scans[0].images[:100]
    colour = np.repeat(grey[:, None], 3, axis=1)
    assert fidelity(colour, grey, Linear())["fid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((12, 8, 8), np.uint8), "samples: 12 images are too few for FID on 12 features; give more than 12"),
        (np.zeros((50, 8, 8), np.float32), "samples: expected uint8"),
        (np.zeros((50, 1, 8, 8), np.uint8), "samples: expected uint8"),
        (np.zeros((0, 8, 8), np.uint8), "samples: 0 images are too few"),
    ],
)
def test_unsuitable_images_are_refused(images, message, scans):
    with pytest.raises(UserError) as error:
        fidelity(images, scans[0].images, Linear())
    assert str(error.value).startswith(message)


def test_the_judges_know_digits_they_have_not_seen_and_leave_the_random_state_alone(scans):
    train, held_out = scans
    state = torch.get_rng_state()
    judges = DigitJudges.train(train.images, train.labels)
    assert torch.equal(state, torch.get_rng_state())
    assert judges.accuracy(held_out.images, held_out.labels) > 0.98
    guesses = judges.cnn(torch.from_numpy(held_out.images)[:, None])[1].argmax(1).numpy()
    assert (guesses == held_out.labels).mean() > 0.96
    wrong = (held_out.labels + 1) % 10
    assert judges.accuracy(held_out.images, wrong) < 0.05


def test_pictures_are_written_whole(scans, tmp_path):
    train = scans[0]
    blocks = np.stack([train.images[train.labels == digit][:4] for digit in range(10)])
    columns = [SampleColumn(f"model {index}", "1 forward a token", blocks) for index in range(3)]
    sample_sheet(tmp_path / "samples.png", columns, [str(digit) for digit in range(10)])
    names = ("positive_log_ratio", "negative_log_ratio", "margin", "loss")
    training_curves(tmp_path / "training.png", [{"step": step, **dict.fromkeys(names, 0.1)} for step in range(3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.png", "training.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 5


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).copy()


def test_pictures_show_their_images_and_every_curve(scans, tmp_path):
    sheets, curves = [], []
    for digit in (0, 1):
        blocks = np.stack([scans[0].images[scans[0].labels == digit][:4]])
        sample_sheet(tmp_path / "samples.png", [SampleColumn("model", "how", blocks)], ["row"])
        sheets.append(pixels(tmp_path / "samples.png"))
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0] != sheets[1]).any()
    names = ("positive_log_ratio", "negative_log_ratio", "margin", "loss")
    for changed in (None, *names):
        rows = [{"step": step, **{name: step**2 if name == changed else step for name in names}} for step in range(4)]
        training_curves(tmp_path / "training.png", rows)
        curves.append(pixels(tmp_path / "training.png"))
    assert all(curve.shape != curves[0].shape or (curve != curves[0]).any() for curve in curves[1:])


def test_the_judges_are_a_function_of_their_seed(scans):
    train = scans[0]
    few = train.images[:200], train.labels[:200]
    first, again, other = (DigitJudges.train(*few, seed=seed) for seed in (0, 0, 1))
    images = torch.from_numpy(train.images[:5])[:, None]
    assert torch.equal(first.cnn(images)[1], again.cnn(images)[1])
    assert not torch.equal(first.cnn(images)[1], other.cnn(images)[1])
