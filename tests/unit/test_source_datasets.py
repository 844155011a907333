"""Data sets of Hugging Face: Parquet, what datasets saved, and folders of images with metadata.

The oracle is the disk: each test writes files that it knows, and compares.
"""

import io

import pytest

from megatron_cca.data.sources import Record, SourceOptions, open_source
from tests.references.sources import LFS, A, B, everything, lines, notices, refused, rows, write, write_all, zipped


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


def test_images_that_no_metadata_names_are_counted(hf_cache, tmp_path):
    listed = "file_name,text\r\na.png,猫\r\n"
    files = {"metadata.csv": b"\xef\xbb\xbf" + listed.encode(), "a.png": A, "b.png": B, "sub/c.png": A}
    folder = write_all(tmp_path / "data", files)
    assert [record.caption for record in open_source(folder)] == ["猫"]
    assert notices(folder) == ["2 of 3 images that lie there are in no metadata and are not read"]


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
