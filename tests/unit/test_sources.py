"""Sources: what lies on the disk comes through byte for byte, and what cannot be read is said, never raised.

The oracle is the disk: each test writes images and captions that it knows, and compares.
"""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_cca.data.sources import SOURCE_LAYOUTS, Record, SourceOptions, Unreadable, open_source
from megatron_cca.data.sources.emu3 import load_plain
from megatron_cca.data.sources.external_text import printable, unique_names
from megatron_cca.data.sources.webdataset import _KINDS as TAR_KINDS
from megatron_cca.data.sources.webdataset import TarRecords
from megatron_cca.errors import UserError

SCRIPTS = ["a cat", "一只猫", "قطة سوداء", "e\u0301 \U0001f408\u200d", 'quote " \\ and\nline']


def picture(shade, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(content, kind)
    return content.getvalue()


A, B, C = picture(10), picture(20, "JPEG"), picture(30, "WEBP")


def put(folder, **files):
    """Files by name; "__" stands for "/" and the first "_" before the suffix for "."."""
    for name, content in files.items():
        write(folder, name, content)
    return folder


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_all(folder, files):
    for name, content in files.items():
        write(folder, name, content)
    return folder


def lines(*objects):
    return "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects)


def read(source, index):
    try:
        return source[index]
    except Unreadable as error:
        assert "\n" not in str(error)
        str(error).encode()
        return str(error)


def everything(source):
    return [read(source, index) for index in range(len(source))]


def refused(path, layout="auto", **options):
    with pytest.raises(UserError) as error:
        open_source(path, layout, SourceOptions(**options))
    message = str(error.value)
    assert message.isprintable()
    return message


# captions


def test_a_list_of_captions(tmp_path):
    listed = lines(
        *({"file_name": "sub/a.png", "caption": f"  {text}\t"} for text in SCRIPTS),
        {"file_name": "b.jpg", "text": "as text", "condition": " one "},
        {"frames": ["sub/a.png", "b.jpg"], "caption": None},
    )
    write_all(tmp_path, {"captions.jsonl": "\ufeff" + listed + "\n", "sub/a.png": A, "b.jpg": B})
    source = open_source(tmp_path)
    assert [record.caption for record in source] == [*SCRIPTS, "as text", None]
    assert [record.name for record in source][:2] == ["sub/a.png", "sub/a.png#2"]
    assert source[0] == Record("sub/a.png", "a cat", None, (A,))
    assert (source[5].condition, source[5].frames) == ("one", (B,))
    assert source[-1].frames == (A, B)
    assert len({record.name for record in source}) == len(source) == 7
    with pytest.raises(IndexError):
        source[7]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "captions.jsonl:2: the line is not valid JSON"),
        (b"\xff\xfe", "captions.jsonl:2: the line is not UTF-8"),
        ("[1]", "captions.jsonl:2: the line must hold a JSON object, found a list"),
        ("[" * 100_000, "captions.jsonl:2: the line is nested too deeply"),
        ('{"file_name": ' + "9" * 5000 + "}", "captions.jsonl:2: the line is not valid JSON"),
        ("{}", 'captions.jsonl:2: the line needs either "file_name" or "frames"'),
        ('{"file_name": 1e999}', 'captions.jsonl:2: "file_name" must be a file name'),
        ('{"frames": "a.png"}', 'captions.jsonl:2: "frames" must be a list of file names'),
        ('{"frames": []}', 'captions.jsonl:2: "frames" names no files'),
        ('{"frames": ["a.png", 3]}', 'captions.jsonl:2: "frames" must be a list of file names'),
        ('{"frames": ["a.png"], "file_name": "a.png"}', 'captions.jsonl:2: the line needs either "file_name"'),
        ('{"file_name": "a.png", "caption": 3}', "a.png#2: caption must be a string, found a number"),
        ('{"file_name": "a.png", "caption": ["x"]}', "a.png#2: caption must be a string, found a list"),
        ('{"file_name": "a.png", "caption": "\\ud800"}', "a.png#2: caption is not valid Unicode"),
        ('{"file_name": "a.png", "caption": "x", "condition": 1}', "a.png#2: condition must be a string"),
        ('{"file_name": "gone.png"}', "gone.png: gone.png is missing"),
        ('{"file_name": "empty.png"}', "empty.png: empty.png: is empty"),
        ('{"file_name": "sub"}', "sub: sub: is not a file"),
        ('{"file_name": "pipe"}', "pipe: pipe: is not a file"),
        ('{"file_name": "/etc/passwd"}', "/etc/passwd: /etc/passwd leaves the folder"),
        ('{"file_name": "../secret.png"}', "../secret.png: ../secret.png leaves the folder"),
        ('{"file_name": "sub/../../secret.png"}', "leaves the folder"),
        ('{"file_name": "link.png"}', "link.png: link.png leaves the folder"),
        ('{"file_name": "linked/secret.png"}', "leaves the folder"),
        ('{"file_name": "loop"}', "loop: loop: Too many levels of symbolic links"),
        ('{"file_name": "a\\u0000.png"}', "a\\x00.png: a\\x00.png is not a file name"),
        ('{"file_name": "\\ud800.png"}', "\\ud800.png is not a file name"),
        ('{"file_name": "a\\n.png"}', "a\\n.png: a\\n.png is missing"),
        ('{"file_name": "' + "a" * 5000 + '.png"}', "File name too long"),
    ],
    ids=range(29),
)
def test_a_line_that_cannot_be_read_is_skipped_alone(line, message, tmp_path):
    folder = tmp_path / "data"
    write_all(folder, {"a.png": A, "empty.png": b"", "sub/a.png": A})
    write(tmp_path, "secret.png", B)
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "linked").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    line = line if isinstance(line, bytes) else line.encode()
    write(
        folder, "captions.jsonl", lines({"file_name": "a.png"}).encode() + line + b"\n" + b'{"file_name": "sub/a.png"}'
    )
    first, second, third = everything(open_source(folder, "captions"))
    assert first.frames == third.frames == (A,)
    assert message in second


def test_a_link_that_stays_inside_is_followed(tmp_path):
    write_all(tmp_path, {"captions.jsonl": lines({"file_name": "b.png"}), "a.png": A})
    (tmp_path / "b.png").symlink_to("a.png")
    assert open_source(tmp_path)[0].frames == (A,)


def test_the_folder_itself_may_be_a_link_or_relative(tmp_path, monkeypatch):
    write_all(tmp_path / "real", {"captions.jsonl": lines({"file_name": "a.png"}), "a.png": A})
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert open_source(Path("link"))[0].frames == (A,)


def test_a_list_that_leaves_the_folder_is_refused(tmp_path):
    write(tmp_path, "list", lines({"file_name": "a.png"}))
    write(tmp_path / "data", "a.png", A)
    (tmp_path / "data/captions.jsonl").symlink_to("../list")
    assert "captions.jsonl leaves the folder by a symbolic link" in refused(tmp_path / "data")


def test_a_caption_field(tmp_path):
    write_all(tmp_path, {"captions.jsonl": lines({"file_name": "a.png", "long": "L", "caption": "c"}), "a.png": A})
    long = open_source(tmp_path, options=SourceOptions(caption_field="long"))
    assert long[0].caption == "L"
    assert long.fingerprint() != open_source(tmp_path).fingerprint()
    assert "caption_field: no line of" in refused(tmp_path, caption_field="lnog")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_list_is_refused(content, tmp_path):
    write(tmp_path, "captions.jsonl", content)
    assert "holds no records" in refused(tmp_path)


@pytest.mark.parametrize("chunk", [1, 2, 7, 50])
def test_lines_across_chunks(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.data.sources.external_text._CHUNK", chunk)
    write_all(tmp_path, {"captions.jsonl": lines(*({"file_name": "a.png", "caption": c} for c in SCRIPTS)), "a.png": A})
    assert [record.caption for record in open_source(tmp_path)] == SCRIPTS


def test_an_absolute_name_inside_the_folder_is_read(tmp_path):
    write_all(tmp_path, {"captions.jsonl": lines({"file_name": f"{tmp_path}/a.png"}), "a.png": A})
    assert everything(open_source(tmp_path))[0].frames == (A,)


def test_a_clip_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.data.sources.captions.MAX_IMAGE_BYTES", 2 * len(A) + 1)
    clips = ({"frames": ["a.png"] * count} for count in (2, 3))
    two, three = everything(open_source(write_all(tmp_path, {"captions.jsonl": lines(*clips), "a.png": A})))
    assert two.frames == (A, A)
    assert three == f"a.png#2: a.png: has {len(A)} bytes, at most 1 are read"


def test_a_line_number_counts_empty_lines(tmp_path):
    write(tmp_path, "captions.jsonl", "\n\n{\n")
    assert everything(open_source(tmp_path)) == ["captions.jsonl:3: the line is not valid JSON"]


def test_texts_beside_images(tmp_path):
    write_all(
        tmp_path,
        {"b.png": A, "a/z.JPG": B, "a/z.txt": " 猫\r\n", "a.b.webp": C, "a.b.txt": "", ".hid.png": A, "x.png": A},
    )
    write(tmp_path, "x.txt", b"\xff")
    source = open_source(tmp_path)
    found = everything(source)
    assert [record.name for record in found[:3]] == ["a.b.webp", "a/z.JPG", "b.png"]
    assert [record.caption for record in found[:3]] == [None, "猫", None]
    assert found[3] == "x.png: the .txt beside it is not UTF-8"
    before = source.fingerprint()
    assert open_source(tmp_path).fingerprint() == before
    write(tmp_path, "a/z.txt", "dog")
    after = open_source(tmp_path).fingerprint()
    write(tmp_path, "b.txt", "new")
    assert len({before, after, open_source(tmp_path).fingerprint()}) == 3


def test_a_text_that_leaves_the_folder(tmp_path):
    write(tmp_path, "secret", "s")
    write_all(tmp_path / "data", {"a.png": A, "b.png": A, "b.txt": "b"})
    (tmp_path / "data/a.txt").symlink_to("../secret")
    assert everything(open_source(tmp_path / "data"))[0] == "a.png: a.txt leaves the folder"


@pytest.mark.parametrize("layout", ["auto", "captions", "classes"])
def test_a_linked_folder_is_not_lost_in_silence(layout, tmp_path):
    write_all(tmp_path, {"data/a/a.png": A, "other/b.png": B})
    (tmp_path / "data/b").symlink_to("../other")
    assert "data/b is a symbolic link to a folder, which is not followed" in refused(tmp_path / "data", layout)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            ).map(lambda found: json.dumps(found).encode()),
            st.dictionaries(
                st.sampled_from(["file_name", "caption", "text", "condition", "frames", "prompt", "img_path", "Task2"]),
                st.none()
                | st.integers()
                | st.text()
                | st.sampled_from(["a.png", "..", "a.png/b", "."])
                | st.lists(st.sampled_from(["a.png", "", "\0"]) | st.integers(), max_size=2),
            ).map(lambda found: json.dumps(found).encode()),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_line_raises_anything_else(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("fuzz")
    content = b"\n".join(found)
    write_all(folder, {"a.png": A, "captions.jsonl": content, "x_anno_repath.jsonl": content, "imgs/a.png": A})
    for layout in ("captions", "journeydb"):
        try:
            source = open_source(folder, layout)
        except UserError as error:
            assert "holds no records" in str(error)
            continue
        for record in everything(source):
            assert isinstance(record, Record | str)
            if isinstance(record, Record) and record.caption is not None:
                assert record.caption == record.caption.strip() != ""
                record.caption.encode()
        source.fingerprint()


# classes


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


# journeydb


def journeydb(folder, *objects, name="train_anno_realease_repath.jsonl"):
    return write_all(folder, {name: lines(*objects), "imgs/000/a.jpg": B, "imgs/001/b.jpg": A})


PAIR = (
    {"img_path": "./000/a.jpg", "prompt": " P ", "Task2": {"Caption": "C"}},
    {"img_path": "./001/b.jpg", "prompt": "Q"},
)


def test_journeydb(tmp_path):
    folder = journeydb(tmp_path / "data/train", *PAIR)
    journeydb(tmp_path / "data/valid", PAIR[1], name="valid_anno_repath.jsonl")
    name = "train_anno_realease_repath.jsonl:1"
    for path in (folder, tmp_path):
        source = open_source(path)
        assert source[0] == Record(name, "P", "P", (B,))
    described = open_source(tmp_path, options=SourceOptions(caption_field="Task2.Caption"))
    assert [(record.caption, record.condition) for record in described] == [("C", "P"), (None, "Q")]
    assert described.fingerprint() != source.fingerprint()
    valid = open_source(tmp_path, options=SourceOptions(split="valid"))
    assert [record.caption for record in valid] == ["Q"]


def test_journeydbs_refusals(tmp_path):
    folder = journeydb(tmp_path, *PAIR)
    assert "choose prompt or Task2.Caption" in refused(folder, caption_field="caption")
    for split in ("../x", "/etc", "", ".", "a\0"):
        assert "is not the name of a split" in refused(folder, split=split)
    assert "no *anno*repath*.jsonl of split valid" in refused(folder, "journeydb", split="valid")
    journeydb(folder, PAIR[1], name="valid_anno_repath.jsonl")
    assert "has several lists" in refused(folder)
    assert len(open_source(folder, options=SourceOptions(split="valid"))) == 1
    assert "is missing; the images belong beside" in refused(
        write_all(tmp_path / "none", {"anno_repath.jsonl": lines(*PAIR)})
    )
    packed = write_all(tmp_path / "packed", {"anno_repath.jsonl": lines(*PAIR), "imgs/000.tgz": b"x"})
    assert "is still packed; unpack each .tgz" in refused(packed)


def test_journeydbs_lines_that_cannot_be_read(tmp_path):
    bad = [{"img_path": 3}, {"img_path": "../x"}, {"img_path": "000/a.jpg", "prompt": []}, {"img_path": "000/z.jpg"}]
    messages = [text.partition(": ")[2] for text in everything(open_source(journeydb(tmp_path, *bad)))]
    assert messages == [
        '"img_path" must be a file name',
        "../x leaves the folder",
        "prompt must be a string, found a list",
        "000/z.jpg is missing",
    ]
    described = SourceOptions(caption_field="Task2.Caption")
    journeydb(tmp_path, {"img_path": "000/a.jpg", "Task2": 3}, {"img_path": "000/a.jpg", "Task2": {"Caption": 3}})
    found = everything(open_source(tmp_path, options=described))
    assert found[0].endswith('"Task2" must be an object')
    assert found[1].endswith("Task2.Caption must be a string, found a number")


# webdataset


def tar(path, files, kind=tarfile.PAX_FORMAT, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in files:
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            file.addfile(member, io.BytesIO(content))
    return path


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


# datasets


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """datasets' cache in a temporary folder, and no network at all."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def no_network(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", no_network)


def rows(*captions, **columns):
    import datasets

    columns = {"image": [{"bytes": A, "path": "a.png"}, {"bytes": B, "path": None}], "caption": captions, **columns}
    found = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items() if len(values)})
    return found.cast_column("image", datasets.Image()) if "image" in found.column_names else found


def test_parquet(hf_cache, tmp_path, capfd):
    (tmp_path / "d [1] a:b").mkdir()
    folder = tmp_path / "d [1] a:b"
    # What a README may say is not followed.
    readme = "---\nconfigs:\n- config_name: default\n  data_files: ../../*.parquet\n---\n"
    write(folder, "README.md", readme)
    for name, captions in {"train": (" 猫 ", None), "test": ("v", "w")}.items():
        content = io.BytesIO()
        rows(*captions).to_parquet(content)
        write(folder, f"{name}-00000-of-00001.parquet", content.getvalue())
    capfd.readouterr()
    source = open_source(folder)
    assert source[0] == Record("train:0", "猫", None, (A,))
    assert source[1] == Record("train:1", None, None, (B,))
    test = open_source(folder, options=SourceOptions(split="test"))
    assert [record.caption for record in test] == ["v", "w"]
    assert test.fingerprint() != source.fingerprint() == open_source(folder).fingerprint()
    assert "has no 'dev'; choose one of test, train" in refused(folder, split="dev")
    assert capfd.readouterr() == ("", "")


def test_what_datasets_saved(hf_cache, tmp_path):
    import datasets

    rows("a", "b").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(val=rows("c", "d"), test=rows("e", "f")).save_to_disk(tmp_path / "two")
    assert [record.caption for record in open_source(tmp_path / "one")] == ["a", "b"]
    assert "split" in refused(tmp_path / "one", split="train")
    assert "has several; choose one of test, val" in refused(tmp_path / "two")
    source = open_source(tmp_path / "two", options=SourceOptions(split="val"))
    assert [(record.name, record.frames) for record in source] == [("val:0", (A,)), ("val:1", (B,))]
    rows("a", "c").save_to_disk(tmp_path / "three")
    assert open_source(tmp_path / "one").fingerprint() != open_source(tmp_path / "three").fingerprint()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{", "cannot be opened by datasets (JSONDecodeError"),
        ("state.json", '{"_data_files": 3}', "cannot be opened by datasets"),
        ("state.json", '{"_data_files": [{"filename": "../secret.arrow"}]}', "leaves the folder"),
        ("state.json", "[" * 100_000, "cannot be opened by datasets (RecursionError"),
        ("dataset_info.json", "[]", "cannot be opened by datasets"),
        ("dataset_dict.json", '{"splits": ["../one"]}', "leaves the folder"),
        ("dataset_dict.json", '{"splits": ["/etc"]}', "is missing or not a file"),
        ("dataset_dict.json", '{"splits": []}', "cannot be opened by datasets"),
        ("data-00000-of-00001.arrow", "ARROW1", "cannot be opened by datasets"),
    ],
)
def test_damaged_saved_data_is_refused(file, content, message, hf_cache, tmp_path):
    for name in ("data", "one"):
        rows("a", "b").save_to_disk(tmp_path / name)
    write(tmp_path, "secret.arrow", (tmp_path / "one/data-00000-of-00001.arrow").read_bytes())
    write(tmp_path / "data", file, content)
    assert message in refused(tmp_path / "data")


def test_columns(hf_cache, tmp_path):
    import datasets

    labelled = rows(label=[1, -1]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    labelled.save_to_disk(tmp_path / "label")
    assert [(record.caption, record.condition) for record in open_source(tmp_path / "label")] == [
        ("dog", "dog"),
        (None, None),
    ]
    second = {"other": [{"bytes": B, "path": None}] * 2, "long": ["l", "m"]}
    rows("a", "b", **second).cast_column("other", datasets.Image()).save_to_disk(tmp_path / "two")
    assert "image_field: " in refused(tmp_path / "two")
    options = SourceOptions(image_field="other", caption_field="long")
    assert open_source(tmp_path / "two", options=options)[0] == Record("train:0", "l", None, (B,))
    assert "has no column 'x'; choose one of image, caption, other, long" in refused(tmp_path / "two", image_field="x")
    paths = open_source(tmp_path / "two", options=SourceOptions(image_field="long", caption_field="caption"))
    assert everything(paths) == ["train:0: l is missing", "train:1: m is missing"]
    assert "has no text in 'other'; columns of text: caption, long" in refused(
        tmp_path / "two", image_field="image", caption_field="other"
    )
    datasets.Dataset.from_dict({"x": [1], "text": ["t"]}).save_to_disk(tmp_path / "three")
    assert "has no column of images" in refused(tmp_path / "three")
    assert "holds no images" in refused(tmp_path / "three", image_field="x")


def test_a_path_in_a_table_stays_inside(hf_cache, tmp_path):
    import pyarrow
    from pyarrow import parquet

    write(tmp_path, "secret.png", B)
    paths = ["in.png", "../secret.png", "/etc/passwd", None]
    folder = write(tmp_path, "data/in.png", A).parent
    images = [{"bytes": None, "path": path} for path in paths]
    parquet.write_table(pyarrow.table({"image": images, "caption": list("abcd")}), folder / "train.parquet")
    found = everything(open_source(folder))
    assert found[0].frames == (A,)
    assert found[1:] == [
        "train:1: ../secret.png leaves the folder",
        "train:2: /etc/passwd leaves the folder",
        "train:3: has no image",
    ]


def test_a_folder_of_images_with_metadata(hf_cache, tmp_path):
    folder = tmp_path / "data"
    listed = lines({"file_name": "a.png", "text": "猫"}, {"file_name": "sub/b.jpg", "text": "b"})
    write_all(folder, {"metadata.jsonl": listed, "a.png": A, "sub/b.jpg": B})
    assert [(record.caption, record.frames) for record in open_source(folder)] == [("猫", (A,)), ("b", (B,))]
    write(tmp_path, "secret.png", B)
    write(folder, "metadata.jsonl", lines({"file_name": "../secret.png", "text": "s"}))
    assert "cannot be opened by datasets" in refused(folder)
    (folder / "link.png").symlink_to("../secret.png")
    write(folder, "metadata.jsonl", lines({"file_name": "link.png", "text": "s"}))
    assert everything(open_source(folder)) == ["train:0: link.png leaves the folder"]


def test_files_that_are_no_data_set(hf_cache, tmp_path):
    write(tmp_path / "bad", "x.parquet", b"PAR1 rubbish")
    assert "cannot be opened by datasets" in refused(tmp_path / "bad")
    assert "has no .parquet or .arrow" in refused(write_all(tmp_path / "none", {"a.csv": "x"}), "datasets")
    rows("a", "b").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "a::b")
    assert 'has "::" in its name' in refused(tmp_path / "a::b")
    assert 'x::y.parquet has "::" in its name' in refused(write_all(tmp_path / "c", {"x::y.parquet": b""}))
    write_all(tmp_path / "mixed", {"train.parquet": b"", "x.parquet": b""})
    assert "x.parquet is of no split, train.parquet is" in refused(tmp_path / "mixed")
    rows("a", "b").to_parquet(tmp_path / "p.parquet")
    (tmp_path / "link").mkdir()
    (tmp_path / "link/p.parquet").symlink_to("../p.parquet")
    assert "leaves the folder by a symbolic link" in refused(tmp_path / "link")


# emu3


def emu3(folder, *objects, prefix="../feature"):
    names = []
    for index, found in enumerate(objects):
        names.append(f"{index}.pth")
        content = io.BytesIO()
        torch.save(found, content)
        write(folder, f"feature/{index}.pth", found if isinstance(found, bytes) else content.getvalue())
    return write(folder, "list/train.json", json.dumps({"prefix": prefix, "path_list": names}))


CODES = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    "images",
    [
        CODES,
        CODES.astype(np.int32),
        CODES.astype(">u2"),
        np.asfortranarray(CODES),
        torch.from_numpy(CODES),
        torch.from_numpy(CODES).to(torch.int16),
        CODES[None],
    ],
    ids=["int64", "int32", "big-endian", "fortran", "tensor", "int16 tensor", "3-d"],
)
def test_emu3s_codes(images, tmp_path):
    path = emu3(tmp_path, {"name": "0", "images": images, "texts": " 猫 "}, {"images": images})
    for given_path in (path, path.parent, tmp_path):
        first, second = open_source(given_path)
        assert (first.name, first.caption, first.frames) == ("0.pth", "猫", ())
        assert second.caption is None
        assert first.codes.dtype == np.int64
        np.testing.assert_array_equal(first.codes, CODES[None])


def test_moved_features_are_found(tmp_path):
    path = emu3(tmp_path, {"images": CODES}, prefix="/nowhere/feature")
    assert open_source(path)[0].codes.shape == (1, 2, 3)
    (tmp_path / "feature").rename(tmp_path / "elsewhere")
    assert f'neither its "prefix" /nowhere/feature nor {tmp_path / "feature"} is a folder' in refused(path)
    write(tmp_path, "list/train.json", json.dumps({"prefix": str(tmp_path / "elsewhere"), "path_list": ["0.pth"]}))
    assert len(open_source(path)) == 1


def test_emu3s_fingerprint(tmp_path):
    prints = [open_source(emu3(tmp_path, {"images": CODES, "texts": text})).fingerprint() for text in "aab"]
    assert prints[0] == prints[1] != prints[2]
    prints.append(open_source(emu3(tmp_path, {"images": CODES, "texts": "b"}, b"rubbish")).fingerprint())
    assert prints[3] != prints[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a list of Emu3's"),
        ('{"prefix": "."}', "is not a list of Emu3's"),
        ("[" * 100_000, "is not a list of Emu3's"),
        ('{"prefix": 3, "path_list": []}', '"prefix" must be a folder'),
        ('{"prefix": ".", "path_list": [3]}', '"path_list" a list of file names'),
        ('{"prefix": ".", "path_list": []}', '"path_list" is empty'),
        ('{"prefix": "a\\u0000b\\ud800", "path_list": ["a"]}', 'neither its "prefix" a\\x00b\\ud800 nor'),
    ],
)
def test_emu3_lists_that_are_none(content, message, tmp_path):
    assert message in refused(write(tmp_path, "list/train.json", content), "emu3")


def test_emu3s_files_stay_below_the_prefix(tmp_path):
    emu3(tmp_path, {"images": CODES})
    names = ["../list/train.json", "/etc/passwd", "gone.pth", "0.pth", "0.pth"]
    path = write(tmp_path, "list/train.json", json.dumps({"prefix": "../feature", "path_list": names}))
    found = everything(open_source(path))
    assert found[:3] == [
        "../list/train.json: ../list/train.json leaves the folder",
        "/etc/passwd: /etc/passwd leaves the folder",
        "gone.pth: gone.pth is missing",
    ]
    assert [record.name for record in found[3:]] == ["0.pth", "0.pth#2"]


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def swollen(kind):
    content = io.BytesIO()
    torch.save({"images": CODES}, content)
    packed = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(packed, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + b"\0" * (5000 if name.endswith("pkl") else 0))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (b"rubbish", "not a .pth of plain data: it is damaged or of another format"),
        (b"", "is empty"),
        ([1], 'it has no "images"'),
        ({"texts": "a"}, 'it has no "images"'),
        ({"images": CODES, "texts": 3}, "texts must be a string, found a number"),
        ({"images": "x"}, '"images" must be an array of integers'),
        ({"images": None}, '"images" must be an array of integers'),
        ({"images": CODES / 2}, "an array of type 'f8' instead of integers"),
        ({"images": np.array([[1, None]])}, "an array of type 'O8' instead of integers"),
        ({"images": np.array([["a"]])}, "instead of integers"),
        ({"images": -CODES}, "negative or too large"),
        ({"images": np.full((1, 1), 2**63, np.uint64)}, "negative or too large"),
        ({"images": torch.zeros((0, 3), dtype=torch.long)}, "has shape [1, 0, 3]"),
        ({"images": np.zeros(3, int)}, "has shape [3]"),
        ({"images": np.zeros((2, 1, 3), int)}, "has shape [2, 1, 3]"),
        ({"images": torch.zeros(2, 2)}, "is a torch.float32 tensor"),
        ({"images": torch.zeros(1, dtype=torch.long).expand(2**20, 2**20)}, "of shape [1048576, 1048576]"),
        ({"images": torch.eye(2, dtype=torch.long).to_sparse()}, "is a torch.int64 tensor"),
        ({"images": torch.zeros(2, 2, dtype=torch.long, device="meta")}, "is a torch.int64 tensor"),
        (swollen(zipfile.ZIP_DEFLATED), "a compressed archive"),
    ],
    ids=range(20),
)
def test_emu3_files_that_cannot_be_read(found, message, tmp_path):
    good = {"images": CODES}
    bad, fine = everything(open_source(emu3(tmp_path, found, good)))
    assert bad.startswith("0.pth: ")
    assert message in bad
    assert fine.codes.shape == (1, 2, 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_does_not(legacy, tmp_path):
    content = io.BytesIO()
    found = {"images": CODES, "texts": Touch(tmp_path / "ran")}
    torch.save(found, content, _use_new_zipfile_serialization=not legacy)
    assert "not a .pth of plain data" in everything(open_source(emu3(tmp_path, content.getvalue())))[0]
    write(tmp_path, "feature/0.pth", pickle.dumps(found))
    assert "not a .pth of plain data" in everything(open_source(tmp_path))[0]
    assert not (tmp_path / "ran").exists()


class Forged:
    """An array's pickle with another state."""

    def __init__(self, shape, code, content):
        self.args = shape, code, content

    def __reduce__(self):
        shape, code, content = self.args
        reconstruct = CODES.__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(code), False, content)


@pytest.mark.parametrize(
    "state",
    [((2, 3), "i8", b"short"), ((-1, -1), "i8", b"12345678"), ((2**40,), "i8", b"12345678"), ((1,), "O", [1])],
    ids=range(4),
)
def test_a_forged_array_is_not_believed(state, tmp_path):
    assert "not a .pth of plain data" in everything(open_source(emu3(tmp_path, {"images": Forged(*state)})))[0]


def test_plain_data_stays_what_it_was():
    content = io.BytesIO()
    torch.save({"a": [1, "x", None, 2.5], "b": CODES}, content)
    found = load_plain(content.getvalue())
    assert found["a"] == [1, "x", None, 2.5]
    np.testing.assert_array_equal(found["b"], CODES)


def test_what_others_allow_is_not_allowed_here(tmp_path):
    reconstruct = CODES.__reduce__()[0]
    others = [reconstruct, np.ndarray, np.dtype, type(np.dtype("f8")), (open, "io.open"), (open, "_io.open")]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(others)
    try:
        found = [{"images": CODES / 2}, {"images": CODES, "texts": Touch(tmp_path / "ran")}]
        doubles, runs = everything(open_source(emu3(tmp_path, *found)))
        assert set(torch.serialization.get_safe_globals()) == {*before, *others}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert "an array of type 'f8' instead of integers" in doubles
    assert runs == "1.pth: not a .pth of plain data: it asks for _io.open, which no plain data needs"
    assert not (tmp_path / "ran").exists()


# all of them


def test_what_is_not_there_or_unknown(tmp_path):
    assert "does not exist" in refused(tmp_path / "x")
    assert "does not exist" in refused(Path(f"{tmp_path}/a\0b"))
    assert "layout: 'imagenet' is unknown; choose one of auto, captions, classes" in refused(tmp_path, "imagenet")
    possible = "set the layout to one of captions, classes, journeydb, webdataset, datasets, emu3, llamagen"
    assert refused(tmp_path).endswith(f"has no layout known here; {possible}")
    write(tmp_path, "flat.png", A)
    assert "has no layout known here; its images have no captions; write captions.jsonl" in refused(tmp_path)
    assert open_source(tmp_path, "captions")[0].caption is None
    tar(tmp_path / "a.tar", [("a.png", A)])
    write(tmp_path, "captions.jsonl", lines({"file_name": "flat.png"}))
    assert "could be captions or webdataset" in refused(tmp_path)


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_list_beside_images_in_sub_folders_says_that_they_are_no_classes(name, tmp_path):
    write(tmp_path, "images/0.png", A)
    assert open_source(tmp_path)[0].caption == "images"
    caption = {"caption": "a picture"} if name == "captions.jsonl" else {"text": "a picture"}
    write(tmp_path, name, lines({"file_name": "images/0.png", **caption}))
    assert open_source(tmp_path)[0].caption == "a picture"


@pytest.mark.parametrize("layout", SOURCE_LAYOUTS)
def test_an_empty_folder_and_a_foreign_file_are_refused(layout, tmp_path):
    name = "line\nbreak"
    (tmp_path / name).mkdir()
    assert refused(tmp_path / name, layout).startswith(f"layout {layout}: ")
    assert refused(write(tmp_path, "file", b"\0\1\2"), layout).startswith(f"layout {layout}: ")


@pytest.mark.parametrize(
    ("layout", "option"), [("classes", "caption_field"), ("captions", "split"), ("emu3", "image_field")]
)
def test_an_option_that_means_nothing_is_refused(layout, option, tmp_path):
    write_all(tmp_path, {"a/a.png": A})
    assert refused(tmp_path, layout, **{option: "x"}) == f"{option}: means nothing to the layout {layout}; leave it out"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tmp_path):
    write_all(tmp_path, {"a/a.png": A, "a/a.txt": "x", "captions.jsonl": "{}"})
    (tmp_path / "a").chmod(0)
    assert "Permission denied" in refused(tmp_path, "classes")
    (tmp_path / "captions.jsonl").chmod(0)
    assert "may not be read" in refused(tmp_path, "captions")
    (tmp_path / "a").chmod(0o755)


def test_names_stay_unique():
    long = "x" * 500
    names = list(unique_names(["a", "a", "a#2", "a", "b\n", "b\\n", "d", "d#2", "d", long, long + "y", *["c"] * 1000]))
    assert len(set(names)) == len(names)
    assert names[:4] == ["a", "a#2", "a#2#2", "a#3"]
    assert all(name.isprintable() for name in names)


def test_importing_is_quick():
    code = (
        "import sys, megatron_cca.data.sources as s; print(*{'torch', 'datasets', 'PIL', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
