"""What conversions refuse: one line that names the tensor, key or file, and nothing left behind."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import (
    export_checkpoint,
    import_checkpoint,
)
from megatron_cca.checkpoint.integrity import INDEX, read_index
from megatron_cca.checkpoint.layout import sealed
from megatron_cca.config import ParallelConfig
from megatron_cca.errors import UserError
from tests.references.huggingface import (
    UP_PROJ,
    convert,
    edit_config,
    edit_tensors,
    refused,
)
from tests.references.resealed import reseal


def test_a_missing_tensor_is_named(hf, tmp_path):
    edit_tensors(hf, lambda found: found.pop(UP_PROJ))
    assert refused(hf, tmp_path) == f"--hf: {hf} lacks tensor {UP_PROJ}"


def test_an_extra_tensor_is_named(hf, tmp_path):
    edit_tensors(hf, lambda found: found.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(1)}))
    assert "tensor model.layers.4.mlp.up_proj.weight in" in refused(hf, tmp_path)


def test_a_misshapen_tensor_is_named(hf, tmp_path):
    edit_tensors(hf, lambda found: found.update({UP_PROJ: found[UP_PROJ][:-1].clone()}))
    message = refused(hf, tmp_path)
    assert f"tensor {UP_PROJ} in {hf / 'model.safetensors'} has shape [175, 64], config.json wants [176, 64]" in message


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_the_image_tokenizers_tensors_are_checked_too(change, hub, tmp_path):
    hf = Path(shutil.copytree(hub("transformers"), tmp_path / "hf"))
    name = "vqmodel.encoder.conv_in.bias"

    def spoil(found):
        bias = found.pop(name)
        if change == "extra":
            found |= {name: bias, f"{name}2": bias.clone()}
        if change == "misshapen":
            found[name] = bias[1:].clone()

    edit_tensors(hf, spoil)
    assert name in refused(hf, tmp_path)


def test_mixed_and_foreign_dtypes_are_named(hf, tmp_path):
    edit_tensors(hf, lambda found: found.update({UP_PROJ: found[UP_PROJ].bfloat16()}))
    assert f"tensor {UP_PROJ} is torch.bfloat16, model.embed_tokens.weight is torch.float32" in refused(hf, tmp_path)
    edit_tensors(hf, lambda found: found.update({name: tensor.half() for name, tensor in found.items()}))
    assert "is in torch.float16; models here are in float32 or bfloat16" in refused(hf, tmp_path)


def test_another_model_is_told_what_it_is(hf, tmp_path):
    edit_config(hf, model_type="llama", architectures=["LlamaForCausalLM"])
    assert refused(hf, tmp_path) == (
        f"--hf: {hf / 'config.json'}: model_type 'llama' (architectures ['LlamaForCausalLM']) is not of a family known "
        "here (emu3, emu3_5, janus)"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not what Emu3 has, 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: True is not what Emu3 has, False"),
        ({"attention_bias": True}, "attention_bias: True is not what Emu3 has, False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type: 'yarn'"),
        ({"head_dim": 32}, "head_dim: 32 is not hidden_size / num_attention_heads, 16"),
        ({"num_attention_heads": 0}, "num_attention_heads: must be a positive integer, found 0"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers: must be a positive integer, found 'four'"),
        ({"num_attention_heads": 3}, "num_attention_heads: 3 does not divide hidden_size 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"num_hidden_layers": 10**7}, "wants 10000000 layers, there are 39 tensors"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a positive number, found nan"),
        ({"rope_theta": "1e6", "rope_parameters": None}, "rope_theta: must be a positive number, found '1e6'"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta: must be a positive number, found True"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters.type: 'linear' is not what Emu3 has"),
        ({"rope_parameters": [1]}, "rope_parameters: must be an object, found [1]"),
        ({"text_config": None}, "text_config: must be an object, found None"),
        ({"model_type": []}, "model_type [] (architectures ['Emu3ForCausalLM']) is not of a family known here"),
        ({"vocab_size": 455}, None),
    ],
)
def test_sizes_that_cannot_be_are_named(values, message, hf, tmp_path):
    edit_config(hf, **values)
    found = refused(hf, tmp_path)
    if message is None:
        assert "has shape [456, 64], config.json wants [455, 64]" in found
    else:
        assert found.startswith(f"--hf: {hf / 'config.json'}")
        assert message in found


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            "parallel.tensor_model_parallel_size: 3 does not divide num_attention_heads 4; possible: 1, 2, 4",
        ),
        (
            {"tensor_model_parallel_size": 4},
            "parallel.tensor_model_parallel_size: 4 does not divide num_query_groups 2; possible: 1, 2",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            "parallel.pipeline_model_parallel_size: 3 does not divide num_layers 4; possible: 1, 2, 4",
        ),
    ],
)
def test_a_layout_that_cannot_split_the_model_is_refused_before_the_cluster_is(sizes, message, hf, tmp_path):
    assert refused(hf, tmp_path, parallel=ParallelConfig(**sizes)) == message


def test_missing_and_damaged_files_are_named(hf, tmp_path):
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is truncated or not a safetensors file: Error" in refused(hf, tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    pointer = "it is a Git LFS pointer in place of the file (git lfs pull brings the file)"
    assert f"{file} is truncated or not a safetensors file; {pointer}" in refused(hf, tmp_path)
    file.unlink()
    assert "has neither model.safetensors nor" in refused(hf, tmp_path)
    (hf / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(hf, tmp_path)
    (hf / "config.json").unlink()
    assert "has no config.json" in refused(hf, tmp_path)
    assert "no folder at" in refused(tmp_path / "nowhere", tmp_path)


def test_tensors_of_one_form_under_the_others_configuration_are_refused(hub, tmp_path):
    for one, other in (("transformers", "Emu3ForCausalLM"), ("Emu3ForCausalLM", "transformers")):
        hf = Path(shutil.copytree(hub(one), tmp_path / one))
        shutil.copyfile(hub(other) / "config.json", hf / "config.json")
        with pytest.raises(UserError, match=r"config.json is of the .* form, but the tensors beside it"):
            import_checkpoint(hf, tmp_path / "megatron")


def test_a_file_that_is_not_there_is_not_lost_in_silence(hf, tmp_path):
    (hf / "tokenizer.json").symlink_to("../blobs/gone")
    assert f"{hf / 'tokenizer.json'}: No such file or directory" in refused(hf, tmp_path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["model-00001-of-00002.safetensors"], "is a part; the index that belongs to it is missing"),
        (["adapter_model.safetensors"], "is an adapter; merge it into its base first"),
        (["pytorch_model-00001-of-00002.bin"], "is a part; the index that belongs to it is missing"),
        (["weights.bin"], "has another name; from_pretrained would not take it either"),
        (["model.pt"], "is a pickle, which is not read; save it as safetensors"),
        (["emu3.gguf"], "is not read; give the safetensors that it was made from"),
    ],
)
def test_what_lies_there_instead_of_safetensors_is_told(names, hint, hf, tmp_path):
    (hf / "model.safetensors").unlink()
    for name in names:
        (hf / name).write_bytes(b"")
    assert refused(hf, tmp_path).endswith(
        f"has neither model.safetensors nor model.safetensors.index.json ({names[0]} {hint})"
    )


def test_a_form_without_its_parts_is_refused(hub, tmp_path):
    with pytest.raises(UserError, match=r"--format transformers: the image tokenizer .* template .*--hf-template"):
        convert(hub("Emu3ForCausalLM"), tmp_path, form="transformers")
    template = tmp_path / "template"
    template.mkdir()
    shutil.copyfile(hub("transformers") / "config.json", template / "config.json")
    with pytest.raises(UserError, match=r"tensor vqmodel\.\S+ \(and \d+ more\) is neither in the checkpoint nor"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", form="transformers", template=template)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not what Emu3 has"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: .* is not what Emu3 has"),
        ({"head_dim": 32}, "head_dim: 32 is not hidden_size / num_attention_heads, 16"),
        ({"text_config": []}, r"text_config: must be an object, found \[\]"),
    ],
)
def test_a_template_of_another_model_is_refused(values, message, hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    edit_config(hf, **values)
    with pytest.raises(UserError, match=f"--hf-template: .*config.json: {message}"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", template=hf)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", ["extra", "misshapen"])
def test_a_templates_image_tokenizer_is_checked(change, hub, tmp_path):
    template = Path(shutil.copytree(hub("transformers"), tmp_path / "template"))
    import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False)
    name = "vqmodel.encoder.conv_in.bias"
    edit_tensors(
        template, lambda found: found.update({f"{name}2" if change == "extra" else name: found[name][1:].clone()})
    )
    with pytest.raises(UserError, match=rf"--hf-template: tensor {name}"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", template=template)


def _changed(config, section, **values):
    return {**config, section: {**config[section], **values}}


def test_a_checkpoint_without_one_of_its_tensors_is_refused(hf, tmp_path):
    folder = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    reseal(folder, lambda summary: {**summary, "config": _changed(summary["config"], "model", num_layers=5)})
    with pytest.raises(UserError, match=r"decoder.layers.\S+ in .* has shape \[4, 64\], its sizes want \[5, 64\]"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is damaged; choose another checkpoint"),
        ("{}", "is damaged; choose another checkpoint"),
        ('{"files": {}}', "is damaged; choose another checkpoint"),
        (sealed({"files": []}), "is damaged; choose another checkpoint"),
        (sealed({"files": {"a": 7}}), "is damaged; choose another checkpoint"),
        (sealed({"files": {"../a": {"bytes": 1, "xxh3": ""}}}), "is damaged; choose another checkpoint"),
        (sealed({"files": {"/a": {"bytes": 1, "xxh3": ""}}}), "is damaged; choose another checkpoint"),
        (sealed({"files": {}}), "is damaged: it has no config; choose another checkpoint"),
        (sealed({"files": {}, "config": []}), "is damaged: it has no config; choose another checkpoint"),
        (sealed({"files": {}, "config": {"model": {"name": "foo"}}}), "model.name: unknown preset 'foo'"),
        (sealed({"files": {}, "config": {"model": 3}}), "model"),
        ('{"files": ' + "[" * 100_000, "is damaged; choose another checkpoint"),
    ],
)
def test_a_damaged_summary_is_named(content, message, hf, tmp_path):
    folder = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    (folder / layout.SUMMARY).write_text(content)
    with pytest.raises(UserError) as error:
        export_checkpoint(folder, tmp_path / "back")
    assert str(error.value).startswith(f"--checkpoint: {folder / layout.SUMMARY}")
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "²", "12345678901234567890", "../x"])
def test_a_damaged_latest_file_is_named(content, hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    (tmp_path / "megatron" / layout.LATEST).write_text(content)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt: holds .* instead of an iteration number"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")


def test_a_checkpoint_in_another_width_is_refused(hf, tmp_path):
    folder = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    index = read_index(folder, "")
    for found in index.state_dict_metadata.values():
        if isinstance(found, TensorStorageMetadata):
            found.properties.dtype = torch.float16
    (folder / INDEX).write_bytes(pickle.dumps(index))
    reseal(folder)
    with pytest.raises(UserError, match=r"is in torch.float16; models here are in float32 or bfloat16"):
        export_checkpoint(folder, tmp_path / "back")
