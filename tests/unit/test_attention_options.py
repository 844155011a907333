"""Keys of a decoder's attention: what they stand for, what cannot have them, and what former versions wrote."""

import json
from dataclasses import replace

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import export_checkpoint
from megatron_cca.checkpoint.summary import saved_config, summarize
from megatron_cca.config import Config, ModelConfig
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.architecture import ATTENTION_OPTIONS, with_explicit_sizes, with_overrides
from megatron_cca.models.written_sizes import sizes_beside_preset
from megatron_cca.training.resuming import check_resume
from tests.unit.test_former_configurations import written
from tests.unit.test_key_effects import identity

__all__ = ["written"]

# A value that no preset has, by key.
OTHER = {"kv_channels": 24, "qk_layernorm": True, "add_qkv_bias": True}


def architecture(*overrides):
    return resolve_architecture(load_config(None, overrides).model)


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_there_is_a_case_of_every_key():
    assert tuple(OTHER) == ATTENTION_OPTIONS


def test_files_have_a_place_for_what_presets_have():
    for name, family in FAMILIES.items():
        weights = (family.huggingface or family.weights_file).weights
        for preset in family.presets.values():
            weights.check_attention(preset)
            assert not preset.attention_options or name == "emu3_5"


def test_a_head_follows_the_other_sizes_unless_its_own_is_given():
    assert architecture("model.hidden_size=128").kv_channels == 32
    assert architecture("model.num_attention_heads=8", "model.num_query_groups=8").kv_channels == 8
    wide = architecture("model.kv_channels=24", "model.hidden_size=128")
    assert (wide.kv_channels, wide.query_projection_size, wide.kv_projection_size) == (24, 96, 48)
    preset = replace(FAMILIES["emu3"].presets["emu3-tiny"], kv_channels=24)
    assert with_overrides(preset, ModelConfig(hidden_size=128)).kv_channels == 24
    # Then the heads need not divide the hidden size.
    assert architecture("model.kv_channels=24", "model.hidden_size=65").kv_channels == 24


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.kv_channels=25"],
            "model.kv_channels: 25 channels of a head; rotary embedding needs an even number",
        ),
        (
            ["model.name=llamagen-tiny", "model.kv_channels=18"],
            "model.kv_channels: 18 channels of a head; rotary embedding over a grid needs a multiple of 4, half of",
        ),
        (
            ["model.hidden_size=60"],
            "model.num_attention_heads: 4 heads have 15 channels each; rotary embedding needs an even number",
        ),
        *(
            (
                ["model.name=var-tiny", f"model.{key}={json.dumps(value)}"],
                f"model.{key}: {json.dumps(value)}, but the layers here have an attention of their own; leave it out",
            )
            for key, value in OTHER.items()
        ),
    ],
)
def test_what_cannot_be_is_refused_by_key(overrides, message):
    assert refusal(architecture, *overrides).startswith(message)


def checkpoint_of(written, name, **keys):
    return written(summarize(Config(model=ModelConfig(name=name, **keys)))["config"])


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("name", ["emu3-tiny", "llamagen-tiny"])
def test_files_without_a_place_for_it_are_not_written(name, key, written, tmp_path):
    folder = checkpoint_of(written, name, **{key: OTHER[key]})
    message = refusal(export_checkpoint, folder, tmp_path / "out.pt")
    assert message == (
        f"--checkpoint: {folder}: model.{key}: {json.dumps(OTHER[key])}, which this family's files have no place for; "
        "convert a model without it"
    )


def test_checkpoints_of_former_versions_have_what_these_had(written):
    tree = summarize(Config(model=ModelConfig(hidden_size=128)))["config"]
    for key in OTHER:
        tree["model"].pop(key)
    folder = written(tree)
    found = saved_config(folder, "").model
    assert resolve_architecture(found).kv_channels == 32
    assert not resolve_architecture(found).attention_options


@pytest.mark.parametrize("key", OTHER)
def test_a_run_goes_on_with_its_own_alone(key, written, tmp_path):
    checkpoint_of(written, "emu3-tiny")
    config = load_config(None, [f"training.output_dir={tmp_path}/run", f"model.{key}={json.dumps(OTHER[key])}"])
    assert layout.newest_complete(tmp_path / "run" / layout.FOLDER) == 10
    assert refusal(check_resume, config).startswith(f"model.{key}: {OTHER[key]!r}, but the run in ")


def test_caches_of_former_versions_serve_plain_models_alone():
    former = identity(load_config(None, ["data.path=digits"]))
    for key, value in OTHER.items():
        assert former[f"model.{key}"] is None
        own = identity(load_config(None, ["data.path=digits", f"model.{key}={json.dumps(value)}"]))
        assert own == former | {f"model.{key}": value}


def test_a_run_of_such_a_model_needs_the_keys():
    def needed(**keys):
        model = ModelConfig(**keys)
        return sizes_beside_preset(with_explicit_sizes(model, resolve_architecture(model)))

    assert needed(**OTHER) == {"name": "emu3-tiny", **OTHER}
    assert needed(hidden_size=128) == {"name": "emu3-tiny", "hidden_size": 128}
