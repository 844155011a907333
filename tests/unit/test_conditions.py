"""What a prompt says to a model of texts and to one of classes, and the scale of guidance in LlamaGen's terms."""

import numpy as np
import pytest
import torch

from megatron_cca.data.tokenizers import open_text_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import guided_logits
from megatron_cca.generation.prompts import (
    Prompt,
    caption_ids,
    check_conditions,
    class_prompts,
    digit_classes,
    negative_ids,
    read_class_captions,
    read_prompts,
)
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.models.llamagen import class_vocabulary

CLASSES, TEXTS = class_vocabulary(codebook_size=128, num_classes=10), tiny_vocabulary()


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_class_is_its_number_whatever_the_text():
    for prompt in (Prompt(None, label=7), Prompt("a handwritten two", label=7)):
        assert caption_ids(CLASSES, None, prompt).tolist() == [7]
    assert CLASSES.prompt(caption_ids(CLASSES, None, Prompt(None, label=7)), np.empty(0, int)).tolist() == [135]
    assert CLASSES.prompt(negative_ids(CLASSES, None, "", 1), np.empty(0, int)).tolist() == [138]


def test_texts_are_what_the_tokenizer_makes(digit_shards):
    text = open_text_tokenizer(digit_shards)
    prompt = Prompt("a handwritten two", label=7)
    assert caption_ids(TEXTS, text, prompt).tolist() == text.encode("a handwritten two")
    assert negative_ids(TEXTS, text, "the digit", 1).tolist() == text.encode("the digit")
    assert negative_ids(TEXTS, text, "", 1).tolist() == []


def test_the_wrong_kind_is_refused(digit_shards):
    text = open_text_tokenizer(digit_shards)
    only_text, only_class = Prompt("a cat"), Prompt(None, label=3)
    wanted = "prompt 'a cat': this model takes classes, not texts; give the label of one, 0 to 9"
    assert refused(caption_ids, CLASSES, None, only_text) == wanted
    wanted = "prompt 'class 3': this model takes texts, and this is a class alone; give a text with it"
    assert refused(caption_ids, TEXTS, text, only_class) == wanted
    assert refused(check_conditions, CLASSES, [Prompt(None, label=9), Prompt("x", label=10)]).endswith("0 to 9")
    assert "leave it out" in refused(negative_ids, CLASSES, None, "ugly", 1)


def test_the_digits_serve_both():
    assert [prompt.label for prompt in digit_classes()] == list(range(10))
    check_conditions(CLASSES, digit_classes())
    check_conditions(TEXTS, digit_classes())


def test_a_label_alone_is_a_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"label": 207}\n{"label": 3, "prompt": "three", "seed": 1}\n')
    assert read_prompts(file) == [Prompt(None, label=207), Prompt("three", 1, 3)]
    assert [prompt.title for prompt in read_prompts(file)] == ["class 207", "three"]
    file.write_text('{"label": null}\n')
    assert 'needs a "prompt" that is a text' in refused(read_prompts, file)


def test_classes_without_names_go_by_number():
    assert class_prompts([None] * 3, ["2"]) == [Prompt(None, label=2)]
    assert class_prompts([None] * 3, ["all"]) == [Prompt(None, label=label) for label in range(3)]
    wanted = "'3' is no class; there are 3: 0 to 2; --class-captions gives them names"
    assert refused(class_prompts, [None] * 3, ["3"]) == wanted


def test_names_of_classes(tmp_path):
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 white shark\n")
    assert read_class_captions(file, 3) == ["tench", "goldfish", "white shark"]
    assert refused(read_class_captions, file, 1000) == f"{file} names 3 classes, the model has 1000"
    file.write_text("tench, a fish\ngoldfish\n")
    assert read_class_captions(file) == ["tench, a fish", "goldfish"]
    file.write_text("tench, a fish\nn01443537 goldfish\n")
    assert "'tench, a fish' is not like the other lines" in refused(read_class_captions, file)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 2.0, 4.0])
def test_guidance_in_llamagens_own_terms(cfg_scale):
    """Its ``generate.py`` has uncond + (cond - uncond) * cfg_scale: our scale is one less."""
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 64, 128, generator=generator, dtype=torch.float64)
    theirs = unconditional + (conditional - unconditional) * cfg_scale
    torch.testing.assert_close(guided_logits(conditional, unconditional, cfg_scale - 1), theirs, rtol=0, atol=1e-12)
