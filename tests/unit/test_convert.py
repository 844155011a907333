"""Import and export as library calls: every form bit for bit, what travels along, what differences are told."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import (
    LogitComparison,
    compare_tensors,
    export_checkpoint,
    import_checkpoint,
    open_both,
    verifying,
)
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.weight_files import row_ranges
from tests.references.huggingface import (
    FORMS,
    UP_PROJ,
    assert_same_bits,
    convert,
    edit_config,
    edit_tensors,
    load_tensors,
    save_emu3,
)
from tests.references.resealed import reseal


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


def test_of_two_models_in_a_folder_the_one_that_transformers_takes(hub, tmp_path):
    from transformers import Emu3ForCausalLM

    hf = save_emu3(tmp_path / "hf", "Emu3ForCausalLM", seed=1, shard="100KB")
    shutil.copyfile(hub("Emu3ForCausalLM") / "model.safetensors", hf / "model.safetensors")
    back = load_tensors(convert(hf, tmp_path))
    theirs = Emu3ForCausalLM.from_pretrained(hf, dtype=torch.float32).state_dict()
    assert_same_bits(back, dict(theirs))


def test_a_template_of_the_image_tokenizer_alone_will_do(hub, tmp_path):
    template = Path(shutil.copytree(hub("transformers"), tmp_path / "template"))
    edit_tensors(template, lambda found: [found.pop(name) for name in list(found) if not name.startswith("vqmodel.")])
    back = convert(hub("Emu3ForCausalLM"), tmp_path, template=template)
    assert "vqmodel.encoder.conv_in.bias" in load_tensors(back)
    assert "text_model.lm_head.weight" in load_tensors(back)


def test_differences_are_named(hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    edit_tensors(hf, lambda found: found[UP_PROJ][7].neg_())
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert found.differences == (f"{UP_PROJ}: 64 of 11264 elements differ, the first in row 7",)
    edit_config(hf, max_position_embeddings=99)
    with pytest.raises(UserError, match=r"has max_position_embeddings 128, .* 99"):
        open_both(hf, tmp_path / "megatron")


def test_differences_are_counted_over_all_pieces(hf, tmp_path, monkeypatch):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    edit_tensors(hf, lambda found: found[UP_PROJ][70:170:10].neg_())
    monkeypatch.setattr(verifying, "row_ranges", partial(row_ranges, piece_bytes=10_000))
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert found.differences == (f"{UP_PROJ}: 640 of 11264 elements differ, the first in row 70",)


def test_the_same_numbers_in_another_width_are_not_the_same(hf, hub, tmp_path):
    import_checkpoint(hub("Emu3ForCausalLM", "bfloat16"), tmp_path / "megatron", progress_bar=False)
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert len(found.differences) == found.compared
    assert f"{UP_PROJ}: torch.float32 there, torch.bfloat16 in the checkpoint" in found.differences


def test_differences_in_the_image_tokenizer_are_named(hub, tmp_path):
    hf = Path(shutil.copytree(hub("transformers"), tmp_path / "hf"))
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    name = "vqmodel.encoder.conv_in.weight"
    edit_tensors(hf, lambda found: found[name][3].neg_())
    found = compare_tensors(*open_both(hf, tmp_path / "megatron"), progress_bar=False)
    assert len(found.differences) == 1
    assert re.fullmatch(rf"{name}: \d+ of \d+ elements differ, the first in row 3", found.differences[0])
    (folder,) = (tmp_path / "megatron").glob("iter_*")
    shutil.rmtree(folder / layout.COMPANION_TENSORS)
    reseal(folder)
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
