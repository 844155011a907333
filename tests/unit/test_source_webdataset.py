"""Tars of images and texts, as WebDataset writes them: all records come through, unsafe and damaged tars are named.

The oracle is the disk: each test writes files that it knows, and compares.
"""

import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cca.data.sources import Record, SourceOptions, open_source
from megatron_cca.data.sources.external_text import printable
from megatron_cca.data.sources.webdataset import _KINDS as TAR_KINDS
from megatron_cca.data.sources.webdataset import TarRecords
from megatron_cca.errors import UserError
from tests.references.sources import LFS, A, B, C, everything, notices, read, refused, tar, write, write_all


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_webdataset(kind, tmp_path):
    long = "d" * 90 + "/" + "猫" * 60
    tar(tmp_path / "1.tar", [("x/a.jpg", B), ("x/a.txt", " 猫 "), ("b.webp", C), ("b.cls", "7\n")], kind)
    files = [(f"./{long}.png", A), (f"./{long}.seg.png", C), (f"./{long}.json", '{"text": "T"}'), ("README", "r")]
    tar(tmp_path / "0.tar", files, kind)
    source = open_source(tmp_path)
    assert source[0] == Record(printable(f"0.tar/{long}"), "T", None, (A,))
    assert source[1] == Record("1.tar/x/a", "猫", None, (B,))
    assert source[2] == Record("1.tar/b", None, "class 7", (C,))
    assert len(source) == 3
    assert open_source(tmp_path / "1.tar")[1].frames == (C,)
    before = source.fingerprint()
    tar(tmp_path / "1.tar", [("x/a.jpg", B), ("x/a.txt", " 狗 "), ("b.webp", C), ("b.cls", "7\n")], kind)
    assert open_source(tmp_path).fingerprint() != before


def test_members_of_a_record_need_not_be_neighbours_and_keys_may_repeat(tmp_path):
    path = tar(tmp_path / "a.tar", [("a.png", A), ("b.png", B), ("a.txt", "A"), ("b.txt", "B"), ("a.png", C)])
    found = [(record.name, record.caption, record.frames[0]) for record in open_source(path)]
    assert found == [("a.tar/a", "A", A), ("a.tar/b", "B", B), ("a.tar/a#2", None, C)]


def test_records_of_a_tar_that_cannot_be_read(tmp_path):
    files = [("a.txt", "no image"), ("b.png", A), ("b.txt", b"\xff"), ("c.png", A), ("c.cls", "-1"), ("d.png", b"")]
    files += [("e.png", A), ("e.json", "[]"), ("f.png", A), ("f.json", '{"caption": 3}'), ("g.png", A)]
    source = open_source(tar(tmp_path / "a.tar", files))
    assert [text if isinstance(text, str) else text.name for text in everything(source)] == [
        "a.tar/a: has no image (jpg, jpeg, png, webp), or an empty one",
        "a.tar/b: its .txt is not UTF-8",
        "a.tar/c: its .cls must hold the number of a class",
        "a.tar/d: has no image (jpg, jpeg, png, webp), or an empty one",
        "a.tar/e: its .json must hold a JSON object, found a list",
        "a.tar/f: caption must be a string, found a number",
        "a.tar/g",
    ]
    os.truncate(tmp_path / "a.tar", 2000)
    assert read(source, 6) == "a.tar/g: the tar has become shorter since it was opened"
    (tmp_path / "a.tar").unlink()
    assert "the tar cannot be read: No such file" in read(source, 6)


def test_a_caption_field_in_a_tars_json(tmp_path):
    path = tar(tmp_path / "a.tar", [("a.png", A), ("a.txt", "T"), ("a.json", '{"long": "L"}')])
    assert open_source(path)[0].caption == "T"
    assert open_source(path, options=SourceOptions(caption_field="long"))[0].caption == "L"
    assert "caption_field: no .json in" in refused(path, caption_field="lnog")


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("/etc/a.png", {}, "a.tar: member /etc/a.png points outside the tar"),
        ("x/../../a.png", {}, "a.tar: member x/../../a.png points outside the tar"),
        (
            "a.png",
            {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "a.tar: member fine.txt is a link, a device or sparse",
        ),
        ("a.png", {"type": tarfile.LNKTYPE, "linkname": "b"}, "is a link, a device or sparse"),
        ("a.png", {"type": tarfile.CHRTYPE}, "is a link, a device or sparse"),
        ("a.png", {"type": tarfile.FIFOTYPE}, "is a link, a device or sparse"),
        ("a.png", {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}}, "sparse"),
        ("a.png", {"pax_headers": {"size": "-5"}}, "a.tar"),
        ("a.png", {"pax_headers": {"size": str(2**70)}}, "a.tar"),
        ("a.txt", {}, "has no tar with images"),
    ],
)
def test_an_unsafe_tar_is_refused(name, attributes, message, tmp_path):
    tar(tmp_path / "a.tar", [("fine.txt", "t"), (name, A)], **attributes)
    assert message in refused(tmp_path, "webdataset")


@pytest.mark.parametrize("keep", [0, 100, 511, 512, 600, 1024, 1500, 1536, 2048])
def test_a_truncated_tar_is_named(keep, tmp_path):
    path = tar(tmp_path / "a.tar", [("a.png", A), ("b.png", A)])
    os.truncate(path, keep)
    assert f"{path} is truncated" in refused(tmp_path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = tar(tmp_path / "a.tar", [("a.png", A), ("b.png", A)])
    content = bytearray(path.read_bytes())
    content[1024:1030] = b"rubbish"[:6]
    path.write_bytes(content)
    assert "is truncated or damaged after 1024 bytes" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a.tar.zst"])
def test_a_compressed_tar_is_refused(name, tmp_path):
    with tarfile.open(tmp_path / name, "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.png"))
    assert "is compressed" in refused(tmp_path)
    assert "is compressed" in refused(tmp_path / name, "webdataset")


def test_a_file_that_is_called_a_tar(tmp_path):
    for content, kind in ((A, "a PNG image"), (b"PAR1" * 200, "a Parquet file"), (LFS, "a Git LFS pointer")):
        assert f"is no tar but {kind}" in refused(write(tmp_path, "a.tar", content))
    tar(tmp_path / "b/a.tar", [("a.heic", b"x")])
    assert "has no tar with images (jpg, jpeg, png, webp); not read: 1 .heic (a.tar/a.heic)" in refused(tmp_path / "b")


def test_a_tar_that_leaves_the_folder_is_refused(tmp_path):
    tar(tmp_path / "a.tar", [("a.png", A)])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.tar").symlink_to("../a.tar")
    assert "leaves the folder by a symbolic link" in refused(tmp_path / "data")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_to_a_tar_raises_anything_else(tmp_path_factory, data):
    path = tar(tmp_path_factory.mktemp("tar") / "a.tar", [("a.png", A), ("a.txt", "t")])
    content = bytearray(path.read_bytes()[:3072])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        everything(open_source(path))
    except UserError as error:
        assert str(error).isprintable()


def test_the_index_of_a_tar_is_compact(tmp_path):
    path = tar(tmp_path / "a.tar", [(f"{index:06}.{kind}", "x") for index in range(500) for kind in ("jpg", "txt")])
    source = TarRecords([path], SourceOptions())
    size = sum(getattr(value, "nbytes", 0) for value in vars(source).values())
    assert size <= 500 * (len(TAR_KINDS) * 16 + 4)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["00000", "00001", "00004", "00005"], "2 of 6 tars that are numbered through are missing (00002.tar)"),
        (["cc-8", "cc-9", "cc-11"], None),  # 9 and 11 have not one width
        (["cc-08", "cc-09", "cc-11"], "1 of 4 tars that are numbered through are missing (cc-10.tar)"),
        (["20240101", "20240201", "20240301"], None),  # dates
        (["a", "b"], None),
    ],
)
def test_a_tar_missing_between_others_is_said(names, said, tmp_path):
    for name in names:
        tar(tmp_path / f"{name}.tar", [("x.png", A), ("x.txt", b"a cat")])
    assert notices(tmp_path) == ([said] if said else [])


def test_what_a_tar_holds_besides_is_counted(tmp_path):
    files = [("a.JPG", B), ("a.caption", "A"), ("b.png", A), ("b.txt", "B"), ("b.caption", "no"), ("c.txt", "C")]
    files += [("b.jpg", B), ("d.npy", b"x"), ("x/0.5_cat.jpg", B), ("__MACOSX/._a.JPG", b"x")]
    tar(tmp_path / "a.TAR", files)
    tar(tmp_path / "b.tar", [("e.heic", b"x")])
    write_all(tmp_path, {"list.csv": "x", "sub/a.tar": b"x", ".a.tar": b"x", ".gitattributes": "x"})
    source = open_source(tmp_path)
    assert [record if isinstance(record, str) else record.caption for record in everything(source)][:2] == ["A", "B"]
    assert source.notices()[:3] == [
        "1 tars hold no records (b.tar)",
        "1 of 3 records have no image (jpg, jpeg, png, webp)",
        "1 records have several images, of which the first of jpg, jpeg, png, webp is read",
    ]
    inside, beside = source.notices()[3:]
    for part in ("1 .npy", "1 images with a second dot in their names", "1 .heic (b.tar/e.heic)", "1 hidden"):
        assert part in inside
    assert beside.startswith("beside the tars, not read: ")
    assert "1 .csv (list.csv)" in beside
    assert "1 hidden (.a.tar)" in beside
    assert "1 folders (sub/)" in beside
