"""The metrics against their definitions in NumPy and SciPy, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation import METRICS, FidelitySettings
from megatron_cca.lab.evaluation.fidelity import ReferenceImages, fidelity

EXACT = {"rel": 1e-6, "abs": 1e-6}


class Linear(torch.nn.Module):
    """Features, logits and spatial features by fixed random projections of the pixels; counts the images it sees."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projections = [torch.randn(64, width, generator=generator) for width in (12, 5, 20)]
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        pixels = images[:, 0].flatten(1).float() / 255
        return tuple(pixels @ projection for projection in self.projections)


@pytest.fixture(scope="module")
def scans():
    return load_scans()


def parts(images):
    """Features, logits and spatial features, float64."""
    return [part.double().numpy() for part in Linear()(torch.from_numpy(images)[:, None])]


def frechet(a, b):
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))


def inception_score(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def cubic_mmd(a, b):
    """The unbiased estimator of arXiv 1801.01401, equation 4, term by term."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def others(values):
        return (values.sum() - np.trace(values)) / (len(values) * (len(values) - 1))

    return others(kernel(a, a)) + others(kernel(b, b)) - 2 * kernel(a, b).mean()


def inside(points, manifold, k):
    """The share of points within the k-th nearest neighbour's distance of any point of the manifold."""
    radii = np.sort(cdist(manifold, manifold), axis=1)[:, k]
    return (cdist(points, manifold) <= radii).any(1).mean()


@pytest.fixture(scope="module")
def pair(scans):
    return scans[1].images[:300], scans[0].images[:400]


def test_fid_sfid_and_inception_score_equal_their_definitions(pair):
    (a, logits, spatial_a), (b, _, spatial_b) = map(parts, pair)
    found = fidelity(*pair, Linear(), FidelitySettings(("fid", "sfid", "inception_score")))
    assert found["fid"] == pytest.approx(frechet(a, b), **EXACT)
    assert found["sfid"] == pytest.approx(frechet(spatial_a, spatial_b), **EXACT)
    assert found["inception_score"] == pytest.approx(inception_score(logits), **EXACT)
    assert list(found) == ["fid", "sfid", "inception_score"]


def test_inception_score_in_splits_is_the_mean_over_shuffled_parts(pair):
    logits = parts(pair[0])[1][np.random.RandomState(2020).permutation(300)]
    scores = [inception_score(part) for part in np.split(logits, 3)]
    found = fidelity(*pair, Linear(), FidelitySettings(("inception_score",), inception_score_splits=3))
    assert found["inception_score"] == pytest.approx(np.mean(scores), **EXACT)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), **EXACT)


def test_kid_of_whole_sets_is_the_unbiased_estimator(pair):
    samples, reference = pair[0], pair[1][:300]
    settings = FidelitySettings(("kid",), kid_subsets=2, kid_subset_size=300)
    found = fidelity(samples, reference, Linear(), settings)
    assert found["kid"] == pytest.approx(cubic_mmd(parts(samples)[0], parts(reference)[0]), **EXACT)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)


def test_kid_of_subsets_is_their_mean_and_spread(pair):
    (a, *_), (b, *_) = map(parts, pair)
    random = np.random.RandomState(2020)
    values = [cubic_mmd(*(part[random.choice(len(part), 50, replace=False)] for part in (a, b))) for _ in range(7)]
    found = fidelity(*pair, Linear(), FidelitySettings(("kid",), kid_subsets=7, kid_subset_size=50))
    assert found == {"kid": pytest.approx(np.mean(values), **EXACT), "kid_std": pytest.approx(np.std(values), **EXACT)}


@pytest.mark.parametrize("k", [1, 3, 7])
def test_precision_and_recall_equal_their_definitions(pair, k):
    samples, reference = (pair[0] * 0.8).astype(np.uint8), pair[1]
    a, b = parts(samples)[0], parts(reference)[0]
    found = fidelity(samples, reference, Linear(), FidelitySettings(("precision", "recall"), neighborhood=k))
    assert found == {
        "precision": pytest.approx(inside(a, b, k), **EXACT),
        "recall": pytest.approx(inside(b, a, k), **EXACT),
    }
    assert 0 < found["recall"] != found["precision"] < 1


def test_the_same_images_are_as_good_as_the_reference(scans):
    images = scans[0].images
    found = fidelity(images, images, Linear(), FidelitySettings(("fid", "sfid", "precision", "recall")))
    assert found == {"fid": pytest.approx(0, abs=1e-6), "sfid": pytest.approx(0, abs=1e-6), "precision": 1, "recall": 1}


def test_colour_images_are_taken_as_they_are(scans):
    grey = scans[0].images[:100]
    colour = np.repeat(grey[..., None], 3, axis=3)
    assert fidelity(colour, grey, Linear())["fid"] == pytest.approx(0, abs=1e-6)
    channels = []
    fidelity(np.stack([grey, grey // 2, grey // 3], 3), grey, Watching(channels))
    red, green, blue = channels[1][0]
    assert torch.equal(red, torch.from_numpy(grey[0]))
    assert torch.equal(green, torch.from_numpy(grey[0] // 2))
    assert torch.equal(blue, torch.from_numpy(grey[0] // 3))


class Watching(Linear):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def forward(self, images):
        self.batches.append(images)
        return super().forward(images)


def test_every_image_is_extracted_once_and_the_reference_once_for_many_sets(pair):
    extractor, progress = Linear(), []
    settings = FidelitySettings(METRICS, kid_subset_size=100)
    alone = fidelity(*pair, Linear(), settings)
    reference = ReferenceImages(pair[1], extractor)
    first = fidelity(pair[0], reference, extractor, settings, progress.append)
    assert extractor.seen == 700 + 1  # one to see how wide its answers are
    assert sum(progress) == 700
    again = fidelity(pair[0], reference, extractor, settings, progress.append)
    assert extractor.seen == 701 + 300 + 1
    assert sum(progress) == 1000
    assert first == again == alone
    assert list(first) == ["fid", "inception_score", "kid", "kid_std", "precision", "recall", "sfid"]


def test_batches_do_not_show_in_the_numbers(pair):
    one, other = (
        fidelity(*pair, Linear(), FidelitySettings(METRICS, kid_subset_size=100, batch_size=size)) for size in (7, 300)
    )
    assert one == pytest.approx(other, **EXACT)


def test_given_moments_take_the_place_of_the_references_images(pair):
    b, _, spatial = parts(pair[1])
    moments = {"features": (b.mean(0), np.cov(b, rowvar=False)), "spatial": (spatial.mean(0), np.cov(spatial.T))}
    extractor = Linear()
    few = ReferenceImages(pair[1][:5], extractor, moments)
    found = fidelity(pair[0], few, extractor, FidelitySettings(("fid", "sfid")))
    assert found == pytest.approx(fidelity(*pair, Linear(), FidelitySettings(("fid", "sfid"))), **EXACT)
    wrong = ReferenceImages(pair[1], extractor, {"features": (b.mean(0)[:5], np.eye(5))})
    with pytest.raises(UserError, match="its mean of features has 5 numbers, the extractor's features have 12"):
        fidelity(pair[0], wrong, extractor)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((12, 8, 8), np.uint8), "samples: 12 images are too few for FID on 12 features; it wants 13 or more"),
        (np.zeros((50, 8, 8), np.float32), "samples: expected uint8"),
        (np.zeros((50, 3, 8, 8), np.uint8), "samples: expected uint8"),
        (np.zeros((0, 8, 8), np.uint8), "samples: 0 images are too few"),
    ],
)
def test_unsuitable_images_are_refused(images, message, scans):
    with pytest.raises(UserError) as error:
        fidelity(images, scans[0].images, Linear())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ((20, 50), {"metrics": ("sfid",)}, "samples: 20 images are too few for sFID on 20 features; it wants 21 or"),
        ((50, 12), {"metrics": ("fid",)}, "reference: 12 images are too few for FID on 12 features; it wants 13 or"),
        (
            (50, 49),
            {"metrics": ("kid",), "kid_subset_size": 50},
            "reference: 49 images are too few for KID with kid_subset_size 50; it wants 50 or more",
        ),
        ((3, 9), {"metrics": ("precision",)}, "samples: 3 images are too few for precision with neighborhood 3; it"),
        (
            (9, 3),
            {"metrics": ("recall",)},
            "reference: 3 images are too few for recall with neighborhood 3; it wants 4",
        ),
        (
            (19, 1),
            {"metrics": ("inception_score",), "inception_score_splits": 10},
            "samples: 19 images are too few for Inception Score in 10 splits; it wants 20 or more",
        ),
        ((9, 9), {"metrics": ("fid", "lpips")}, "metrics: 'lpips' is unknown; known: fid, inception_score, kid,"),
        ((9, 9), {"neighborhood": 0}, "--neighborhood: must be 1 or more, found 0"),
        ((9, 9), {"kid_subset_size": 1}, "--kid-subset-size: must be 2 or more, found 1"),
    ],
)
def test_too_few_images_and_bad_numbers_are_refused(scans, counts, settings, message):
    with pytest.raises(UserError) as error:
        fidelity(*(scans[0].images[:count] for count in counts), Linear(), FidelitySettings(**settings))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_just_enough_images_are_enough(scans):
    settings = FidelitySettings(METRICS, kid_subset_size=21, inception_score_splits=10)
    assert np.isfinite([*fidelity(scans[0].images[:21], scans[1].images[:21], Linear(), settings).values()]).all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.float(), "extractor: must give features"),
        (lambda x: (x[:1, 0, 0].float(), x[:, 0, 0].float()), "extractor: must give features"),
        (lambda x: {"feature": x.flatten(1).float()}, "extractor: must give features"),
        (lambda x: {"features": x.flatten(1)[:, :5].float()}, "extractor: gives no logits, on which Inception Score"),
        (lambda x: (x[:, 0, 0] / 0 * 0, x[:, 0, 0].float()), "samples: the extractor's features of images 0 to 49"),
    ],
)
def test_an_extractor_that_gives_something_else_is_refused(scans, answer, message):
    class Odd(torch.nn.Module):
        def forward(self, images):
            return answer(images)

    with pytest.raises(UserError) as error:
        fidelity(scans[0].images[:50], scans[0].images[:50], Odd())
    assert str(error.value).startswith(message)
