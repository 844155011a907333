"""Prompts from files and classes; what is refused names file and line."""

import gzip
import json
import re

import numpy as np
import pytest

from megatron_cca.errors import UserError
from megatron_cca.generation.prompts import (
    Prompt,
    RepeatedPrompts,
    class_prompts,
    digit_prompts,
    read_class_captions,
    read_prompts,
    seeded,
)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\n  sept, à la main \n", encoding="utf-8")
    assert read_prompts(file) == [Prompt("a red fox"), Prompt("sept, à la main")]


def test_json_lines_may_bring_label_and_seed(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "label": 3, "seed": 7, "more": 1}\n{"prompt": ""}\n')
    assert read_prompts(file) == [Prompt("a", 7, 3), Prompt("")]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_byte_order_marks_and_other_separators_are_no_lines(name, tmp_path):
    texts = ["a\u2028b\x85c", "d"]
    lines = texts if name == "p.txt" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / name).write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"{}", 'line 1: needs a "prompt" that is a text'),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 4}', 'line 2: needs a "prompt" that is a text'),
        ("p.jsonl", b"a red fox", "line 1: is not a JSON object"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}', "line 1: seed: must be a whole number of 0 or more, found -1"),
        (
            "p.jsonl",
            b'{"prompt": "a", "label": true}',
            "line 1: label: must be a whole number of 0 or more, found True",
        ),
        ("p.txt", b"\n \n", "holds no prompt; give one a line"),
        ("p.txt", b"\xff\xfe\x00", "is not text in UTF-8: it is text in UTF-16"),
        ("p.txt", "a fox".encode("utf-16-le"), "is not text in UTF-8: it is text in UTF-16"),
        ("p.txt", b"a fox\0\n", "is not text in UTF-8: it is no text, it has zero bytes"),
        ("p.txt", gzip.compress(b"a fox", mtime=0), "is not text in UTF-8: it is compressed (gzip)"),
        ("p.jsonl", b"\x89PNG\r\n\x1a\n", "is not text in UTF-8: it is a PNG image"),
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\n", "is not text in UTF-8: it is a Git LFS pointer"),
        ("p.csv", b"prompt,seed\na fox,1\n", "is a table; write a prompt a line (.txt), or JSON lines such as"),
        ("p.TSV", b"prompt\tseed\n", "is a table"),
        ("p.txt", b'{"prompt": "a fox"}\n\n{"prompt": "b"}\n', "holds JSON lines; name it .jsonl"),
        ("p.txt", b'["a fox",\n "b"]', "is one JSON array"),
        ("p.json", b'[{"prompt": "a fox"}]', "is one JSON array"),
        ("p.jsonl", b'[\n{"prompt": "a fox"}\n]', "is one JSON array"),
        ("p.json", b'{\n "prompt": "a fox"\n}', "is one JSON object over several lines"),
        ("p.txt", b"", "holds no prompt; give one a line"),
    ],
)
def test_bad_files_are_refused(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(file)
    assert str(error.value).startswith(f"{file}: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file or directory; give a text file or JSON lines"):
        read_prompts(tmp_path / "nowhere.txt")


def test_classes_go_by_name_number_or_all():
    captions = ["a fox", "a cat", "a dog"]
    assert class_prompts(captions, ["a dog", "0"]) == [Prompt("a dog", label=2), Prompt("a fox", label=0)]
    assert [prompt.label for prompt in class_prompts(captions, ["all"])] == [0, 1, 2]
    with pytest.raises(UserError) as error:
        class_prompts(captions, ["a cow"])
    assert str(error.value) == "'a cow' is no class; there are 3: 0 to 2, or by name a fox, a cat, a dog"
    with pytest.raises(UserError, match="'3' is no class"):
        class_prompts(captions, ["3"])


def test_seeds_follow_from_the_place_and_repetitions_have_their_own():
    prompts = RepeatedPrompts([Prompt("a"), Prompt("b", seed=5)], 2, seed=3)
    assert [prompt.seed for prompt in prompts] == [3_000_000, 3_000_001, 5, 6]
    assert [prompt.text for prompt in prompts] == ["a", "a", "b", "b"]
    assert (len(prompts), prompts[-1], list(prompts)[3]) == (4, Prompt("b", 6), Prompt("b", 6))
    assert seeded([Prompt("a"), Prompt("b", seed=5)], 3) == [Prompt("a", 3_000_000), Prompt("b", 5)]
    with pytest.raises(IndexError):
        prompts[4]


def test_no_image_of_a_large_run_has_the_seed_of_another_run():
    """Neither of its own images do: the seeds are a function of run and place that can be inverted."""
    places = [0, 1, 999_999, 1_000_000, 1_000_001, 1_999_999, 2_000_000, 2**40]
    lists = {run: RepeatedPrompts([Prompt("a")], 2**41, seed=run) for run in (0, 1, 2, 2**63 - 1)}
    seeds = [prompts[place].seed for prompts in lists.values() for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(np.random.default_rng(seed) for seed in seeds)


def test_digit_prompts_show_every_digit_in_turn():
    prompts = digit_prompts(40, seed=1)
    assert [prompt.label for prompt in prompts] == [*range(10)] * 4
    assert len({prompt.seed for prompt in prompts}) == 40
    assert len({prompt.text for prompt in prompts}) > 20
    assert prompts == digit_prompts(40, seed=1) != digit_prompts(40, seed=2)
    assert np.all([prompt.text.split()[0] in ("a", "the", *_words()) for prompt in prompts])


def _words():
    return ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_what_looks_like_json_alone_may_be_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("[red] fox\n{a} cat\n# of a kind\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["[red] fox", "{a} cat", "# of a kind"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["p.txt", "p.JSONL"])
def test_any_line_end_ends_a_line(name, end, tmp_path):
    texts = ["a fox", "b "]
    lines = texts if name == "p.txt" else [json.dumps({"prompt": text}) for text in texts]
    for closing in ("", end, end + " " + end):
        (tmp_path / name).write_bytes((end + end.join(lines) + closing).encode())
        assert [prompt.text.strip() for prompt in read_prompts(tmp_path / name)] == ["a fox", "b"]


def test_a_folder_of_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="Is a directory; give a text file or JSON lines"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "n01440764 tench\nn01443537 goldfish, Carassius\nthe ray\n", "'the ray' is not like the other lines"),
        ("c.jsonl", '{"prompt": "b", "label": 1}\n{"prompt": "a", "label": 0}\n', "name 0 has the label 1; put the"),
        ("c.txt", "a\n# b\nc\n", "names 3 classes, the model has 2"),
    ],
)
def test_names_of_classes_that_would_shift_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_class_captions(tmp_path / name, 2 if "names 3" in message else None)
    (tmp_path / "good.txt").write_bytes("\ufeffn01440764 tench, Tinca\r\n\r\nn01443537 goldfish\r\n".encode())
    assert read_class_captions(tmp_path / "good.txt", 2) == ["tench", "goldfish"]
