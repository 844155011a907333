"""A judge is trained once on real images, kept, and says class and features; its file is read without pickle."""

import time

import numpy as np
import pytest
import torch

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation import EvaluateOptions
from megatron_cca.lab.evaluation.checks import check
from megatron_cca.lab.evaluation.classifiers import open_classifier
from megatron_cca.lab.evaluation.extractors import open_extractor, widths
from megatron_cca.lab.evaluation.image_sets import read_images
from megatron_cca.lab.evaluation.judges import ensure_judge, open_judge
from megatron_cca.lab.evaluation.measuring import evaluate
from tests.references.bomb import Bomb
from tests.references.idx_files import clothes, write_idx
from tests.references.sources import write

IMAGES, LABELS = clothes(600, 9, 7)
COLOURED = np.repeat(IMAGES[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "clothes.judge"
    ensure_judge(path, COLOURED, LABELS.astype(np.int64))
    return path


def test_it_finds_the_classes_of_other_images(kept):
    images, labels = clothes(90, 9, 7, seed=1)
    judge = open_judge(kept)
    assert judge.accuracy > 0.95
    found = open_classifier(str(kept))(np.repeat(images[..., None], 3, axis=3))
    assert found.dtype == np.int64
    assert (found == labels).mean() > 0.95
    extractor = open_extractor(str(kept))
    assert widths(extractor, COLOURED) == {"features": 64, "logits": 3, "spatial": 256}
    assert extractor.origin["accuracy"] == f"{judge.accuracy:.4f}"
    with pytest.raises(UserError, match="the judge takes images of 9 x 7 pixels, found 7 x 9"):
        judge.classify(COLOURED.swapaxes(1, 2))


def test_it_is_not_trained_again(kept, capsys):
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    time.sleep(0.01)
    ensure_judge(kept, COLOURED, None)
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
    assert capsys.readouterr().out == ""


def test_an_evaluation_trains_and_uses_it(tmp_path, capsys):
    real = write_idx(tmp_path / "real", IMAGES, LABELS, packed=True)
    fine, blank = tmp_path / "fine.npz", tmp_path / "blank.npz"
    np.savez(fine, arr_0=COLOURED[:300], arr_1=LABELS[:300].astype(np.int64))
    np.savez(blank, arr_0=np.full_like(COLOURED[:300], 40), arr_1=LABELS[:300].astype(np.int64))
    given = EvaluateOptions(
        samples=(f"fine={fine}", f"blank={blank}"),
        reference=str(real),
        output=tmp_path / "out",
        judge=tmp_path / "own.judge",
        metrics=("fid", "inception_score"),
    )
    check(given)
    good, bad = evaluate(given, torch.device("cpu")).sets
    assert f"trained {tmp_path / 'own.judge'}: accuracy " in capsys.readouterr().out
    assert good.accuracy.overall > 0.95
    assert bad.accuracy.overall < 0.5
    assert good.metrics["fid"] < bad.metrics["fid"]


def test_idx_files_are_a_set_of_images(tmp_path):
    write_idx(tmp_path, IMAGES[:5], LABELS[:5])
    write_idx(tmp_path, IMAGES[5:8], LABELS[5:8], "t10k")
    found = read_images(tmp_path)
    assert np.array_equal(found.images, COLOURED[:5])
    assert found.labels.tolist() == LABELS[:5].tolist()
    assert np.array_equal(read_images(tmp_path / "t10k-images-idx3-ubyte").images, COLOURED[5:8])


@pytest.mark.parametrize("model", ["llamagen-tiny", "emu3-tiny"])
def test_shards_are_a_set_of_images_as_their_tokenizer_shows_them(model, tmp_path):
    pytest.importorskip("sklearn")
    images, labels = clothes(12, 8, 8)
    write_idx(tmp_path / "idx", images, labels)
    given = {"model": model, "fit_codebook": 8, "patch": 4, "resize": "authors"}
    tokenize(TokenizeSettings(source=tmp_path / "idx", output=tmp_path / "shards", **given), 0, 1, torch.device("cpu"))
    found, codebook = read_images(tmp_path / "shards"), PatchCodebook.load(tmp_path / "shards")
    shown = codebook.decode(codebook.encode(images))
    assert np.array_equal(found.images, np.repeat(shown[..., None], 3, axis=3))
    assert found.labels is None if model == "emu3-tiny" else found.labels.tolist() == labels.tolist()
    (tmp_path / "shards/codes.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"codes\.bin"):
        read_images(tmp_path / "shards")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "--judge: the reference has no labels to train on"),
        (
            LABELS[:99].astype(np.int64),
            "--judge: needs 100 images or more, with labels of 0 to 65535; the reference has 99",
        ),
        (LABELS.astype(np.int64) - 1, "with labels of -1 to 1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(labels, message, tmp_path):
    with pytest.raises(UserError) as error:
        ensure_judge(tmp_path / "a.judge", COLOURED[: 600 if labels is None else len(labels)], labels)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_named(kept, tmp_path):
    witness = tmp_path / "witness"
    torch.save({"height": Bomb(witness)}, tmp_path / "bomb.judge")
    torch.save({"height": 1 << 40, "width": 7, "classes": 3, "accuracy": 1.0}, tmp_path / "large.judge")
    torch.save({"height": 9, "width": 7, "classes": 4, "accuracy": 1.0, "weights": {}}, tmp_path / "empty.judge")
    write(tmp_path, "cut.judge", kept.read_bytes()[:1000])
    for name in ("bomb", "large", "empty", "cut"):
        with pytest.raises(UserError, match=rf"^--extractor: .*{name}\.judge is damaged or no judge \("):
            open_extractor(str(tmp_path / f"{name}.judge"))
    assert not witness.exists()
    with pytest.raises(UserError, match=r"missing\.judge does not exist; megatron-cca evaluate --judge"):
        open_classifier(str(tmp_path / "missing.judge"))
    with pytest.raises(UserError, match=r"--judge: a\.pt must end with \.judge"):
        EvaluateOptions(samples=("a",), reference="b", output=tmp_path, judge=tmp_path.relative_to(tmp_path) / "a.pt")
