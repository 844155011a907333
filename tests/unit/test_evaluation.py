"""Networks that know digits; pictures that open."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.classifiers import DigitSvm, class_accuracy, open_classifier
from megatron_cca.lab.evaluation.extractors import standard_digit_cnn, train_digit_cnn
from megatron_cca.lab.evaluation.image_sets import read_images
from megatron_cca.lab.evaluation.plots import SampleColumn, sample_sheet, training_curves


@pytest.fixture(scope="module")
def scans():
    return load_scans()


def test_the_networks_know_digits_they_have_not_seen_and_leave_the_random_state_alone(scans):
    train, held_out = scans
    state = torch.get_rng_state()
    svm, cnn = DigitSvm(train.images, train.labels), standard_digit_cnn()
    assert torch.equal(state, torch.get_rng_state())
    assert svm.accuracy(held_out.images, held_out.labels) > 0.98
    guesses = cnn(torch.from_numpy(held_out.images)[:, None])[1].argmax(1).numpy()
    assert (guesses == held_out.labels).mean() > 0.96
    wrong = (held_out.labels + 1) % 10
    assert svm.accuracy(held_out.images, wrong) < 0.05


def test_the_digits_classifier_knows_held_out_scans():
    held_out = read_images("digits-held-out")
    assert class_accuracy(held_out.images, held_out.labels, open_classifier("digits")).overall > 0.98
    with pytest.raises(UserError, match="take images of 8 x 8 pixels, found 9 x 8"):
        open_classifier("digits")(np.zeros((1, 9, 8, 3), np.uint8))


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


@pytest.mark.full
def test_the_network_is_a_function_of_their_seed(scans):
    train = scans[0]
    few = train.images[:200], train.labels[:200]
    first, again, other = (train_digit_cnn(*few, seed=seed) for seed in (0, 0, 1))
    images = torch.from_numpy(train.images[:5])[:, None]
    assert torch.equal(first(images)[1], again(images)[1])
    assert not torch.equal(first(images)[1], other(images)[1])
