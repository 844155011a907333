"""Emu3's own lists of .pth files with codes: they come through, and no pickle does more than hold plain data."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from megatron_cca.data.sources import open_source
from megatron_cca.data.sources.emu3 import load_plain
from tests.references.sources import everything, notices, refused, write, write_all, zipped


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


def test_emu3s_unlisted_files_are_counted(tmp_path):
    write_all(tmp_path, {"feature/0.pth": b"x", "feature/1.pth": b"x"})
    write(tmp_path, "list/train.json", json.dumps({"prefix": "../feature", "path_list": ["0.pth", "./0.pth"]}))
    assert notices(tmp_path) == [
        "the list names 1 files again that it has named before; each is a sample",
        "1 of 2 .pth files that lie there are not in the list and are not read",
    ]
    packed = write(tmp_path, "train.json", zipped("x"))
    assert "it is compressed (gzip), and it needs" in refused(packed, "emu3")


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
