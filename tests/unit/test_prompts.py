"""Prompts from files and classes; what is refused names file and line."""

import json

import numpy as np
import pytest

from megatron_cca.errors import UserError
from megatron_cca.generation.prompts import Prompt, class_prompts, digit_prompts, read_prompts, repeated, seeded


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
        ("p.txt", b"\xff\xfe\x00", "is not text in UTF-8"),
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
    prompts = seeded(repeated([Prompt("a"), Prompt("b", seed=5)], 2), seed=3)
    assert [prompt.seed for prompt in prompts] == [3_000_000, 3_000_001, 5, 6]
    assert [prompt.text for prompt in prompts] == ["a", "a", "b", "b"]


def test_digit_prompts_show_every_digit_in_turn():
    prompts = digit_prompts(40, seed=1)
    assert [prompt.label for prompt in prompts] == [*range(10)] * 4
    assert len({prompt.seed for prompt in prompts}) == 40
    assert len({prompt.text for prompt in prompts}) > 20
    assert prompts == digit_prompts(40, seed=1) != digit_prompts(40, seed=2)
    assert np.all([prompt.text.split()[0] in ("a", "the", *_words()) for prompt in prompts])


def _words():
    return ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
