"""What Emu3's image tokenizer refuses: pixels, codes and files that cannot be, each in one line with its name."""

import json
import shutil

import pytest
import torch

from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError
from tests.references.emu3_vq import save_composite
from tests.references.huggingface import edit_config, edit_tensors
from tests.references.image_tokenizers import refused


@pytest.mark.parametrize(
    ("given_pixels", "message"),
    [
        (torch.zeros(1, 8, 8, 3), "must be uint8 [N, H, W, 3] or [N, T, H, W, 3], found torch.float32 [1, 8, 8, 3]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "found torch.uint8 [1, 3, 8, 8]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "found torch.uint8 [8, 8, 3]"),
        (torch.zeros(1, 8, 7, 3, dtype=torch.uint8), "width 7 is not a multiple of 2"),
        (torch.zeros(1, 0, 8, 3, dtype=torch.uint8), "height 0 is not a multiple of 2"),
        (torch.zeros(1, 5, 8, 8, 3, dtype=torch.uint8), "5 frames are not a multiple of 4"),
    ],
)
def test_pixels_that_cannot_be_are_refused(given_pixels, message, vq_folder):
    with pytest.raises(UserError) as error:
        open_image_tokenizer(vq_folder).encode(given_pixels)
    assert str(error.value).startswith("pixels: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 48), "codes: 48 does not fit a codebook of 48"),
        (torch.full((1, 2, 2), -1), "codes: -1 does not fit a codebook of 48"),
        (torch.zeros(1, 2, 2), "codes: must be int64 [N, h, w] or [N, T, h, w], found torch.float32 [1, 2, 2]"),
        (torch.zeros(2, 2, dtype=torch.int64), "found torch.int64 [2, 2]"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), "found torch.int64 [1, 0, 2]"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, message, vq_folder):
    with pytest.raises(UserError) as error:
        open_image_tokenizer(vq_folder).decode(codes)
    assert message in str(error.value)


NAME = "encoder.mid.attn_1.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(NAME), "tensor encoder.middle_block.attn_1.q_proj.weight (by transformers' name) is"),
        (lambda found: found.update({NAME: found[NAME][1:]}), f"tensor {NAME} has shape [63, 64, 1, 1], config.json"),
        (lambda found: found.update({"extra.bias": torch.ones(3)}), "tensor extra.bias is not one of this model's"),
        (
            lambda found: found.update({NAME.replace("mid", "middle_block"): found[NAME].clone()}),
            f"tensor {NAME.replace('mid', 'middle_block')} is there twice, also as {NAME}",
        ),
        (lambda found: found.update({"a\nb": torch.ones(3)}), "tensor 'a\\nb' has a name that is not one line of text"),
        (lambda found: found.clear(), "has no tensors"),
        (
            lambda found: found.update({"quant_conv.conv.bias": found["quant_conv.conv.bias"][:, None, None]}),
            "tensor quant_conv.conv.bias has shape [4, 1, 1], config.json wants [4]",
        ),
        (lambda found: found.update({NAME: found[NAME].to(torch.int8)}), f"tensor {NAME} has dtype I8, which is none"),
        (lambda found: found[NAME].fill_(torch.nan), f"tensor {NAME} holds numbers that are not finite"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(change, message, spoilt_vq):
    edit_tensors(spoilt_vq, change)
    found = refused(spoilt_vq)
    assert found.startswith(str(spoilt_vq))
    assert message in found


def test_a_counter_of_training_batches_may_be_missing(spoilt_vq, vq_folder):
    edit_tensors(
        spoilt_vq, lambda found: [found.pop(name) for name in list(found) if name.endswith("num_batches_tracked")]
    )
    assert open_image_tokenizer(spoilt_vq).fingerprint() == open_image_tokenizer(vq_folder).fingerprint()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "Emu3"}, "model_type 'Emu3' is not an Emu3 image tokenizer's"),
        ({"model_type": []}, "model_type [] is not an Emu3 image tokenizer's"),
        ({"model_type": "emu3", "vq_config": []}, "vq_config: must be an object, found []"),
        ({"ch": "256\n"}, "ch: must be a positive integer, found '256\\n'"),
        ({"ch": 33}, "transformers does not take it: "),
        ({"ch_mult": []}, "ch_mult: must be a list of integers, found []"),
        ({"ch_mult": [1, True]}, "ch_mult: must be a list of integers, found [1, True]"),
        ({"ch_mult": [1] * 10**5}, "wants more layers than the"),
        ({"ch_mult": [2, 1], "attn_resolutions": [0, 1]}, "attn_resolutions: level 0 is not as wide as the last"),
        ({"attn_resolutions": None}, "attn_resolutions: must be a list of integers, found None"),
        ({"num_res_blocks": 10**9}, "wants more layers than the"),
        ({"codebook_size": 2**31 - 1}, "tensor quantize.embedding.weight has shape [48, 4], config.json wants"),
        ({"double_z": True}, "double_z: True is not what Emu3 has, False"),
        ({"in_channels": 1}, "in_channels: 1 is not what Emu3 has, 3"),
        ({"z_channels": 8}, "embed_dim: 4 differs from z_channels"),
        ({"temporal_downsample_factor": 3}, "temporal_downsample_factor: 3 is not a power of two"),
    ],
)
def test_configurations_that_cannot_be_are_named(values, message, spoilt_vq):
    edit_config(spoilt_vq, **values)
    found = refused(spoilt_vq)
    assert found.startswith(str(spoilt_vq))
    assert message in found


def test_the_width_of_transformers_attention_is_checked(vq_model, tmp_path):
    vq_model.save_pretrained(tmp_path)
    edit_config(tmp_path, hidden_size=32)
    assert "hidden_size: 32 is not base_channels x the last multiplier, 64" in refused(tmp_path)
    edit_config(tmp_path, hidden_size=64, num_attention_heads=5)
    assert "transformers does not take it: embed_dim must be divisible by num_heads" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"image_mean": [0.5]}', "image_mean: must be a number or three of them, found [0.5]"),
        ('{"image_std": 0}', "image_std: must be a number or three of them, found 0"),
        ('{"image_std": NaN}', "image_std: must be a number or three of them, found nan"),
        ('{"do_normalize": false}', "do_normalize: False is not what Emu3 has, True"),
        ('{"rescale_factor": 1}', "rescale_factor: 1 is not what Emu3 has, 0.0039"),
    ],
)
def test_a_damaged_processor_is_named(content, message, spoilt_vq):
    path = spoilt_vq / "preprocessor_config.json"
    path.write_text(content)
    assert refused(spoilt_vq).startswith(f"{path}: {message}")


def test_missing_and_damaged_files_are_named(spoilt_vq, tmp_path):
    assert refused(tmp_path / "nowhere").startswith(f"no file or folder at {tmp_path / 'nowhere'}")
    assert refused(tmp_path).startswith(f"{tmp_path} holds no image tokenizer: neither codebook.npy nor")
    file = spoilt_vq / "model.safetensors"
    for size in (-1, 1000, 5, 0):
        file.write_bytes(file.read_bytes()[:size])
        assert refused(spoilt_vq).startswith(f"{spoilt_vq}: model.safetensors is truncated or not a safetensors file: ")
    file.unlink()
    (spoilt_vq / "pytorch_model.bin").write_bytes(b"")
    assert refused(spoilt_vq).endswith("(pytorch_model.bin is a pickle, which is not read; save it as safetensors)")
    (spoilt_vq / "config.json").write_text("[" * 10**5)
    assert refused(spoilt_vq) == f"{spoilt_vq / 'config.json'}: is not valid JSON"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "must hold a weight_map"),
        ({"vqmodel.a": 3}, "must hold a weight_map"),
        ({"vqmodel.a": "../model.safetensors"}, "names '../model.safetensors', which is not a file of the same folder"),
        ({"vqmodel.a": ".."}, "names '..', which is not a file of the same folder"),
        ({"vqmodel.a": ""}, "names '', which is not a file of the same folder"),
        ({"vqmodel.a": "\0"}, "names '\\x00', which is not a file of the same folder"),
        ({"text_model.a": "x.safetensors"}, "has no tensors that begin with vqmodel. or model.vqmodel."),
    ],
)
def test_a_damaged_index_is_named(weight_map, message, vq_model, tmp_path):
    save_composite(vq_model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert message in refused(tmp_path)


def test_a_shard_that_is_missing_or_another_is_named(vq_model, tmp_path):
    save_composite(vq_model, tmp_path)
    first, second = (tmp_path / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    shutil.copyfile(second, first)
    assert "is not in model-00001-of-00003.safetensors, where model.safetensors.index.json says" in refused(tmp_path)
    first.unlink()
    assert "model-00001-of-00003.safetensors is missing" in refused(tmp_path)


def test_a_device_that_is_not_there_is_named(vq_folder):
    assert refused(vq_folder, device="gpu").startswith("device gpu: ")
