"""MNIST's IDX files: packed or not, of one split or several, with names of classes, and damaged in every way."""

import gzip
import io
from functools import partial

import numpy as np
import pytest
from PIL import Image

from megatron_cca.data.sources import SourceOptions, idx, open_source
from tests.references.idx_files import clothes, write_idx
from tests.references.idx_files import idx as packed_array
from tests.references.sources import LFS, notices, refused, write

# Without the time, which would be in the names of the tests.
gzipped = partial(gzip.compress, mtime=0)

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def pixels(record):
    image = Image.open(io.BytesIO(record.frames[0]))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


@pytest.mark.parametrize("packed", [True, False])
def test_images_and_labels_of_a_split(packed, tmp_path):
    images, labels = clothes(7, 5, 6)
    source = open_source(write_idx(tmp_path, images, labels, packed=packed))
    assert (len(source), source.num_classes, source.notices()) == (7, 3, [])
    for place, record in enumerate(source):
        assert np.array_equal(pixels(record), images[place])
        name = str(labels[place])
        assert (record.name, record.label) == (f"train:{place}", labels[place])
        assert (record.caption, record.condition) == (name, name)
    assert np.array_equal(pixels(source[-1]), images[6])


def test_torchvision_reads_the_same(tmp_path):
    mnist = pytest.importorskip("torchvision.datasets.mnist")
    images, labels = clothes(4)
    source = open_source(write_idx(tmp_path, images, labels))
    theirs = (
        mnist.read_image_file(str(tmp_path / IMAGES)).numpy(),
        mnist.read_label_file(str(tmp_path / LABELS)).numpy(),
    )
    assert all(np.array_equal(pixels(record), image) for record, image in zip(source, theirs[0], strict=True))
    assert [record.label for record in source] == theirs[1].tolist()


def test_a_split_is_chosen(tmp_path):
    images, labels = clothes(6)
    write_idx(tmp_path, images, labels)
    write_idx(tmp_path, images[:3], labels[:3], "t10k", packed=True)
    assert notices(tmp_path) == ["split train is read; others there: t10k"]
    for split in ("test", "t10k"):
        source = open_source(tmp_path, "auto", SourceOptions(split=split))
        assert (len(source), source[0].name) == (3, "t10k:0")
    message = "layout idx: split: valid is none of those that are there; choose one: t10k, train"
    assert refused(tmp_path, split="valid") == message


def test_emnist_has_several_sets_whose_images_lie_on_their_side(tmp_path):
    images, labels = clothes(4, 5, 6)
    write_idx(tmp_path, images, labels + 1, "emnist-letters-train")
    source = open_source(tmp_path)
    assert source.num_classes == 4
    assert np.array_equal(pixels(source[1]), images[1].T)
    write_idx(tmp_path, images, labels, "emnist-digits-train")
    assert "train could be several; choose one: emnist-digits-train, emnist-letters-train" in refused(tmp_path)
    assert open_source(tmp_path, "idx", SourceOptions(split="emnist-digits-train")).num_classes == 3


def test_an_unpacked_file_counts_before_a_packed_one(tmp_path):
    images, labels = clothes(4)
    write_idx(tmp_path, images, labels)
    write(tmp_path, f"{IMAGES}.gz", gzipped(packed_array(255 - images)))
    assert np.array_equal(pixels(open_source(tmp_path)[2]), images[2])


def test_fashion_mnist_is_known_by_its_labels(tmp_path, monkeypatch):
    images, labels = clothes(4)
    write_idx(tmp_path, images, labels)
    digest = idx.hashlib.sha256((tmp_path / LABELS).read_bytes()).hexdigest()
    monkeypatch.setattr(idx, "_FASHION", {digest})
    assert [record.caption for record in open_source(tmp_path)] == ["T-shirt/top", "Trouser", "Pullover", "T-shirt/top"]


def test_names_of_classes(tmp_path):
    images, labels = clothes(4)
    before = open_source(write_idx(tmp_path, images, labels)).fingerprint()
    write(tmp_path, "classes.json", '{"0": "bag", "2": "coat "}')
    source = open_source(tmp_path)
    assert [record.caption for record in source] == ["bag", "1", "coat", "bag"]
    assert notices(tmp_path) == ["1 classes have no name in classes.json and keep their number (1)"]
    assert source.fingerprint() != before
    write(tmp_path, "classes.json", '{"7": "bag"}')
    assert "classes.json names '7', which is no label here" in refused(tmp_path)
    write(tmp_path, "classes.json", "[")
    assert "classes.json is not valid JSON; correct classes.json or remove it" in refused(tmp_path)


def test_a_fingerprint_changes_with_pixels_and_labels(tmp_path):
    images, labels = clothes(6)
    found = {open_source(write_idx(tmp_path, images, labels)).fingerprint()}
    found.add(open_source(write_idx(tmp_path, images, labels, packed=True)).fingerprint())
    assert len(found) == 1
    for folder, one, other in (("a", 255 - images, labels), ("b", images, labels[::-1])):
        found.add(open_source(write_idx(tmp_path / folder, one, other)).fingerprint())
    assert len(found) == 3


WHOLE = packed_array(clothes(6)[0])
FALSE_CHECKSUM = gzipped(WHOLE)[:-8] + bytes(8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, WHOLE[:-1], "holds 383 bytes, its header says 384"),
        (IMAGES, WHOLE + b"x", "holds 385 bytes, its header says 384"),
        (IMAGES, WHOLE[:9], "is cut short"),
        (IMAGES, b"", "is cut short"),
        (IMAGES, packed_array(clothes(6)[0], 12), "does not begin as an IDX file of bytes with 3 axes does"),
        (IMAGES, packed_array(clothes(6)[1]), "is cut short"),
        (
            IMAGES,
            WHOLE[:4] + b"\xff" * 12 + WHOLE[16:],
            "holds 384 bytes, its header says 79228162458924105385300197375",
        ),
        (IMAGES, packed_array(np.empty((6, 0, 8))), "is empty: 6 x 0 x 8"),
        (IMAGES, LFS, "is a Git LFS pointer"),
        (IMAGES, b"PK\3\4", "is a zip archive"),
        (LABELS, packed_array(clothes(5)[1]), "holds 6 images, train-labels-idx1-ubyte 5 labels"),
        (f"{IMAGES}.gz", gzipped(WHOLE)[:-20], "is cut short"),
        (f"{IMAGES}.gz", gzipped(WHOLE)[:-9], "is cut short"),
        (f"{IMAGES}.gz", gzipped(WHOLE[:-1]), "holds 383 of the 384 bytes that it says"),
        (f"{IMAGES}.gz", gzipped(WHOLE + bytes(10**6)), "holds more than the 384 bytes that it says"),
        (f"{IMAGES}.gz", gzipped(WHOLE[:4] + b"\0\xff" * 6), "which so short a file cannot"),
        (f"{IMAGES}.gz", FALSE_CHECKSUM, "is damaged (CRC check failed"),
        (f"{IMAGES}.gz", gzipped(WHOLE)[:10] + b"\xff" * 300, "is damaged ("),
    ],
)
def test_a_damaged_file_is_named(name, content, message, tmp_path):
    images, labels = clothes(6)
    write_idx(tmp_path, images, labels)
    if name.endswith(".gz"):
        (tmp_path / IMAGES).unlink()
    write(tmp_path, name, content)
    found = refused(tmp_path)
    shown = IMAGES if "labels" in message else name
    assert found.startswith(f"layout idx: {tmp_path / shown}")
    assert message in found


def test_a_large_packed_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "_MOST_BYTES", 100)
    images, labels = clothes(6)
    write_idx(tmp_path, images, labels, packed=True)
    assert "holds 384 bytes, more than the 100 that are read packed; unpack it by gunzip" in refused(tmp_path)


def test_what_else_lies_there_is_said_and_a_link_out_is_refused(tmp_path):
    images, labels = clothes(4)
    inside = write_idx(tmp_path / "in", images, labels)
    write(inside, "readme.md", "x")
    assert notices(inside) == ["not read: 1 .md (readme.md)"]
    moved = tmp_path / "out"
    moved.mkdir()
    (inside / IMAGES).rename(moved / IMAGES)
    (inside / IMAGES).symlink_to(moved / IMAGES)
    assert "leaves the folder by a symbolic link" in refused(inside)
    assert len(open_source(inside, "auto", SourceOptions(allow_outside=(moved,)))) == 4
