"""A folder of images for each class: names, labels, and what looks like a class and is none."""

import json

import pytest

from megatron_cca.data.sources import Record, open_source
from tests.references.sources import LFS, A, B, everything, notices, refused, write, write_all, zipped


def test_a_folder_for_each_class(tmp_path):
    write_all(tmp_path, {"n2_cat/b.JPEG": B, "n1/a.png": A})
    source = open_source(tmp_path)
    assert source[0] == Record("n1/a.png", "n1", "n1", (A,), label=0)
    assert source[1] == Record("n2_cat/b.JPEG", "n2 cat", "n2_cat", (B,), label=1)
    before = source.fingerprint()
    write(tmp_path, "classes.json", '{"n1": "tench, a fish"}')
    named = open_source(tmp_path)
    assert [(record.caption, record.condition) for record in named] == [("tench, a fish", "n1"), ("n2 cat", "n2_cat")]
    assert named.fingerprint() != before


def test_imagenets_names(tmp_path):
    write_all(tmp_path, {"n1/a.png": A, "LOC_synset_mapping.txt": "n1 tench, Tinca tinca\nn2 ray\n\n"})
    assert open_source(tmp_path)[0].caption == "tench"


def test_an_image_without_a_class(tmp_path):
    write_all(tmp_path, {"n1/deep/a.png": A, "stray.png": B})
    found = everything(open_source(tmp_path, "classes"))
    assert found == [Record("n1/deep/a.png", "n1", "n1", (A,), label=0), "stray.png: lies in no class's folder"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes.json", "{", "classes.json is not valid JSON"),
        ("classes.json", "[]", "classes.json must hold a JSON object, found a list"),
        ("classes.json", '{"n1": 3}', "classes.json: the name of n1 must be a string, found a number"),
        ("classes.json", '{"n1": " "}', "classes.json: n1 has no name"),
        ("LOC_synset_mapping.txt", "n1 a\nn2", "LOC_synset_mapping.txt:2 has no name after n2"),
        ("LOC_synset_mapping.txt", b"\xff", "LOC_synset_mapping.txt is not UTF-8"),
    ],
)
def test_damaged_class_names_are_refused(file, content, message, tmp_path):
    write_all(tmp_path, {"n1/a.png": A, file: content})
    assert message in refused(tmp_path, "classes")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.json", '{"0": "cat"}', "names '0', and none of the folders, such as 'n1'"),
        ("LOC_synset_mapping.txt", "n7 ray", "names 'n7', and none of the folders"),
        ("classes.json", '["cat"]', "must hold a JSON object, found a list"),
        ("classes.json", '{"n1": "cat"}'.encode("utf-16"), "is text in UTF-16"),
        ("LOC_synset_mapping.txt", LFS, "is a Git LFS pointer"),
        ("LOC_synset_mapping.txt", zipped("n1 ray"), "is compressed (gzip)"),
    ],
)
def test_names_of_other_classes_are_refused(name, content, message, tmp_path):
    write_all(tmp_path, {"n1/a.png": A, name: content})
    assert message in refused(tmp_path, "classes")


@pytest.mark.parametrize(
    "paths",
    [
        ("train/n1/a.png", "train/n2/b.png", "val/n1/c.png"),
        ("train/a.png", "val/b.png"),
        ("Train/n1/a.png", "Test/b.png", "extra/n1/c.png"),
        ("train2017/a.png", "val2017/b.png"),
        ("train/n1/a.png",),
    ],
)
def test_splits_are_no_classes(paths, tmp_path):
    write_all(tmp_path, dict.fromkeys(paths, A))
    message = refused(tmp_path, "classes")
    assert "hold a split of a data set each and are no classes; give one of them: " in message
    assert refused(tmp_path).endswith(message[-20:])


def test_classes_that_are_called_like_a_split_stay(tmp_path):
    write_all(tmp_path, {"train/a.png": A, "car/b.png": B})
    assert [record.caption for record in open_source(tmp_path)] == ["car", "train"]


def test_what_is_odd_about_classes_is_said(tmp_path):
    files = {"n1/a.png": A, "n2/deep/b.PNG": A, "n3/c.heic": b"x", "n4/._d.png": b"x", "stray.csv": "x"}
    write_all(tmp_path, files)
    write(tmp_path, "LOC_synset_mapping.txt", "\ufeffn1 tench, Tinca tinca\r\n\r\nn9 ray \r\n")
    assert open_source(tmp_path, "classes")[0].caption == "tench"
    assert notices(tmp_path, "classes")[:-1] == [
        "1 images lie deeper than in a class's folder; the first folder is their class",
        "2 folders hold no images and count as no class (n3): labels count the other folders",
        "1 classes have no name in LOC_synset_mapping.txt and keep that of their folder (n2)",
        "1 names in LOC_synset_mapping.txt are of no folder (n9)",
    ]
    assert notices(tmp_path, "classes")[-1].startswith("not read: ")
    write(tmp_path, "classes.json", b"\xef\xbb\xbf" + json.dumps({"n1": "fish", "n2": "ray"}).encode())
    assert "LOC_synset_mapping.txt is not read, since there is classes.json" in notices(tmp_path, "classes")
    one = write_all(tmp_path / "one", {"n1/a.png": A})
    assert notices(one) == ["all images are of one class, n1"]
