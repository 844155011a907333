"""Emu3.5's sequence, token by token, and its authors' guidance."""

import numpy as np
import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3 import EMU3_VOCABULARY
from megatron_cca.models.emu3_5 import EMU3_5_VOCABULARY, tiny_vocabulary
from megatron_cca.models.image_vocabulary import PromptTemplate

CODES = 131_072


def test_a_small_image_by_hand():
    v = tiny_vocabulary()
    prompt = v.prompt(np.array([5, 6]), np.array([1, 2, 3]))
    image = v.image(np.array([[[7, 8, 9], [0, 1, 127]]], dtype=np.uint16))
    assert prompt.tolist() == [v.bos, 5, 6, v.bss, v.boi, 1, 2, 3, v.img]
    start = v.visual_start
    assert image.tolist() == [start + 7, start + 8, start + 9, v.eol, start, start + 1, start + 127, v.eoi]
    assert v.is_visual(image).tolist() == [True, True, True, False] * 2
    assert len(prompt) + len(image) == v.sequence_length(2, 3, 2, 3)


def test_forced_tokens_are_what_an_image_writes():
    v = tiny_vocabulary()
    image = v.image(np.zeros((1, 4, 3), dtype=int))
    mask = v.is_visual(image)
    forced = v.forced_tokens(4, 3)
    assert (forced[~mask] == image[~mask]).all()
    assert (forced[mask] == -1).all()
    assert v.forced_tokens(1, 2).tolist() == [-1, -1, v.eoi]


def test_a_clip_has_no_words():
    v = tiny_vocabulary()
    assert v.meta_text(1, 55, 73) == "55*73"
    assert v.meta_text(2, 55, 73, "{frames}") is None


def test_the_released_ids_are_the_places_in_the_authors_list():
    """Text, then tokenization_emu3.py's special tokens, then the lines of emu3_vision_tokens.txt."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    names += ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {code:06d}|>" for code in range(CODES)]
    ids = {name: 151_643 + place for place, name in enumerate(names)}
    v = EMU3_5_VOCABULARY
    assert v.size == 151_643 + len(names) == 282_926
    assert v.text_size == v.caption_size == v.pad == ids["<|endoftext|>"]
    assert (v.bss, v.eol, v.bos) == tuple(ids[f"<|extra_{number}|>"] for number in (100, 200, 203))
    assert (v.img, v.boi, v.eoi) == tuple(ids[f"<|image {name}|>"] for name in ("token", "start", "end"))
    assert v.visual_start == ids["<|visual token 000000|>"]
    image = v.image(np.full((1, 64, 64), CODES - 1, dtype=np.int32))
    assert (len(image), int(v.is_visual(image).sum())) == (64 * 65, 64 * 64)
    assert image.max() == ids["<|visual token 131071|>"] == v.size - 1
    assert v.codebook_size == CODES
    assert v.released_grid == (64, 64)
    assert tiny_vocabulary().released_grid is None


def test_the_released_prompt_is_the_authors_text():
    """As configs/example_config_t2i.py has it, between BOS and BSS."""
    template = EMU3_5_VOCABULARY.template
    whole = f"{template.before} a hat{template.after}"
    assert whole == "You are a helpful assistant for t2i task. USER: a hat ASSISTANT: "
    assert template.unconditional == "You are a helpful assistant. USER:  ASSISTANT: "
    assert template == PromptTemplate(template.before, template.after, template.unconditional)


def test_vocabularies_are_told_apart():
    fingerprints = {
        *(v.fingerprint() for v in (EMU3_VOCABULARY, EMU3_5_VOCABULARY)),
        *(tiny_vocabulary(codebook_size=size).fingerprint() for size in (64, 128)),
    }
    assert len(fingerprints) == 4


def test_the_tiny_one_is_resized_and_the_released_one_is_not():
    tiny, wide = (load_config(None, ["model.name=emu3_5-tiny", *more]) for more in ([], ["model.codebook_size=70000"]))
    assert resolve_architecture(tiny.model).vocabulary == tiny_vocabulary()
    assert resolve_architecture(wide.model).vocabulary == tiny_vocabulary(codebook_size=70_000)
    with pytest.raises(UserError, match=r"model.codebook_size: this model's vocabulary has one size, 282926"):
        resolve_architecture(load_config(None, ["model.name=emu3_5-34b", "model.codebook_size=70000"]).model)


@pytest.mark.parametrize("name", ["emu3_5-34b", "emu3_5-tiny"])
def test_heads_are_of_their_own_size_and_have_norms(name):
    found = resolve_architecture(load_config(None, [f"model.name={name}"]).model)
    assert found.kv_channels != found.usual_kv_channels
    assert found.qk_layernorm


def theirs(conditional, unconditional, scale):
    """``apply_cfg`` of src/utils/logits_processor.py with the type "no_text"."""
    conditional, unconditional = (torch.nn.functional.log_softmax(one, dim=-1) for one in (conditional, unconditional))
    return scale * (conditional - unconditional) + unconditional


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.3, "top_k": 9, "top_p": 0.9}])
def test_guidance_of_log_probabilities_draws_what_guidance_of_logits_draws(options):
    """Theirs normalises over all ids before it takes the codes; that adds one number to a row's logits."""
    from megatron_cca.generation.decode_loop import draw_codes, guided_logits

    random = torch.Generator().manual_seed(0)
    rows, ids, codes = 256, 90, slice(30, 90)
    both = [torch.randn(rows, ids, generator=random, dtype=torch.float64) * 3 for _ in range(2)]
    uniforms = torch.rand(rows, generator=random, dtype=torch.float64)
    released = 5.0
    other = theirs(*both, released)[:, codes]
    ours = guided_logits(*(one[:, codes] for one in both), released - 1)
    difference = other - ours
    assert (difference - difference[:, :1]).abs().max() < 1e-12
    assert difference[:, 0].std() > 0.1
    options = {"temperature": 1.0, **options}
    assert torch.equal(draw_codes(other, uniforms, **options), draw_codes(ours, uniforms, **options))
