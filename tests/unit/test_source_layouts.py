"""Which layout a folder has: found by itself, or refused with what there is and what would be right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cca.data.sources import SOURCE_LAYOUTS, open_source
from megatron_cca.data.sources.external_text import unique_names
from tests.references.sources import PAIRS, A, lines, notices, refused, tar, write, write_all, zipped


def test_what_is_not_there_or_unknown(tmp_path):
    assert "does not exist" in refused(tmp_path / "x")
    assert "does not exist" in refused(Path(f"{tmp_path}/a\0b"))
    assert "layout: 'imagenet' is unknown; choose one of auto, captions, classes" in refused(tmp_path, "imagenet")
    possible = (
        "set the layout to one of captions, classes, journeydb, webdataset, datasets, preferences, emu3, llamagen"
    )
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
