"""Janus-Pro's folders in both forms: in and out bit for bit, what travels along, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import (
    compare_tensors,
    export_checkpoint,
    import_checkpoint,
    open_both,
)
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture, weights_folder
from megatron_cca.models.janus import PRESETS
from megatron_cca.models.janus.weights import JanusHuggingFace
from tests.references.huggingface import (
    assert_same_bits,
    convert,
    edit_config,
    edit_tensors,
    load_tensors,
    refused,
    save_emu3,
)
from tests.references.janus import CODES, FORMS, HIDDEN, WORDS, authors_config, save_janus

TEXT_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
}


def pickled(folder):
    """Every tensor of every .bin."""
    return {name: tensor for path in folder.glob("*.bin") for name, tensor in torch.load(path).items()}


def imported(hf, folder, **options):
    return import_checkpoint(hf, folder / "megatron", progress_bar=False, **options)


def architecture_of(checkpoint):
    return resolve_architecture(config_from_dict(layout.read_summary(checkpoint, "")["config"]).model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS[:2])
def test_there_and_back_is_bit_for_bit(form, dtype, tmp_path):
    hf = save_janus(tmp_path / "hf", form, dtype=dtype)
    back = convert(hf, tmp_path)
    assert_same_bits(load_tensors(back), load_tensors(hf))
    for path in hf.iterdir():
        if path.suffix != ".safetensors":
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    assert compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False).identical


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_come_back_as_safetensors(shards, tmp_path):
    hf = save_janus(tmp_path / "hf", "original, pickled", dtype=torch.bfloat16, shards=shards)
    assert len(list(hf.glob("*.bin"))) == shards
    back = convert(hf, tmp_path)
    assert_same_bits(load_tensors(back), pickled(hf))
    assert not list(back.glob("*.bin*"))
    assert compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False).identical


def test_a_pickle_that_is_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_folder, "MAPPED_BYTES", 2**22)
    tensors = {f"{number}": torch.randn(2**21) for number in range(16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    folder = weights_folder.open_weights(tmp_path, None)
    before = mapped_bytes()
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name, 0, 2**21), tensor)
        assert mapped_bytes() - before < 2**25
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2**27


def mapped_bytes():
    """Bytes of files in the resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def test_safetensors_are_read_where_a_folder_has_both(tmp_path):
    hf = save_janus(tmp_path / "hf", "original")
    (hf / "pytorch_model.bin").write_bytes(b"damaged")
    assert_same_bits(load_tensors(convert(hf, tmp_path)), load_tensors(hf))


def test_half_precision_is_widened_and_the_other_networks_stay(tmp_path):
    hf = save_janus(tmp_path / "hf", "original, pickled", dtype=torch.float16)
    assert (
        "is in torch.float16; models here are in float32 or bfloat16; megatron-cca convert import --dtype"
        in refused(hf, tmp_path)
    )
    imported(hf, tmp_path, dtype="fp32")
    back = load_tensors(export_checkpoint(tmp_path / "megatron", tmp_path / "back", progress_bar=False))
    others = ("vision_model.", "aligner.", "gen_vision_model.", "language_model.lm_head.")
    for name, tensor in pickled(hf).items():
        wanted = tensor if name.startswith(others) else tensor.float()
        assert back[name].dtype == wanted.dtype and torch.equal(back[name], wanted), name
    assert {name for name in back if back[name].dtype == torch.float16}


def test_megatron_has_every_tensor_where_it_belongs(tmp_path):
    hf = save_janus(tmp_path / "hf", "original")
    stored, theirs = StoredTensors(imported(hf, tmp_path), ""), load_tensors(hf)
    rows = {
        "embedding.word_embeddings.weight": ("language_model.model.embed_tokens.weight", 384),
        "embedding.image_embeddings": ("gen_embed.weight", CODES),
        "embedding.image_fc1_weight": ("gen_aligner.layers.0.weight", HIDDEN),
        "embedding.image_fc1_bias": ("gen_aligner.layers.0.bias", HIDDEN),
        "embedding.image_fc2_weight": ("gen_aligner.layers.2.weight", HIDDEN),
        "embedding.image_fc2_bias": ("gen_aligner.layers.2.bias", HIDDEN),
        "decoder.final_layernorm.weight": ("language_model.model.norm.weight", HIDDEN),
        "image_head.fc_weight": ("gen_head.output_mlp_projector.weight", HIDDEN),
        "image_head.fc_bias": ("gen_head.output_mlp_projector.bias", HIDDEN),
        "output_layer.weight": ("gen_head.vision_head.weight", CODES),
        "output_layer.bias": ("gen_head.vision_head.bias", CODES),
    }
    for key, (name, count) in rows.items():
        wanted = theirs[name]
        assert stored.shape(key) == (count, *wanted.shape[1:]), key
        assert torch.equal(stored.read(key, None, 0, len(wanted)), wanted), key
        assert not stored.read(key, None, len(wanted), count).any(), key
    layers = sorted(key for key in stored.names() if key.startswith("decoder.layers.") and "_extra_state" not in key)
    assert len(layers) == 6
    others = {key for key in stored.names() if not key.startswith("decoder.layers.") and "_extra_state" not in key}
    assert others == rows.keys()


@pytest.mark.parametrize("form", FORMS[:2])
def test_sizes_come_from_the_configuration(form, tmp_path):
    sizes = {
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 77,
        "rms_norm_eps": 3e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    }
    hf = save_janus(tmp_path / "hf", form, **sizes)
    found = architecture_of(imported(hf, tmp_path))
    assert (found.vocabulary.size, found.num_words, found.vocabulary.output_size) == (WORDS + CODES, WORDS, CODES)
    assert (found.hidden_size, found.ffn_hidden_size, found.num_layers) == (HIDDEN, 80, 3)
    assert (found.num_attention_heads, found.num_query_groups, found.max_position_embeddings) == (8, 2, 77)
    assert (found.layernorm_epsilon, found.rotary_base, found.image_embedding_channels) == (3e-4, 12345.0, 8)
    back = export_checkpoint(tmp_path / "megatron", tmp_path / "back", progress_bar=False)
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "language"),
    [("janus-pro-1b", TEXT_SIZES), ("janus-pro-7b", {"num_hidden_layers": 30})],
    ids=["1b", "7b"],
)
def test_the_released_configurations_are_the_presets(name, language):
    """The larger one's leaves out what a Llama has by itself."""
    hidden = language.get("hidden_size", 4096)
    config = authors_config("bfloat16", hidden_size=hidden)
    config["language_config"] = language | {"max_position_embeddings": 16384, "vocab_size": 102400}
    for section in ("gen_vision_config", "gen_head_config"):
        config[section]["params"]["image_token_size"] = 16384
    found = JanusHuggingFace().read_model_config(config)
    assert found.name == name
    assert resolve_architecture(found) == PRESETS[name]


@pytest.mark.parametrize("has_head", [True, False])
def test_a_head_that_is_the_table_of_words_may_be_left_out(has_head, tmp_path):
    hf = save_janus(tmp_path / "hf", tied=True)
    tensors = load_tensors(hf)
    assert "lm_head.weight" not in tensors
    if has_head:
        edit_tensors(hf, lambda found: found.update({"lm_head.weight": torch.randn(WORDS, HIDDEN)}))
    assert_same_bits(load_tensors(convert(hf, tmp_path)), load_tensors(hf))


def test_what_comes_back_loads_with_from_pretrained_at_once(tmp_path):
    from transformers import JanusForConditionalGeneration

    hf = save_janus(tmp_path / "hf", dtype=torch.bfloat16)
    back = convert(hf, tmp_path)
    model, info = JanusForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = {name: tensor for name, tensor in model.state_dict().items() if name in load_tensors(hf)}
    assert_same_bits(state, load_tensors(hf))


def test_another_form_needs_a_template_in_that_form(tmp_path):
    one = save_janus(tmp_path / "one", "transformers")
    other = save_janus(tmp_path / "other", "original, pickled", seed=1)
    imported(one, tmp_path)
    with pytest.raises(UserError, match=r"--format original: the words' head, .* are missing; give .*--hf-template"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", form="original", progress_bar=False)
    back = export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", form="original", template=other, progress_bar=False
    )
    mine = load_tensors(save_janus(tmp_path / "mine", "original"))
    travelled = ("vision_model.", "aligner.", "gen_vision_model.", "language_model.lm_head.")
    wanted = {name: pickled(other)[name] if name.startswith(travelled) else mine[name] for name in mine}
    assert_same_bits(load_tensors(back), wanted)
    assert json.loads((back / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def test_a_template_without_its_other_networks_is_refused(tmp_path):
    imported(save_janus(tmp_path / "hf", "transformers"), tmp_path)
    template = save_janus(tmp_path / "template", "original")
    (template / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"tensor aligner\.\S* \(and \d more\) is neither in the checkpoint nor in"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", form="original", template=template)
    assert not (tmp_path / "out").exists()


def test_a_template_of_another_size_is_refused(tmp_path):
    imported(save_janus(tmp_path / "hf", "transformers"), tmp_path)
    template = tmp_path / "template"
    template.mkdir()
    (template / "config.json").write_text(json.dumps(authors_config(hidden_size=32)))
    with pytest.raises(UserError, match="the template has 32 channels, the checkpoint 64; give one of the same size"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", form="original", template=template)


def test_a_template_of_another_family_is_refused(tmp_path):
    imported(save_janus(tmp_path / "hf", "transformers"), tmp_path)
    template = save_emu3(tmp_path / "template", "transformers")
    with pytest.raises(UserError, match="is of another family than the checkpoint"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", template=template, progress_bar=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gen_head.vision_head.bias", "lacks tensor gen_head.vision_head.bias"),
        ("language_model.lm_head.weight", "lacks tensor language_model.lm_head.weight"),
        ("vision_model.", "lacks tensor vision_model.*"),
        ("gen_vision_model.", "lacks tensor gen_vision_model.*"),
    ],
)
def test_what_is_missing_is_named(name, message, tmp_path):
    hf = save_janus(tmp_path / "hf", "original")
    edit_tensors(hf, lambda found: [found.pop(one) for one in list(found) if one.startswith(name)])
    assert refused(hf, tmp_path) == f"--hf: {hf} {message}"


@pytest.mark.parametrize("name", ["model.vqmodel.quant_conv.bias", "model.vision_model.post_layernorm.weight"])
def test_the_other_networks_are_checked_by_transformers_shapes(name, tmp_path):
    hf = save_janus(tmp_path / "hf")
    edit_tensors(hf, lambda found: found.update({name: found[name][1:].clone()}))
    assert f"tensor {name} in" in refused(hf, tmp_path)
    edit_tensors(hf, lambda found: found.pop(name))
    assert refused(hf, tmp_path) == f"--hf: {hf} lacks tensor {name}"
    edit_tensors(hf, lambda found: found.update({f"{name}2": torch.zeros(1), name: torch.zeros(1)}))
    assert name in refused(hf, tmp_path)


def edited(config, key, value):
    """Set the value at a dotted key, or remove the key."""
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    config.pop(last, None)
    if value is not None:
        config[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gen_vision_config", None, "gen_vision_config.params.image_token_size: is missing; this is no Janus-Pro"),
        ("gen_vision_config.params.n_embed", 16, "n_embed: 16 is not what Janus-Pro has, 8"),
        ("gen_vision_config.cls", "MoVQ", "gen_vision_config.cls: 'MoVQ' is not what Janus-Pro has, 'VQ-16'"),
        ("gen_vision_config.params.image_token_size", 0, "image_token_size: must be a positive integer, found 0"),
        ("gen_head_config.params.image_token_size", 64, "image_token_size: 64 is not what Janus-Pro has, 128"),
        ("gen_head_config.params.image_token_embed", 32, "image_token_embed: 32 is not what Janus-Pro has, 64"),
        ("gen_aligner_config.params.depth", 1, "gen_aligner_config.params.depth: 1 is not what Janus-Pro has, 2"),
        ("gen_aligner_config.params.depth", None, "gen_aligner_config.params.depth: 1 is not what Janus-Pro has, 2"),
        ("gen_aligner_config.params.projector_type", "linear", "'linear' is not what Janus-Pro has, 'mlp_gelu'"),
        ("language_config.vocab_size", 1000, "vocab_size: 1000 words, Janus-Pro has 102400"),
        ("language_config.vocab_size", 102400, "128 codes, Janus-Pro has 16384"),
        ("language_config.hidden_act", "gelu", "hidden_act: 'gelu' is not what Janus-Pro has, 'silu'"),
        ("language_config.num_attention_heads", 3, "num_attention_heads: 3 does not divide hidden_size 64"),
        ("language_config.num_hidden_layers", 5, "lacks tensor language_model.model.layers.4.input_layernorm.weight"),
        ("language_config.num_hidden_layers", 10**7, "wants 10000000 layers, there are 273 tensors"),
        ("language_config", [1], "language_config: must be an object, found [1]"),
    ],
)
def test_what_is_no_janus_pro_of_these_sizes_is_refused(key, value, message, tmp_path):
    hf = save_janus(tmp_path / "hf", "original")
    config = json.loads((hf / "config.json").read_text())
    edited(config, key, value)
    (hf / "config.json").write_text(json.dumps(config))
    assert message in refused(hf, tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vq_config", "embed_dim", 4, "vq_config.embed_dim: 4 is not what Janus-Pro has, 8"),
        ("vq_config", "num_hidden_layers", 3, "vq_config.num_hidden_layers: 3 is not what Janus-Pro has, 2"),
        ("vq_config", "num_embeddings", "many", "vq_config.num_embeddings: must be a positive integer, found 'many'"),
        ("vision_config", "num_hidden_layers", 10**9, "want 1000000005 layers, more than 4000"),
        ("vision_config", "hidden_size", "wide", "transformers does not take it: "),
        ("text_config", "attention_bias", True, "attention_bias: True is not what Janus-Pro has, False"),
    ],
)
def test_values_that_cannot_be_are_named_in_transformers_form(section, key, value, message, tmp_path):
    hf = save_janus(tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    config[section][key] = value
    (hf / "config.json").write_text(json.dumps(config))
    assert message in refused(hf, tmp_path)


def test_another_family_and_another_form_are_refused(tmp_path):
    hf = save_janus(tmp_path / "hf")
    other = save_janus(tmp_path / "other", "original")
    shutil.copyfile(other / "config.json", hf / "config.json")
    assert "config.json is of the original form, but the tensors beside it are named as in the transformers form" in (
        refused(hf, tmp_path)
    )
    edit_config(hf, model_type="Emu3")
    assert refused(hf, tmp_path).startswith(f"--hf: {hf}")


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path):
    hf = save_janus(tmp_path / "hf", "original, pickled")
    file = hf / "pytorch_model.bin"
    whole = torch.load(file)
    torch.save(whole | {"epoch": 3}, file)
    assert refused(hf, tmp_path) == f"--hf: {file}: epoch is no tensor"
    torch.save(whole | {"path": tmp_path}, file)
    assert "pathlib" in refused(hf, tmp_path) and "which no plain data needs" in refused(hf, tmp_path)
    torch.save(whole | {"aligner.odd": torch.zeros(2, dtype=torch.complex64)}, file)
    assert "tensor aligner.odd in" in refused(hf, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert "is truncated or not what torch.save writes" in refused(hf, tmp_path)
