"""Import and export as library calls: every form bit for bit, what travels along, what is refused and left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint import layout, output
from megatron_cca.checkpoint.huggingface import (
    LogitComparison,
    compare_tensors,
    export_checkpoint,
    import_checkpoint,
    open_both,
    placing,
)
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config import ParallelConfig, config_from_dict
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from tests.references.huggingface import FORMS, assert_same_bits, load_tensors, save_emu3


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Each form and dtype, saved once: name -> folder."""
    root = tmp_path_factory.mktemp("hub")
    found = {}

    def get(form, dtype="float32", **options):
        key = (form, dtype, *options.items())
        if key not in found:
            found[key] = save_emu3(root / str(len(found)), form, dtype=getattr(torch, dtype), **options)
        return found[key]

    return get


def convert(hf, folder, **options):
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return export_checkpoint(folder / "megatron", folder / "back", progress_bar=False, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS[:3])
def test_there_and_back_is_bit_for_bit(form, dtype, hub, tmp_path):
    hf = hub(form, dtype)
    back = convert(hf, tmp_path)
    assert_same_bits(load_tensors(back), load_tensors(hf))
    for path in hf.iterdir():
        if path.suffix != ".safetensors":
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name


def test_sharded_checkpoints_and_not_a_number_survive(hub, tmp_path):
    hf = save_emu3(tmp_path / "hf", "Emu3ForCausalLM", dtype=torch.bfloat16, shard="100KB")
    assert (hf / "model.safetensors.index.json").is_file()
    file = sorted(hf.glob("model-*.safetensors"))[0]
    changed = load_file(file)
    name = next(name for name, tensor in changed.items() if tensor.dim() == 2)
    changed[name].view(torch.int16)[0, :3] = torch.tensor([0x7FC1, -1, -0x8000], dtype=torch.int16)
    save_file(changed, file, metadata={"format": "pt"})
    back = convert(hf, tmp_path)
    assert_same_bits(load_tensors(back), load_tensors(hf))
    assert compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False).identical


def test_names_in_memory_come_back_as_transformers_writes_them(hub, tmp_path):
    back = convert(hub("transformers, names in memory"), tmp_path)
    assert_same_bits(load_tensors(back), load_tensors(hub("transformers")))


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_back_loads_with_from_pretrained_at_once(form, hub, tmp_path):
    from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration, Emu3Processor, GenerationConfig

    hf = hub(form)
    back = convert(hf, tmp_path)
    cls = Emu3ForConditionalGeneration if form.startswith("transformers") else Emu3ForCausalLM
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        one, other = (
            cls.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits for folder in (hf, back)
        )
    assert torch.equal(one, other)
    assert GenerationConfig.from_pretrained(back).eos_token_id == 324
    if form.startswith("transformers"):
        assert Emu3Processor.from_pretrained(back).tokenizer("a seven").input_ids == [1, 3]


@pytest.mark.parametrize("form", FORMS[:3])
def test_sizes_come_from_the_configuration(form, tmp_path):
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 77,
        "rms_norm_eps": 3e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    }
    hf = save_emu3(tmp_path / "hf", form, **sizes)
    summary = layout.read_summary(import_checkpoint(hf, tmp_path / "megatron", progress_bar=False), "")
    found = resolve_architecture(config_from_dict(summary["config"]).model)
    assert (found.vocabulary.size, found.hidden_size, found.ffn_hidden_size, found.num_layers) == (1000, 48, 80, 3)
    assert (found.num_attention_heads, found.num_query_groups, found.max_position_embeddings) == (6, 3, 77)
    assert (found.layernorm_epsilon, found.rotary_base) == (3e-4, 12345.0)
    back = export_checkpoint(tmp_path / "megatron", tmp_path / "back", progress_bar=False)
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_one_form_becomes_the_other(hub, tmp_path):
    composite = hub("transformers")
    flat = convert(composite, tmp_path / "a", form="original")
    expected = {
        name.removeprefix("text_model."): t for name, t in load_tensors(composite).items() if "text_model" in name
    }
    assert_same_bits(load_tensors(flat), expected)
    again = convert(flat, tmp_path / "b", form="transformers", template=composite)
    assert_same_bits(load_tensors(again), load_tensors(composite))
    config, other = (json.loads((folder / "config.json").read_text()) for folder in (again, composite))
    assert config == other


def test_a_form_without_its_parts_is_refused(hub, tmp_path):
    with pytest.raises(UserError, match=r"--format transformers: the image tokenizer .* template .*--hf-template"):
        convert(hub("Emu3ForCausalLM"), tmp_path, form="transformers")
    template = tmp_path / "template"
    template.mkdir()
    shutil.copyfile(hub("transformers") / "config.json", template / "config.json")
    with pytest.raises(UserError, match=r"tensor vqmodel\.\S+ \(and \d+ more\) is neither in the checkpoint nor"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", form="transformers", template=template)
    assert not (tmp_path / "out").exists()


def test_padding_rows_are_zeros(hub, tmp_path):
    stored = StoredTensors(import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False), "")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert stored.shape(key) == (512, 64)
        assert not stored.read(key, None, 456, 512).any()
        assert stored.read(key, None, 455, 456).any()


def test_what_travels_along_outlives_the_checkpoint_that_training_started_from(hub, tmp_path):
    start = import_checkpoint(hub("transformers"), tmp_path / "megatron", progress_bar=False)
    names = sorted(str(p.relative_to(start)) for p in start.glob("huggingface*/*"))
    assert "huggingface/emu3.tiktoken" in names
    assert any(name.startswith("huggingface_parts/") for name in names)
    run = tmp_path / "run"
    for iteration in (1, 2):
        partial = layout.partial_folder(run, iteration)
        partial.mkdir(parents=True)
        layout.keep_companions(run, start, partial)
        layout.finalize(partial, run, iteration, {})
        kept = layout.iteration_folder(run, iteration)
        assert sorted(str(p.relative_to(kept)) for p in kept.glob("huggingface*/*")) == names
        shutil.rmtree(start, ignore_errors=True)


@pytest.mark.parametrize("form", FORMS[:3])
def test_a_templates_sizes_give_way_to_the_checkpoints(form, hub, tmp_path):
    hf = hub(form)
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    template = Path(shutil.copytree(hf, tmp_path / "template"))
    config = json.loads((template / "config.json").read_text())
    text = config.get("text_config", config)
    wanted = {**text}
    text |= {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "rms_norm_eps": 0.5, "vocab_size": 9}
    wanted["head_dim"] = 16
    if "rope_theta" in text:
        text["rope_theta"] = 5.0
    else:
        text["rope_parameters"] = {**text["rope_parameters"], "rope_theta": 5.0}
    (template / "config.json").write_text(json.dumps({**config, "kept": "from the template"}))
    back = export_checkpoint(tmp_path / "megatron", tmp_path / "back", template=template, progress_bar=False)
    found = json.loads((back / "config.json").read_text())
    assert found.pop("kept") == "from the template"
    assert found.get("text_config", found) == wanted


@pytest.fixture
def replacing(hub, tmp_path):
    """A former export of one model, which an export of another is to replace: (folder, tensors before, and after)."""
    one, other = hub("Emu3ForCausalLM"), hub("Emu3ForCausalLM", seed=1)
    import_checkpoint(one, tmp_path / "one", progress_bar=False)
    import_checkpoint(other, tmp_path / "megatron", progress_bar=False)
    export_checkpoint(tmp_path / "one", tmp_path / "back", progress_bar=False)
    return tmp_path / "back", load_tensors(one), load_tensors(other)


def failing_after(moves):
    """A way to move files that fails once, after so many."""
    done = []

    def move(path, to):
        done.append(path)
        if len(done) == moves + 1:
            raise RuntimeError("no further")
        path.rename(to)

    return move


@pytest.mark.parametrize("killed", [True, False])
def test_a_replacement_that_is_cut_short_is_taken_back(killed, replacing, tmp_path, monkeypatch):
    back, before, after = replacing
    names = sorted(path.name for path in back.iterdir())
    for moves in range(2 * len(names)):
        shutil.rmtree(back / placing.PARTIAL, ignore_errors=True)
        with monkeypatch.context() as patched:
            patched.setattr(placing, "_replace", failing_after(moves))
            if killed:  # then nobody tidies up
                patched.setattr(placing, "undo", lambda folder: None)
                patched.setattr(output.shutil, "rmtree", lambda *arguments, **options: None)
            with pytest.raises(RuntimeError, match="no further"):
                export_checkpoint(tmp_path / "megatron", back, overwrite=True, progress_bar=False)
        if killed and (back / "config.json").exists():
            found = load_tensors(back)
            assert_same_bits(found, before if torch.equal(found[UP], before[UP]) else after)
        with pytest.raises(UserError, match="already holds"):
            export_checkpoint(tmp_path / "megatron", back)
        assert_same_bits(load_tensors(back), before)
        assert sorted(path.name for path in back.iterdir() if path.name not in placing.UNFINISHED) == names
    export_checkpoint(tmp_path / "megatron", back, overwrite=True, progress_bar=False)
    assert_same_bits(load_tensors(back), after)
    assert sorted(path.name for path in back.iterdir()) == names


def test_a_first_export_that_is_cut_short_leaves_nothing(replacing, tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "_replace", failing_after(2))
    with pytest.raises(RuntimeError, match="no further"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "new", progress_bar=False)
    assert not (tmp_path / "new").exists()


def test_an_import_that_cannot_take_the_formers_place_leaves_it(hub, tmp_path, monkeypatch):
    folder = import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False)
    rename = Path.rename

    def fail(path, to):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error", str(path))
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="Input/output error"):
            import_checkpoint(hub("Emu3ForCausalLM", seed=1), tmp_path / "megatron", overwrite=True, progress_bar=False)
    assert compare_tensors(*open_both(hub("Emu3ForCausalLM"), folder), progress_bar=False).identical
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, layout.LATEST]


def test_an_import_killed_at_any_of_its_last_moves_can_be_repeated(hub, tmp_path):
    for name in (".latest_checkpointed_iteration.txt", ".iter_0000000.partial", ".iter_0000000.former"):
        left = tmp_path / "megatron" / name
        left.parent.mkdir(exist_ok=True)
        left.write_text("0\n") if name.endswith(".txt") else left.mkdir()
    import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False)
    assert sorted(path.name for path in (tmp_path / "megatron").iterdir()) == ["iter_0000000", layout.LATEST]


# Refusals: one line that names the tensor, key or file, and nothing left behind.


@pytest.fixture
def hf(hub, tmp_path):
    """A small original-form folder that may be spoilt."""
    return Path(shutil.copytree(hub("Emu3ForCausalLM"), tmp_path / "hf"))


def refused(hf, folder, **options):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        import_checkpoint(hf, folder / "megatron", progress_bar=False, **options)
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def edit(hf, change):
    file = hf / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def edit_config(hf, **values):
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


UP = "model.layers.2.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(hf, tmp_path):
    edit(hf, lambda found: found.pop(UP))
    assert refused(hf, tmp_path) == f"--hf: {hf} lacks tensor {UP}"


def test_an_extra_tensor_is_named(hf, tmp_path):
    edit(hf, lambda found: found.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(1)}))
    assert "tensor model.layers.4.mlp.up_proj.weight in" in refused(hf, tmp_path)


def test_a_misshapen_tensor_is_named(hf, tmp_path):
    edit(hf, lambda found: found.update({UP: found[UP][:-1].clone()}))
    message = refused(hf, tmp_path)
    assert f"tensor {UP} in {hf / 'model.safetensors'} has shape [175, 64], config.json wants [176, 64]" in message


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

    edit(hf, spoil)
    assert name in refused(hf, tmp_path)


def test_mixed_and_foreign_dtypes_are_named(hf, tmp_path):
    edit(hf, lambda found: found.update({UP: found[UP].bfloat16()}))
    assert f"tensor {UP} is torch.bfloat16, model.embed_tokens.weight is torch.float32" in refused(hf, tmp_path)
    edit(hf, lambda found: found.update({name: tensor.half() for name, tensor in found.items()}))
    assert "is in torch.float16; models here are in float32 or bfloat16" in refused(hf, tmp_path)


def test_another_model_is_told_what_it_is(hf, tmp_path):
    edit_config(hf, model_type="llama", architectures=["LlamaForCausalLM"])
    assert refused(hf, tmp_path) == (
        f"--hf: {hf / 'config.json'}: model_type 'llama' (architectures ['LlamaForCausalLM']) is not of a family known "
        "here (emu3)"
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
    assert f"{file} is truncated or not a safetensors file" in refused(hf, tmp_path)
    file.unlink()
    assert "has neither model.safetensors nor" in refused(hf, tmp_path)
    (hf / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(hf, tmp_path)
    (hf / "config.json").unlink()
    assert "has no config.json" in refused(hf, tmp_path)
    assert "no folder at" in refused(tmp_path / "nowhere", tmp_path)


def test_a_full_folder_is_kept_unless_told_otherwise(hf, tmp_path):
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    assert refused(hf, tmp_path) == (
        f"--output: {target} already holds thesis.tex; give an empty folder or --overwrite"
    )
    assert "not what --overwrite is meant to replace" in refused(hf, tmp_path, overwrite=True)
    (target / "thesis.tex").unlink()
    import_checkpoint(hf, target, progress_bar=False)
    assert "already holds iter_0000000 and 1 more" in refused(hf, tmp_path)
    edit(hf, lambda found: found[UP].zero_())
    import_checkpoint(hf, target, overwrite=True, progress_bar=False)
    back = tmp_path / "back"
    export_checkpoint(target, back, progress_bar=False)
    assert load_tensors(back)[UP].abs().max() == 0
    with pytest.raises(UserError, match="already holds"):
        export_checkpoint(target, back)
    (back / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt: not what --overwrite is meant to replace"):
        export_checkpoint(target, back, overwrite=True)
    (back / "notes.txt").unlink()
    export_checkpoint(target, back, overwrite=True, progress_bar=False)
    assert_same_bits(load_tensors(back), load_tensors(hf))


def test_no_export_of_this_tool_is_overwritten(hf, tmp_path):
    """A model that somebody else saved may be all there is of it."""
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds config.json and \d more: not what --overwrite is meant to replace"):
        export_checkpoint(tmp_path / "megatron", other, overwrite=True)
    assert_same_bits(load_tensors(other), load_tensors(hf))


@pytest.mark.parametrize("files", [["../hf/model.safetensors"], [3], "config.json", None])
def test_a_forged_list_of_files_cannot_reach_others(files, hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    (other / placing.RECORD).write_text(json.dumps({"files": files}))
    with pytest.raises(UserError, match="not what --overwrite is meant to replace"):
        export_checkpoint(tmp_path / "megatron", other, overwrite=True)
    assert placing.listed(other) == []


def test_two_do_not_write_into_one_folder(hf, tmp_path):
    busy = pytest.raises(UserError, match=r"another process is writing into .*megatron; wait for it")
    with output.claimed(tmp_path / "megatron"), busy:
        import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)


def test_of_two_models_in_a_folder_the_one_that_transformers_takes(hub, tmp_path):
    from transformers import Emu3ForCausalLM

    hf = save_emu3(tmp_path / "hf", "Emu3ForCausalLM", seed=1, shard="100KB")
    shutil.copyfile(hub("Emu3ForCausalLM") / "model.safetensors", hf / "model.safetensors")
    back = load_tensors(convert(hf, tmp_path))
    theirs = Emu3ForCausalLM.from_pretrained(hf, dtype=torch.float32).state_dict()
    assert_same_bits(back, dict(theirs))


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
        (["pytorch_model.bin"], "is a pickle, which is not read; save it as safetensors"),
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
    edit(template, lambda found: found.update({f"{name}2" if change == "extra" else name: found[name][1:].clone()}))
    with pytest.raises(UserError, match=rf"--hf-template: tensor {name}"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", template=template)


def test_a_template_of_the_image_tokenizer_alone_will_do(hub, tmp_path):
    template = Path(shutil.copytree(hub("transformers"), tmp_path / "template"))
    edit(template, lambda found: [found.pop(name) for name in list(found) if not name.startswith("vqmodel.")])
    back = convert(hub("Emu3ForCausalLM"), tmp_path, template=template)
    assert "vqmodel.encoder.conv_in.bias" in load_tensors(back)
    assert "text_model.lm_head.weight" in load_tensors(back)


def test_the_folder_that_is_read_is_not_written_to(hf, tmp_path):
    for target in (hf, hf / "inside", tmp_path):
        with pytest.raises(UserError, match="in each other's way"):
            import_checkpoint(hf, target, overwrite=True)


def test_too_little_space_is_said_before_anything_is_written(hf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1.00kB free, 1.00MB are needed" in refused(hf, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KB: less than the checkpoint's 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(hf, small_disk, tmp_path, monkeypatch):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    # As if another program took the space in the meantime.
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: plenty)
    for write in (
        lambda: import_checkpoint(hf, small_disk / "a", progress_bar=False),
        lambda: export_checkpoint(tmp_path / "megatron", small_disk / "b", progress_bar=False),
    ):
        with pytest.raises(UserError, match=r"--output: the disk of \S+ is full") as error:
            write()
        assert "\n" not in str(error.value)
        assert list(small_disk.iterdir()) == []


def test_a_conversion_that_fails_midway_leaves_nothing(hf, tmp_path, monkeypatch):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    from megatron_cca.checkpoint.huggingface import source, target

    def fail(self, name, start, stop):
        if "layers.3" in name:
            raise RuntimeError("bad sector")
        return original(self, name, start, stop)

    for cls, convert_it in (
        (source.HuggingFaceCheckpoint, lambda: import_checkpoint(hf, tmp_path / "a", progress_bar=False)),
        (
            target.MegatronCheckpoint,
            lambda: export_checkpoint(tmp_path / "megatron", tmp_path / "b", progress_bar=False),
        ),
    ):
        original = cls.read
        with monkeypatch.context() as patched:
            patched.setattr(cls, "read", fail)
            with pytest.raises(RuntimeError, match="bad sector"):
                convert_it()
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_without_one_of_its_tensors_is_refused(hf, tmp_path):
    folder = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    summary = json.loads((folder / layout.SUMMARY).read_text())
    summary["config"]["model"]["num_layers"] = 5
    (folder / layout.SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"decoder.layers.\S+ in .* has shape \[4, 64\], its sizes want \[5, 64\]"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")


def test_differences_are_named(hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    edit(hf, lambda found: found[UP][7].neg_())
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert found.differences == (f"{UP}: 64 of 11264 elements differ, the first in row 7",)
    edit_config(hf, max_position_embeddings=99)
    with pytest.raises(UserError, match=r"has max_position_embeddings 128, .* 99"):
        open_both(hf, tmp_path / "megatron")


def test_differences_in_the_image_tokenizer_are_named(hub, tmp_path):
    hf = Path(shutil.copytree(hub("transformers"), tmp_path / "hf"))
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    name = "vqmodel.encoder.conv_in.weight"
    edit(hf, lambda found: found[name][3].neg_())
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert len(found.differences) == 1
    assert re.fullmatch(rf"{name}: \d+ of \d+ elements differ, the first in row 3", found.differences[0])
    (folder,) = (tmp_path / "megatron").glob("iter_*")
    shutil.rmtree(folder / layout.COMPANION_TENSORS)
    summary = json.loads((folder / layout.SUMMARY).read_text())
    kept = {name: size for name, size in summary["files"].items() if not name.startswith(layout.COMPANION_TENSORS)}
    (folder / layout.SUMMARY).write_text(json.dumps({**summary, "files": kept}))
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert f"{name}: not in the checkpoint" in found.differences


def test_an_import_needs_no_transformers_for_the_original_form(hf, tmp_path):
    """Nor Megatron, nor a process group: a fresh process finds none of them imported."""
    code = """
import sys
from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
import_checkpoint(sys.argv[1], "megatron")
export_checkpoint("megatron", "back")
assert not {"transformers", "megatron.core"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(hf)], cwd=tmp_path, check=True, timeout=120)
    assert_same_bits(load_tensors(tmp_path / "back"), load_tensors(hf))


@pytest.mark.parametrize(
    ("relative", "finite", "agree"), [(9e-5, True, True), (2e-4, True, False), (0.0, False, False)]
)
def test_logits_agree_within_what_rounding_explains(relative, finite, agree):
    assert LogitComparison(1.0, relative, 1.0, finite, (1, 2, 3)).agree is agree


def test_extra_states_that_an_import_does_not_have_start_afresh(hf, tmp_path, monkeypatch):
    """Transformer Engine's layers ask for them; Megatron would refuse the whole checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_cca.checkpoint import distributed

    folder = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    asked = []
    monkeypatch.setattr(
        distributed.dist_checkpointing, "load", lambda state, path: asked.append([*state["model0"]]) or state
    )
    extra = ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (1,), (0,))
    state = distributed._load({"model0": {"linear_fc1._extra_state": extra}}, folder, "checkpoint")
    assert state == {"model0": {"linear_fc1._extra_state": None}}
    assert asked == [[]]
