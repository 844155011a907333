"""Lists of one JSON object a line: blank lines, chunks, and files of another kind, which are named."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cca.data.sources import Record, open_source
from megatron_cca.data.sources.external_text import JsonLines
from megatron_cca.errors import UserError
from megatron_cca.io.file_contents import kind_of
from tests.references.sources import LFS, PAIRS, SCRIPTS, A, everything, lines, refused, write, write_all, zipped


@pytest.mark.parametrize("chunk", [1, 2, 7, 50])
def test_lines_across_chunks(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cca.data.sources.external_text._CHUNK", chunk)
    write_all(tmp_path, {"captions.jsonl": lines(*({"file_name": "a.png", "caption": c} for c in SCRIPTS)), "a.png": A})
    assert [record.caption for record in open_source(tmp_path)] == SCRIPTS


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


def test_a_line_number_counts_empty_lines(tmp_path):
    write(tmp_path, "captions.jsonl", "\n\n{\n")
    assert everything(open_source(tmp_path)) == ["captions.jsonl:3: the line is not valid JSON"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_list_is_refused(content, tmp_path):
    write(tmp_path, "captions.jsonl", content)
    assert "holds no records" in refused(tmp_path)


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
