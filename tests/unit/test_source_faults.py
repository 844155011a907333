"""Sources as users have them: what is not read is said, a source that is wrong as a whole is refused in one line.

The oracle is the disk: each test writes files that it knows, as other programs and systems leave them.
"""

import gzip
import io
import json

import pytest
from PIL import Image

from megatron_cca.data.sources import SourceOptions, open_source
from megatron_cca.data.sources.external_text import JsonLines
from megatron_cca.io.external_files import hub_blobs
from megatron_cca.io.file_contents import kind_of
from tests.unit.test_sources import A, B, everything, hf_cache, lines, refused, rows, tar, write, write_all

__all__ = ["hf_cache"]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def zipped(text):
    """By gzip, without the time, which would be in the name of a test."""
    return gzip.compress(text.encode(), mtime=0)


def notices(path, layout="auto", **options):
    found = open_source(path, layout, SourceOptions(**options)).notices()
    assert all(line.isprintable() for line in found)
    return found


def linked(folder, name, target):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# lines


PAIRS = [{"file_name": "a.png", "caption": "a"}, {"file_name": "b.png", "caption": "b"}]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("blank", ["", "{end}", "{end} \t{end}\v{end}"], ids=["none", "one", "white"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"], ids=["plain", "bom", "bom alone"])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 24])
def test_blank_lines_are_no_records(end, blank, mark, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.data.sources.external_text._CHUNK", chunk)
    blank = blank.format(end=end)
    content = f"{blank}{json.dumps(PAIRS[0])} {end}{blank}{json.dumps(PAIRS[1])}"
    for closing in ("", end, end + blank):
        path = write(tmp_path, "captions.jsonl", mark + (content + closing).encode())
        assert list(JsonLines(path).objects()) == PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(lines(*PAIRS)), "holds no records: it is compressed (gzip); write one JSON object a"),
        (lines(*PAIRS).encode("utf-16"), "it is text in UTF-16"),
        (lines(*PAIRS).encode("utf-16-le"), "it is text in UTF-16"),
        (json.dumps(PAIRS), "it is one JSON array"),
        (json.dumps(PAIRS, indent=1), "it is one JSON array"),
        ("file_name,caption\r\na.png,a\r\n", "it is no JSON, its first line is 'file_name,caption'"),
        ("a.png\ta\n", "it is no JSON, its first line is 'a.png\\\\ta'"),
        (A, "it is a PNG image"),
        (LFS, "it is a Git LFS pointer in place of the file (git lfs pull brings the file)"),
        ("<!DOCTYPE html><html></html>", "it is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["captions.jsonl", "train_anno_repath.jsonl"])
def test_a_list_of_another_kind_is_refused_by_name(name, content, message, tmp_path):
    write_all(tmp_path, {"a.png": A, "imgs/a.png": A, name: content})
    assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"a caption", None),
        (b"", None),
        (b"\0", None),
        (b"BMW, red", None),
        ("é".encode(), None),
        (b"PK\3\4..", "a zip archive"),
        (b"PAR1..", "a Parquet file"),
        (bytes(4) + b"ftypavif", "a HEIC or AVIF image, or a video"),
        ("ab".encode("utf-16-be"), "text in UTF-16"),
        (b" \n<html>", "a web page"),
    ],
)
def test_kinds_are_told_by_the_first_bytes(content, kind):
    assert kind_of(content) == kind


# captions


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


# links and absolute names


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


# classes


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


def test_a_folder_with_another_kind_of_list_says_what_to_write(tmp_path):
    write_all(tmp_path, {"a.png": A, "labels.csv": "file,caption\na.png,x\n"})
    assert "has no layout known here; labels.csv is not read; write captions.jsonl" in refused(tmp_path)
    assert notices(tmp_path, "captions")[-1] == "not read: 1 .csv (labels.csv)"


def test_a_file_or_an_archive_in_place_of_a_folder_says_so(tmp_path):
    listed = write(tmp_path, "captions.jsonl", lines(*PAIRS))
    assert refused(listed).endswith("it is one file; give the folder that it lies in, a tar, or a list of Emu3's")
    assert "it is a Parquet file; give the folder" in refused(write(tmp_path, "train.parquet", b"PAR1"))
    assert refused(write(tmp_path / "g", "captions.jsonl.gz", zipped("x")).parent).endswith("is packed; unpack it")
    assert refused(write(tmp_path / "z", "images.zip", b"PK\3\4").parent).endswith("images.zip is packed; unpack it")


def test_a_folder_of_kinds_that_are_not_read_says_which(tmp_path):
    write_all(tmp_path, {"a.heic": b"x", "b.AVIF": b"x", "c.avif": b"x"})
    assert refused(tmp_path, "captions").endswith("; not read: 2 .avif (b.AVIF), 1 .heic (a.heic)")


def test_a_pointer_of_git_lfs_is_no_image(tmp_path):
    write_all(tmp_path, {"a.png": LFS, "a.txt": "a"})
    assert "a.png: is a Git LFS pointer in place of the file (git lfs pull" in everything(open_source(tmp_path))[0]


def test_names_that_other_systems_and_the_network_know_say_what_they_are(tmp_path):
    names = ["sub\\a.png", "https://example.org/a.png", "s3://bucket/a.png", "a.png"]
    listed = lines(*({"file_name": name, "caption": "c"} for name in names))
    write_all(tmp_path, {"captions.jsonl": listed, "a.png": A, "sub/a.png": A})
    windows, web, bucket, good = everything(open_source(tmp_path))
    assert windows.endswith('is missing; folders are divided by "/"')
    for found in (web, bucket):
        assert found.endswith("is an address, and nothing is downloaded; download the images first")
    assert good.frames == (A,)


# webdataset


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


def test_a_file_that_is_called_a_tar(tmp_path):
    for content, kind in ((A, "a PNG image"), (b"PAR1" * 200, "a Parquet file"), (LFS, "a Git LFS pointer")):
        assert f"is no tar but {kind}" in refused(write(tmp_path, "a.tar", content))
    tar(tmp_path / "b/a.tar", [("a.heic", b"x")])
    assert "has no tar with images (jpg, jpeg, png, webp); not read: 1 .heic (a.tar/a.heic)" in refused(tmp_path / "b")


# datasets


def test_columns_of_captions_under_other_names(hf_cache, tmp_path):
    import datasets

    lists = [["a", "b"], ["c", None]]
    rows(captions=lists).save_to_disk(tmp_path / "lists")
    hint = "column 'captions' holds lists of captions; choose one of each list with --caption-of-list first or random"
    assert hint in refused(tmp_path / "lists")
    assert hint in refused(tmp_path / "lists", caption_field="captions")
    found = open_source(tmp_path / "lists", options=SourceOptions(caption_of_list="first"))
    assert [record.caption for record in found] == ["a", "c"]
    rows(sentence=["x", "y"], url=["u", "v"]).save_to_disk(tmp_path / "other")
    message = "has no column caption, text, prompt; --caption-field chooses one of sentence, url"
    assert message in refused(tmp_path / "other")
    both = rows(captions=lists, label=[1, 0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    both.save_to_disk(tmp_path / "both")
    assert open_source(tmp_path / "both")[0].caption == "dog"
    assert notices(tmp_path / "both") == ["columns of text are not read (--caption-field): captions"]
    rows().save_to_disk(tmp_path / "mute")
    assert open_source(tmp_path / "mute")[0].caption is None


def test_what_of_a_data_set_is_not_read_is_said(hf_cache, tmp_path):
    for name in ("en/train-00000-of-00001", "fr/train-00000-of-00001", "fr/test-00000-of-00001"):
        content = io.BytesIO()
        rows("a", "b").to_parquet(content)
        write(tmp_path / "d", f"{name}.parquet", content.getvalue())
    write_all(tmp_path / "d", {"README.md": "r", "more.csv": "x"})
    found = notices(tmp_path / "d")
    assert found[:2] == [
        "split train is read, test not (--split chooses)",
        "files of 2 folders are read as one data set: en, fr",
    ]
    assert "1 .csv (more.csv)" in found[2]
    rows("a", "b").save_to_disk(tmp_path / "saved/one")
    assert refused(tmp_path / "saved").endswith(f"save_to_disk wrote; give one: {tmp_path}/saved/one")
    (tmp_path / "arrow").mkdir()
    arrow = (tmp_path / "saved/one/data-00000-of-00001.arrow").read_bytes()
    write_all(tmp_path / "arrow", {"x-train.arrow": arrow, "cache-1f.arrow": arrow})
    assert len(open_source(tmp_path / "arrow")) == 2
    assert notices(tmp_path / "arrow") == ["not read: 1 .arrow (cache-1f.arrow)"]
    for content, kind in ((LFS, "a Git LFS pointer"), (zipped("x"), "compressed (gzip)"), (A, "a PNG image")):
        assert f"train.parquet is {kind}" in refused(write(tmp_path / "p", "train.parquet", content).parent)


def test_images_that_no_metadata_names_are_counted(hf_cache, tmp_path):
    listed = "file_name,text\r\na.png,猫\r\n"
    files = {"metadata.csv": b"\xef\xbb\xbf" + listed.encode(), "a.png": A, "b.png": B, "sub/c.png": A}
    folder = write_all(tmp_path / "data", files)
    assert [record.caption for record in open_source(folder)] == ["猫"]
    assert notices(folder) == ["2 of 3 images that lie there are in no metadata and are not read"]


# extracted codes


def test_journeydbs_extra_images_are_counted(tmp_path):
    listed = lines({"img_path": "000/a.jpg", "prompt": "P"})
    files = {"anno_repath.jsonl": listed, "imgs/000/a.jpg": B, "imgs/000/b.jpg": B, "imgs/001.tgz": b"x"}
    write_all(tmp_path, files)
    assert notices(tmp_path) == [
        "2 images lie in imgs, and anno_repath.jsonl has 1 lines",
        "in imgs, not read: 1 .tgz (001.tgz)",
    ]


def test_emu3s_unlisted_files_are_counted(tmp_path):
    write_all(tmp_path, {"feature/0.pth": b"x", "feature/1.pth": b"x"})
    write(tmp_path, "list/train.json", json.dumps({"prefix": "../feature", "path_list": ["0.pth", "./0.pth"]}))
    assert notices(tmp_path) == [
        "the list names 1 files again that it has named before; each is a sample",
        "1 of 2 .pth files that lie there are not in the list and are not read",
    ]
    packed = write(tmp_path, "train.json", zipped("x"))
    assert "it is compressed (gzip), and it needs" in refused(packed, "emu3")


def test_llamagens_other_files_are_counted(tmp_path):
    write_all(tmp_path, {f"a_{kind}/0.npy": b"x" for kind in ("codes", "labels")})
    write_all(tmp_path, {"b_codes/0.npy": b"x", "a_codes/00.npy": b"x"})
    assert notices(tmp_path) == [
        "b_codes has no partner (_codes and _labels) and is not read",
        "not read: 1 .npy (a_codes/00.npy)",
    ]


def test_an_image_of_any_suffix_a_camera_writes_is_met(tmp_path):
    for suffix in ("JPG", "JPEG", "Png", "WebP", "bmp", "tif", "gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{suffix}.{suffix}")
    assert len(open_source(tmp_path, "captions")) == 7
