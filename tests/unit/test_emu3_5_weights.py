"""Emu3.5 as its authors keep it: imported, exported, and told apart from Emu3."""

import json

import pytest
import torch

from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import HF, HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.verifying import compare_tensors, open_both
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.errors import UserError
from megatron_cca.models import FAMILIES, resolve_architecture
from tests.references import emu3_5
from tests.references.huggingface import assert_same_bits, convert, edit_config, load_tensors, refused, save_emu3

Q_NORM = "model.layers.0.self_attn.q_norm.weight"


@pytest.fixture
def hf(tmp_path):
    emu3_5.save(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(("dtype", "files"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_an_import_and_an_export_change_nothing(dtype, files, tmp_path):
    tensors = emu3_5.save(tmp_path / "hf", dtype=dtype, files=files)
    back = convert(tmp_path / "hf", tmp_path)
    assert_same_bits(load_tensors(back), tensors)
    for name in ("config.json", "emu3.tiktoken", "emu3_vision_tokens.txt"):
        assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    source, target = open_both(tmp_path / "hf", tmp_path / "megatron")
    assert compare_tensors(source, target, progress_bar=False).identical


def test_an_import_is_the_tiny_preset(hf, tmp_path):
    found = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    model = saved_config(found, "--checkpoint").model
    assert model.name == "emu3_5-tiny"
    assert resolve_architecture(model) == FAMILIES["emu3_5"].presets["emu3_5-tiny"]


def test_sizes_are_those_of_the_configuration(tmp_path):
    changes = {"head_dim": 16, "hidden_size": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 5e6}
    emu3_5.save(tmp_path / "hf", **changes, num_hidden_layers=2, max_position_embeddings=4096)
    found = HuggingFaceCheckpoint(tmp_path / "hf", HF).architecture
    assert (found.kv_channels, found.hidden_size, found.num_query_groups, found.num_layers) == (16, 32, 4, 2)
    assert (found.layernorm_epsilon, found.rotary_base, found.max_position_embeddings) == (1e-6, 5e6, 4096)
    assert found.qk_layernorm


@pytest.mark.parametrize("name", ["emu3_5-tiny", "emu3_5-34b"])
def test_an_export_without_a_template_has_the_authors_configuration(name, hf):
    """Their class has Emu3's sizes where a configuration leaves one out."""
    theirs = json.loads((hf / "config.json").read_text())
    format = FAMILIES["emu3_5"].huggingface
    preset = FAMILIES["emu3_5"].presets[name]
    ours = format.write_config(None, preset, "float32", "original")
    assert format.knows(ours)
    model = format.read_model_config(ours)
    assert model.name == name
    assert resolve_architecture(model) == preset
    assert {"hidden_size", "num_hidden_layers", "intermediate_size", "head_dim", "vocab_size"} <= ours.keys()
    assert {key: ours[key] for key in ("model_type", "architectures")} == {
        key: theirs[key] for key in ("model_type", "architectures")
    }


def test_the_released_sizes_are_known_by_their_vocabulary(hf):
    edit_config(
        hf,
        **{"vocab_size": 282_926, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64},
        **{"num_hidden_layers": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 9216},
    )
    config = json.loads((hf / "config.json").read_text())
    of_emu3, of_emu3_5 = (FAMILIES[name].huggingface for name in ("emu3", "emu3_5"))
    assert of_emu3_5.knows(config) and not of_emu3.knows(config)
    model = of_emu3_5.read_model_config(config)
    assert model.name == "emu3_5-34b"
    assert resolve_architecture(model) == FAMILIES["emu3_5"].presets["emu3_5-34b"]
    smaller = config | {"vocab_size": 184_622, "hidden_size": 4096, "num_attention_heads": 32}
    assert of_emu3.knows(smaller) and not of_emu3_5.knows(smaller)


def test_transformers_qwen3_is_the_same_decoder_as_the_plain_one():
    """And each part counts: without one of them the logits are others."""
    config = emu3_5.CONFIG
    tensors = emu3_5.random_tensors(config)
    model = FAMILIES["emu3_5"].huggingface.transformers_model(config).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.load_state_dict(tensors, strict=True)
    tokens = torch.randint(0, config["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = model.eval()(tokens).logits, emu3_5.logits(tensors, tokens, config)
    assert (theirs - ours).abs().max() < 1e-4 * theirs.abs().max()
    without = emu3_5.logits(tensors | {Q_NORM: torch.ones_like(tensors[Q_NORM])}, tokens, config)
    assert (without - ours).abs().max() > 1e-2 * ours.abs().max()


def test_each_family_refuses_the_others_files(hf, tmp_path):
    other = save_emu3(tmp_path / "emu3", "original repository")
    assert import_checkpoint(other, tmp_path / "of emu3", progress_bar=False)
    assert import_checkpoint(hf, tmp_path / "of emu3.5", progress_bar=False)
    for checkpoint, template in (("of emu3", hf), ("of emu3.5", other)):
        with pytest.raises(UserError, match=f"--hf-template: {template} is of another family than the checkpoint"):
            export_checkpoint(tmp_path / checkpoint, tmp_path / "out", template=template)
    # A configuration of one beside the tensors of the other.
    config = (hf / "config.json").read_text()
    (hf / "config.json").write_text((other / "config.json").read_text())
    (other / "config.json").write_text(config)
    assert "self_attn.k_norm.weight" in refused(hf, tmp_path)
    assert f"lacks tensor {Q_NORM}" in refused(other, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 0}, "head_dim: must be a positive integer, found 0"),
        ({"head_dim": 7}, "model.kv_channels: 7 channels of a head; rotary embedding needs an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"attention_bias": True}, "attention_bias: True is not what Emu3.5 has, False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: True is not what Emu3.5 has, False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: {'type': 'linear', 'factor': 2.0} is not"),
        ({"text_config": {}}, "text_config: Emu3.5 has one flat configuration; leave it out"),
        ({"vocab_size": 456}, "model.safetensors has shape [457, 64], config.json wants [456, 64]"),
    ],
)
def test_what_it_cannot_be_is_named(values, message, hf, tmp_path):
    edit_config(hf, **values)
    assert message in refused(hf, tmp_path)


def test_it_has_no_other_form(hf, tmp_path):
    with pytest.raises(UserError, match=r"--format: emu3_5-tiny has no transformers form; leave it out"):
        convert(hf, tmp_path, form="transformers")
