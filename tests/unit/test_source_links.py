"""Symbolic links and absolute names in sources: followed inside the folder, and outside where the user allows it."""

import io
from pathlib import Path

import pytest

from megatron_cca.data.sources import SourceOptions, open_source
from megatron_cca.io.external_files import hub_blobs
from tests.references.sources import PAIRS, A, B, everything, lines, linked, notices, refused, rows, write, write_all


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


@pytest.fixture
def pool(tmp_path):
    write_all(tmp_path / "pool", {"0.png": A, "1.png": B})
    return tmp_path / "pool"


@pytest.mark.parametrize("layout", ["captions", "classes"])
def test_images_linked_to_a_pool_are_told_once_and_read_where_it_is_allowed(layout, pool, tmp_path):
    for index in range(2):
        linked(tmp_path / "data", f"a/{index}.png", f"../../pool/{index}.png")
        write(tmp_path / "data", f"a/{index}.txt", f"number {index}")
    message = refused(tmp_path / "data", layout)
    assert "2 of 2 images are symbolic links that leave the folder, such as " in message
    assert message.endswith(f"or allow the place where they are: --allow-outside {pool}")
    found = open_source(tmp_path / "data", layout, SourceOptions(allow_outside=(pool,)))
    assert [record.frames[0] for record in found] == [A, B]
    assert not any("links" in line for line in found.notices())
    write_all(tmp_path / "data", {"a/2.png": A, "a/2.txt": "own"})
    assert notices(tmp_path / "data", layout)[-2 if layout == "classes" else -1].startswith(
        "2 of 3 images are symbolic"
    )
    assert "leaves the folder" in everything(open_source(tmp_path / "data", layout))[0]


def test_what_is_allowed_is_a_folder_and_no_more(pool, tmp_path):
    write(tmp_path, "secret.png", A)
    linked(tmp_path / "data", "0.png", "../pool/0.png")
    linked(tmp_path / "data", "1.png", "../secret.png")
    linked(tmp_path / "data", "2.png", "../pool/out.png")
    linked(pool, "out.png", "../secret.png")
    first, second, third = everything(open_source(tmp_path / "data", "captions", SourceOptions(allow_outside=(pool,))))
    assert first.frames == (A,)
    assert "leaves the folder" in second
    assert "leaves the folder" in third
    assert "allow_outside: " in refused(tmp_path / "data", "captions", allow_outside=(tmp_path / "x",))


def test_a_linked_folder_is_entered_where_it_is_allowed(pool, tmp_path):
    write(tmp_path / "data", "b/2.png", A)
    linked(tmp_path / "data", "a", "../pool")
    assert f"which is not followed; copy them there, or allow the place where they are: --allow-outside {pool}" in (
        refused(tmp_path / "data", "classes")
    )
    found = open_source(tmp_path / "data", options=SourceOptions(allow_outside=(pool,)))
    assert [(record.name, record.label) for record in found] == [("a/0.png", 0), ("a/1.png", 0), ("b/2.png", 1)]
    linked(tmp_path / "alone", "a", "../pool")
    assert "which is not followed" in refused(tmp_path / "alone")
    assert len(open_source(tmp_path / "alone", options=SourceOptions(allow_outside=(pool,)))) == 2
    linked(pool, "loop", "../pool")
    assert "is linked twice" in refused(tmp_path / "data", "classes", allow_outside=(pool,))


def test_absolute_names_outside_are_told_once(pool, tmp_path):
    paths = [str(pool / f"{index}.png") for index in range(2)]
    write(tmp_path / "data", "captions.jsonl", lines(*({"file_name": path, "caption": "c"} for path in paths)))
    message = refused(tmp_path / "data")
    assert "2 of 2 lines of" in message
    assert f"name files outside the folder, such as {paths[0]}; copy them there, or allow the place" in message
    found = open_source(tmp_path / "data", options=SourceOptions(allow_outside=(pool,)))
    assert [record.frames[0] for record in found] == [A, B]
    assert found.notices() == []
    gone = lines({"file_name": "/gone/a.png"}, {"file_name": "../a.png"})
    write(tmp_path / "data", "captions.jsonl", gone)
    assert "such as /gone/a.png; no such files are there; write their names relative to the folder" in refused(
        tmp_path / "data"
    )


def test_a_list_may_be_a_link_to_an_allowed_place(pool, tmp_path):
    write(pool, "list", lines({"file_name": "a.png", "caption": "c"}))
    write(tmp_path / "data", "a.png", A)
    linked(tmp_path / "data", "captions.jsonl", "../pool/list")
    assert f"--allow-outside {pool}" in refused(tmp_path / "data")
    assert len(open_source(tmp_path / "data", options=SourceOptions(allow_outside=(pool,)))) == 1


def snapshot(folder, files):
    """What the hub's cache makes of a repository: links into blobs, which are named by their hash."""
    for number, (name, content) in enumerate(files.items()):
        write(folder / "blobs", f"{number:040x}", content)
        depth = name.count("/")
        linked(folder / "snapshots/abc", name, f"{'../' * (depth + 2)}blobs/{number:040x}")
    return folder / "snapshots/abc"


def test_a_snapshot_in_the_hubs_cache_is_read(hf_cache, tmp_path):
    content = io.BytesIO()
    rows("a", "b").to_parquet(content)
    listed = lines({"file_name": "a.png", "text": "t"}, {"file_name": "b.png", "text": "u"})
    cases = {
        "parquet": ({"data/train-00000-of-00001.parquet": content.getvalue()}, ["a", "b"]),
        "metadata": ({"metadata.jsonl": listed, "a.png": A, "b.png": B}, ["t", "u"]),
        "captions": ({"captions.jsonl": lines(*PAIRS), "a.png": A, "b.png": B}, ["a", "b"]),
        "texts": ({"sub/a.png": A, "sub/a.txt": "s", "sub/b.png": B, "sub/b.txt": "w"}, ["s", "w"]),
        "classes": ({"cat/a.png": A, "dog/b.png": B}, ["cat", "dog"]),
    }
    for name, (files, captions) in cases.items():
        found = open_source(snapshot(tmp_path / f"hub/datasets--o--{name}", files))
        assert [(record.caption, record.frames) for record in found] == [(captions[0], (A,)), (captions[1], (B,))]
    whole = tmp_path / "hub/datasets--o--texts"
    assert refused(whole).endswith(f"give one of its snapshots: {whole}/snapshots/abc")
    assert open_source(whole / "snapshots/abc/sub")[0].caption == "s"


def test_only_blobs_of_the_same_repository_are_its_contents(tmp_path):
    folder = snapshot(tmp_path / "hub/one", {"a.png": A, "a.txt": "a"})
    write(tmp_path / "hub/two/blobs", "0" * 40, B)
    linked(folder, "b.png", "../../../two/blobs/" + "0" * 40)
    write(tmp_path, "blobs/0", B)
    linked(folder, "c.png", "../../../../blobs/0")
    assert everything(open_source(folder))[1:] == ["b.png: b.png leaves the folder", "c.png: c.png leaves the folder"]
    assert hub_blobs(tmp_path / "hub/one/snapshots") is None
    assert hub_blobs(tmp_path / "hub/one") is None


def test_what_cannot_be_walked_through_stops_no_list(tmp_path):
    """A list says which files it wants; a linked folder beside them is none of its business, and is said."""
    write_all(tmp_path, {"data/captions.jsonl": lines(PAIRS[0]), "data/a.png": A, "other/b.png": B})
    linked(tmp_path / "data", "more", "../other")
    linked(tmp_path / "data", "loop", "loop")
    assert notices(tmp_path / "data") == ["not read: 1 linked folders (more/), 1 without a suffix (loop)"]
    journey = {"anno_repath.jsonl": lines({"img_path": "a.png", "prompt": "p"}), "imgs/a.png": A}
    linked(write_all(tmp_path / "journey", journey) / "imgs", "more", "../../other")
    assert notices(tmp_path / "journey") == ["in imgs, not read: 1 linked folders (more/)"]
