"""What is exported for stock engines, and the grammar that they are held to: codes as the sampler here draws them."""

import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_cca.checkpoint.huggingface import export_checkpoint
from megatron_cca.data.tokenizers import text_tokenizer_of, train_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models import FAMILIES as ALL_FAMILIES
from megatron_cca.models import resolve_architecture
from megatron_cca.models.stock_llama import image_grammar, stock_config
from tests.families import FAMILIES
from tests.references.huggingface import assert_same_bits

SERVING = Path(__file__).resolve().parents[2] / "examples/serving"
SERVED = {"emu3": "LlamaForCausalLM", "emu3_5": "Qwen3ForCausalLM"}
PRESETS = [preset for name in SERVED for preset in ALL_FAMILIES[name].presets.values()]


@pytest.fixture(scope="module")
def serving():
    sys.path.insert(0, str(SERVING))
    import image_grammar

    yield image_grammar
    sys.path.remove(str(SERVING))


@pytest.fixture
def served(made, tmp_path):
    """By family: the folder of an export."""

    def export(family):
        folder = made[family, FAMILIES[family].first_form].folder
        return export_checkpoint(folder / "policy", tmp_path / family, form="llama", progress_bar=False)

    return export


def grammar_of(serving, vocabulary):
    return serving.ImageGrammar(**json.loads(json.dumps(image_grammar(vocabulary))))


@pytest.mark.parametrize("family", SERVED)
def test_stock_transformers_draw_the_oracles_codes(serving, served, made, family):
    from transformers import AutoModelForCausalLM

    folder = served(family)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == SERVED[family]
    assert not any(found.values()), found
    answers = torch.load(made[family, FAMILIES[family].first_form].folder / "answers.pt", weights_only=False)
    grammar, (height, width) = serving.ImageGrammar.of(folder), answers["grid"]
    vocabulary = FAMILIES[family].architecture.vocabulary
    for prompt, wanted in zip(answers["prompts"], answers["greedy"][0.0], strict=True):
        ids = model.generate(
            torch.from_numpy(prompt)[None],
            logits_processor=[serving.ForTransformers(grammar, len(prompt), height, width)],
            max_new_tokens=grammar.length(height, width),
            do_sample=False,
        )[0, len(prompt) :].tolist()
        assert ids == vocabulary.image(np.array(wanted).reshape(1, height, width)).tolist()
        assert np.concatenate(grammar.codes(ids, height, width)).tolist() == wanted


@pytest.mark.parametrize("family", SERVED)
def test_the_tensors_are_those_that_were_imported(served, made, family):
    public = made[family, FAMILIES[family].first_form].policy
    assert_same_bits(load_file(served(family) / "model.safetensors"), load_file(public / "model.safetensors"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: str(preset.vocabulary.size))
def test_nothing_is_left_to_a_class_s_defaults(preset):
    from transformers import AutoConfig

    config = stock_config(preset, "bfloat16")
    read = AutoConfig.for_model(**config)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": preset.rotary_base}
    assert (read.head_dim, read.rms_norm_eps) == (preset.kv_channels, preset.layernorm_epsilon)
    assert (read.vocab_size, read.tie_word_embeddings) == (preset.vocabulary.size, False)
    assert (read.num_hidden_layers, read.num_key_value_heads) == (preset.num_layers, preset.num_query_groups)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: str(preset.vocabulary.size))
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1), (1, 4)])
def test_the_grammar_is_the_vocabularys(serving, preset, grid):
    grammar, wanted = grammar_of(serving, preset.vocabulary), preset.vocabulary.forced_tokens(*grid)
    assert grammar.length(*grid) == len(wanted)
    for step, forced in enumerate(wanted):
        allowed = grammar.allowed(step, *grid)
        assert allowed == (preset.vocabulary.visual_ids if forced < 0 else range(forced, forced + 1))
    assert grammar.allowed(len(wanted) + 3, *grid) == range(wanted[-1], wanted[-1] + 1)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: str(preset.vocabulary.size))
def test_prompts_are_those_of_training(serving, preset):
    text = text_tokenizer_of(train_tokenizer(["a cat", "t2i: You are a helpful assistant > USER", "12*7"] * 9, 90))
    vocabulary = preset.vocabulary
    caption = text.encode_caption("a cat", vocabulary.template)
    meta = np.array(text.encode(vocabulary.meta_text(1, 12, 7)), dtype=np.int64)
    found = grammar_of(serving, vocabulary).prompt_ids(text.encode, "a cat", 12, 7)
    assert found == vocabulary.prompt(np.array(caption), meta).tolist()


Params = namedtuple("Params", ["extra_args"])
Update = namedtuple("Update", ["removed", "added", "moved"])
Direction = namedtuple("Direction", ["name"])
ONE_WAY, SWAP = Direction("UNIDIRECTIONAL"), Direction("SWAP")


@pytest.fixture
def in_vllm(serving, served):
    """The processor, and the model's vocabulary."""
    config = namedtuple("Config", ["model_config"])(namedtuple("Model", ["model"])(str(served("emu3"))))
    return serving.ForVLLM(config, torch.device("cpu"), False), FAMILIES["emu3"].architecture.vocabulary


def open_ids(processor, vocabulary, rows):
    found = processor.apply(torch.zeros(rows, vocabulary.size))
    return [row.isfinite().nonzero().flatten().tolist() for row in found]


def test_vllms_requests_come_grow_swap_and_leave(in_vllm):
    processor, vocabulary = in_vllm
    everything, codes = list(range(vocabulary.size)), list(vocabulary.visual_ids)
    image, text = Params({"height": 2, "width": 2}), Params(None)
    first, second = [], [5, 5]
    processor.update_state(Update([], [(0, image, [1], first), (1, text, [1], []), (2, image, [1], second)], []))
    assert open_ids(processor, vocabulary, 3) == [codes, everything, [vocabulary.eol]]
    # vLLM writes into the lists that it gave.
    first.extend([7, 7])
    second.append(vocabulary.eol)
    processor.update_state(None)
    assert open_ids(processor, vocabulary, 3) == [[vocabulary.eol], everything, codes]
    processor.update_state(Update([], [], [(0, 1, SWAP)]))
    assert open_ids(processor, vocabulary, 3) == [everything, [vocabulary.eol], codes]
    processor.update_state(Update([1], [], [(2, 1, ONE_WAY)]))
    assert open_ids(processor, vocabulary, 2) == [everything, codes]
    processor.update_state(Update([], [(1, text, [1], [])], []))
    assert open_ids(processor, vocabulary, 2) == [everything, everything]


@pytest.mark.parametrize("arguments", [{"height": 2}, {"height": 0, "width": 2}, {"height": "2", "width": 2}])
def test_vllm_refuses_half_a_grid(serving, arguments):
    with pytest.raises(ValueError, match="height, width: must be positive numbers of codes, found"):
        serving.ForVLLM.validate_params(Params(arguments))


def test_sglangs_rows_are_held_to_their_own_places(serving, served):
    vocabulary = FAMILIES["emu3"].architecture.vocabulary
    folder, request = str(served("emu3")), namedtuple("Request", ["output_ids"])
    own = {"grammar": folder, "height": 2, "width": 2}
    parameters = [{**own, "__req__": request([])}, None, {**own, "__req__": request([5, 5])}]
    found = serving.ForSGLang()(torch.zeros(3, vocabulary.size), parameters)
    rows = [row.isfinite().nonzero().flatten().tolist() for row in found]
    assert rows == [list(vocabulary.visual_ids), list(range(vocabulary.size)), [vocabulary.eol]]


def test_other_families_have_no_such_form(made, tmp_path):
    for family, message in (("janus", "janus-tiny has no llama form"), ("llamagen", "means nothing to llamagen-tiny")):
        folder = made[family, FAMILIES[family].first_form].folder
        with pytest.raises(UserError, match=message):
            export_checkpoint(folder / "policy", tmp_path / family, form="llama", progress_bar=False)
        assert not (tmp_path / family).exists()


def test_ids_of_unknown_meaning_are_not_served():
    from megatron_cca.config import ModelConfig

    architecture = resolve_architecture(ModelConfig(name="emu3-8b", vocab_size=5000))
    with pytest.raises(UserError, match="the meaning of its 5000 token ids is not known here"):
        stock_config(architecture, "float32")
