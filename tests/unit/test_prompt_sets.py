"""GenEval's prompts and PartiPrompts are their authors' files, byte for byte, and are drawn by their names."""

import hashlib
from collections import Counter

import pytest

import megatron_cca.generation.prompt_sets as sets
from megatron_cca.generation.prompts import Prompt, prompts_named

# Of the blobs in the authors' repositories, as git names them.
BLOBS = {
    "geneval/evaluation_metadata.jsonl": "efc21c7e639cd45554a1e44fac87157211f16d51",
    "geneval/LICENSE": "0f37bf7bb2898acd60102f4f28d74dfb48bb489d",
    "parti/PartiPrompts.tsv": "f96e7125a02e48976736179a667b080ba81539fb",
    "parti/LICENSE": "d645695673349e3947e8e5ae42332d0ac3164cd7",
}


@pytest.mark.parametrize("name", BLOBS)
def test_files_are_the_authors(name):
    content = (sets._FOLDER / name).read_bytes()
    blob = b"blob %d\0" % len(content) + content
    assert hashlib.sha1(blob, usedforsecurity=False).hexdigest() == BLOBS[name]


def test_genevals_prompts_are_of_six_tasks():
    prompts = sets.geneval_prompts()
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(prompt.tag for prompt in prompts) == sizes
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 553
    (placed,) = [prompt for prompt in prompts if prompt.text == "a photo of a dog right of a teddy bear"]
    assert placed.include == (sets.Objects("teddy bear", 1), sets.Objects("dog", 1, None, ("right of", 0)))
    (counted,) = [prompt for prompt in prompts if prompt.text == "a photo of two clocks"]
    assert (counted.include, counted.exclude) == ((sets.Objects("clock", 2),), (sets.Objects("clock", 3),))


def test_sets_are_drawn_by_name(tmp_path):
    parti = prompts_named("parti")
    assert len({prompt.text for prompt in parti}) == 1632
    assert parti[0] == Prompt("bond")
    assert all(prompt.text and prompt.text == prompt.text.strip() for prompt in parti)
    assert [prompt.text for prompt in prompts_named("geneval")] == [one.text for one in sets.geneval_prompts()]
    (tmp_path / "geneval").write_text("a fox\n")
    assert prompts_named(str(tmp_path / "geneval")) == [Prompt("a fox")]
