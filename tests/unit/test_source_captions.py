"""Images with captions in a list or in texts beside them: all come through, what cannot be read is said.

The oracle is the disk: each test writes files that it knows, and compares.
"""

import json
import os

import pytest
from PIL import Image

from megatron_cca.data.sources import Record, SourceOptions, open_source
from tests.references.sources import (
    LFS,
    PAIRS,
    SCRIPTS,
    A,
    B,
    C,
    everything,
    lines,
    notices,
    refused,
    tar,
    write,
    write_all,
)


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


def test_a_caption_field(tmp_path):
    write_all(tmp_path, {"captions.jsonl": lines({"file_name": "a.png", "long": "L", "caption": "c"}), "a.png": A})
    long = open_source(tmp_path, options=SourceOptions(caption_field="long"))
    assert long[0].caption == "L"
    assert long.fingerprint() != open_source(tmp_path).fingerprint()
    assert "caption_field: no line of" in refused(tmp_path, caption_field="lnog")


def test_a_list_of_captions_is_chosen_from_or_told(tmp_path):
    texts = ["a", None, " b ", "c"]
    folder = write_all(tmp_path, {"captions.jsonl": lines({"file_name": "a.png", "caption": texts}), "a.png": A})
    assert everything(open_source(folder)) == [
        "a.png: caption must be a string, found a list of 4; choose one of each list with --caption-of-list first or "
        "random"
    ]
    first, random = (open_source(folder, options=SourceOptions(caption_of_list=how)) for how in ("first", "random"))
    assert first[0].caption == "a"
    assert random[0].caption in "abc"
    assert len({source.fingerprint() for source in (first, random, open_source(folder))}) == 3
    many = write_all(tmp_path / "many", {"captions.jsonl": lines(*[{"file_name": "a.png", "caption": texts}] * 60)})
    write(many, "a.png", A)
    counts = [record.caption for record in open_source(many, options=SourceOptions(caption_of_list="random"))]
    assert set(counts) == {"a", "b", "c"}
    assert counts == [record.caption for record in open_source(many, options=SourceOptions(caption_of_list="random"))]
    write(folder, "captions.jsonl", lines({"file_name": "a.png", "caption": ["a", 3]}))
    mixed = everything(open_source(folder, options=SourceOptions(caption_of_list="first")))
    assert mixed == ["a.png: a caption of the list must be a string, found a number"]
    assert "caption_of_list: 'last' is unknown; choose first or random" in refused(folder, caption_of_list="last")
    packed = tar(tmp_path / "tars/a.tar", [("a.png", A), ("a.json", json.dumps({"text": texts}))])
    assert open_source(packed, options=SourceOptions(caption_of_list="first"))[0].caption == "a"


def test_an_absolute_name_inside_the_folder_is_read(tmp_path):
    write_all(tmp_path, {"captions.jsonl": lines({"file_name": f"{tmp_path}/a.png"}), "a.png": A})
    assert everything(open_source(tmp_path))[0].frames == (A,)


def test_names_that_other_systems_and_the_network_know_say_what_they_are(tmp_path):
    names = ["sub\\a.png", "https://example.org/a.png", "s3://bucket/a.png", "a.png"]
    listed = lines(*({"file_name": name, "caption": "c"} for name in names))
    write_all(tmp_path, {"captions.jsonl": listed, "a.png": A, "sub/a.png": A})
    windows, web, bucket, good = everything(open_source(tmp_path))
    assert windows.endswith('is missing; folders are divided by "/"')
    for found in (web, bucket):
        assert found.endswith("is an address, and nothing is downloaded; download the images first")
    assert good.frames == (A,)


def test_a_clip_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.data.sources.captions.MAX_IMAGE_BYTES", 2 * len(A) + 1)
    clips = ({"frames": ["a.png"] * count} for count in (2, 3))
    two, three = everything(open_source(write_all(tmp_path, {"captions.jsonl": lines(*clips), "a.png": A})))
    assert two.frames == (A, A)
    assert three == f"a.png#2: a.png: has {len(A)} bytes, at most 1 are read"


def test_what_a_list_does_not_name_is_counted(tmp_path):
    listed = [*PAIRS, PAIRS[0], {"frames": ["./c.png", "sub/d.png"], "caption": "c"}]
    write_all(tmp_path, {"captions.jsonl": lines(*listed), "sub/d.png": A, "sub/e.heic": b"x", ".cache/f": b""})
    assert notices(tmp_path) == [
        "captions.jsonl names 1 images again that it has named before; each line is a sample",
        "not read: 1 .heic (sub/e.heic)",
    ]
    write_all(tmp_path, {"a.png": A, "sub/x.PNG": A, "._a.png": b"x", "Thumbs.db": b"x", ".thumbs/a.png": A})
    assert notices(tmp_path)[1:] == [
        "1 of 3 images that lie there are not in captions.jsonl and are not read",
        "not read: 2 hidden (._a.png), 1 .db (Thumbs.db), 1 .heic (sub/e.heic)",
    ]


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


def test_texts_and_images_without_each_other_are_counted(tmp_path):
    write_all(tmp_path, {"a.png": A, "a.txt": "a\r\n", "b.JPEG": B, "c.webp": A, "gone.txt": "g", "README": "r"})
    assert notices(tmp_path) == [
        "2 of 3 images have no text (.txt) beside them",
        "not read: 1 without a suffix (README)",
        "1 texts have no image beside them (gone.txt)",
    ]
    write_all(tmp_path, {"b.TXT": "b", "c.caption": "c", "c.txt": "C", "a.jpg": B})
    assert [record.caption for record in open_source(tmp_path)] == ["a", "a", "b", "C"]
    assert {
        "1 images share the text of another one whose name differs in its suffix alone",
        "1 texts are second ones of an image; of several the first of .txt, .caption is read",
    } <= set(notices(tmp_path))
    mute = write_all(tmp_path / "mute", {"a.png": A})
    assert notices(mute, "captions") == ["none of 1 images has a text (.txt) beside it, and there is no captions.jsonl"]


def test_a_pointer_of_git_lfs_is_no_image(tmp_path):
    write_all(tmp_path, {"a.png": LFS, "a.txt": "a"})
    assert "a.png: is a Git LFS pointer in place of the file (git lfs pull" in everything(open_source(tmp_path))[0]


def test_an_image_of_any_suffix_a_camera_writes_is_met(tmp_path):
    for suffix in ("JPG", "JPEG", "Png", "WebP", "bmp", "tif", "gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{suffix}.{suffix}")
    assert len(open_source(tmp_path, "captions")) == 7
