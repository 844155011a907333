"""LlamaGen's .pt in and out: bit for bit, each row in its place, and whatever is no such file refused in one line."""

import shutil
import zipfile

import pytest
import torch

from megatron_cca.checkpoint.huggingface import compare_tensors, export_checkpoint, import_checkpoint, open_both
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.errors import UserError
from megatron_cca.io import output_folders
from megatron_cca.models.llamagen import PRESETS
from megatron_cca.models.llamagen.weights import LLAMAGEN_WEIGHTS
from tests.references import huggingface, llamagen
from tests.references.llamagen_in_megatron import whole_tensors

TINY = llamagen.Sizes(4, 64, 4, grid=4, codebook=128, classes=10, ffn=176)


def weights(dtype=torch.float32, **changed):
    return {name: value.to(dtype) for name, value in (llamagen.random_weights(TINY) | changed).items()}


def saved(path, content):
    torch.save(content, path)
    return path


def imported(path, output, **options):
    return import_checkpoint(path, output, progress_bar=False, **options)


def refused(path, folder, **options):
    message = huggingface.refused(path, folder, **options)
    assert message.startswith(f"--hf: {path}: ")
    return message.removeprefix(f"--hf: {path}: ")


def test_an_export_has_the_section_of_the_authors_programs(tmp_path):
    imported(saved(tmp_path / "c2i.pt", weights()), tmp_path / "checkpoint")
    output = export_checkpoint(tmp_path / "checkpoint", tmp_path / "again.pt", progress_bar=False)
    found = torch.load(output, weights_only=True)
    assert found.keys() == {"model"}
    assert found["model"].keys() == weights().keys()


def test_every_row_is_where_megatron_wants_it(tmp_path):
    state = weights()
    stored = StoredTensors(imported(saved(tmp_path / "c2i.pt", state), tmp_path / "checkpoint"), "checkpoint")
    whole = whole_tensors(state, TINY, 256)
    for tensor in LLAMAGEN_WEIGHTS.tensors(PRESETS["llamagen-tiny"]):
        name = tensor.key.replace("layers.", f"layers.{tensor.layer}.")
        found = stored.read(tensor.key, tensor.layer, 0, tensor.num_rows)
        assert torch.equal(found, whole[name][: tensor.num_rows]), name
    # Behind the codes, and behind the null class.
    assert not stored.read("output_layer.weight", None, 128, 256).any()
    assert not stored.read("embedding.word_embeddings.weight", None, 139, 256).any()


def test_the_size_of_the_image_is_the_preset_s_or_said(tmp_path):
    path = saved(tmp_path / "c2i.pt", weights())
    assert saved_config(imported(path, tmp_path / "a"), "").model.max_position_embeddings == 17
    folder = imported(path, tmp_path / "b", max_position_embeddings=65)
    model = saved_config(folder, "").model
    assert (model.name, model.max_position_embeddings, model.num_attention_heads) == ("llamagen-tiny", 65, 4)
    open_both(path, tmp_path / "b")
    assert "max_position_embeddings" in refused(path, tmp_path / "c", max_position_embeddings=66)


def test_a_changed_weight_is_found(tmp_path):
    imported(saved(tmp_path / "c2i.pt", weights()), tmp_path / "checkpoint")
    other = weights()
    other["layers.1.attention.wqkv.weight"][100, 3] += 1
    source, target = open_both(saved(tmp_path / "other.pt", other), tmp_path / "checkpoint")
    (difference,) = compare_tensors(source, target, progress_bar=False).differences
    assert difference.startswith("layers.1.attention.wqkv.weight")


def without(name):
    return {key: value for key, value in weights().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (weights() | {"cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2)}, "looks like LlamaGen's text-to-image"),
        ({"quantize.embedding.weight": torch.zeros(4, 2)}, "looks like an image tokenizer"),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 2)},
            "looks like a decoder as transformers names it",
        ),
        (
            {"fc.weight": torch.zeros(4, 2)},
            "is of no family known here (llamagen, var); it holds 1 tensors such as fc.weight",
        ),
        ({}, "it holds no tensors"),
        (
            llamagen.random_weights(llamagen.Sizes(2, 64, 4, codebook=128, classes=10, ffn=176)),
            "looks like a LlamaGen of 2 layers of 64 (FFN 176), 128 codes, 10 classes, which is none of those known",
        ),
        (without("layers.1.attention.wo.weight"), "tensor layers.1.attention.wo.weight is missing"),
        (weights(**{"layers.1.bias": torch.zeros(3)}), "tensor layers.1.bias belongs to no llamagen-tiny"),
        (weights(**{"norm.weight": torch.ones(65)}), "tensor norm.weight has shape [65], llamagen-tiny has [64]"),
        (weights() | {"norm.weight": torch.ones(64).half()}, "they must be alike"),
        ({"model": [1, 2]}, "must hold tensors by name"),
    ],
)
def test_another_model_is_told_what_it_looks_like(state, message, tmp_path):
    assert message in refused(saved(tmp_path / "x.pt", state), tmp_path)


def test_half_precision_is_no_dtype_of_models_here(tmp_path):
    path = saved(tmp_path / "x.pt", weights(torch.float16))
    with pytest.raises(UserError, match=r"torch.float16; models here are in float32 or bfloat16"):
        imported(path, tmp_path / "out")


class _Evil:
    def __reduce__(self):
        return print, ("called",)


def test_damaged_and_hostile_files_are_refused(tmp_path, capsys):
    path = saved(tmp_path / "evil.pt", weights() | {"norm.weight": _Evil()})
    assert "it asks for" in refused(path, tmp_path)
    assert capsys.readouterr().out == ""
    whole = saved(tmp_path / "whole.pt", weights()).read_bytes()
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"no weights"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        assert "is truncated or not what torch.save writes" in refused(tmp_path / name, tmp_path)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed archive" in refused(tmp_path / "bomb.pt", tmp_path)
    with pytest.raises(UserError, match=r"--hf: no file at .*nowhere.pt"):
        imported(tmp_path / "nowhere.pt", tmp_path / "out")


def test_an_export_replaces_nothing_unasked_and_has_one_form(tmp_path):
    imported(saved(tmp_path / "c2i.pt", weights()), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--output: .*folder: this family's weights are one file"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "folder", progress_bar=False)
    with pytest.raises(UserError, match=r"--output: .*c2i.pt exists; give another name or --overwrite"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "c2i.pt", progress_bar=False)
    with pytest.raises(UserError, match=r"--format: means nothing to llamagen-tiny"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "b.pt", form="original", progress_bar=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c2i.pt", "checkpoint"]


def test_a_disk_that_is_full_or_fills_up_is_one_line_and_leaves_nothing(small_disk, tmp_path, monkeypatch):
    imported(saved(tmp_path / "c2i.pt", weights()), tmp_path / "checkpoint")

    def refusal():
        with pytest.raises(UserError) as caught:
            export_checkpoint(tmp_path / "checkpoint", small_disk / "again.pt", progress_bar=False)
        assert list(small_disk.iterdir()) == []
        return str(caught.value)

    needed = sum(tensor.nbytes for tensor in weights().values()) // 1000
    assert refusal() == f"--output: the disk of {small_disk} has 614kB free, {needed}kB are needed"
    # As if another program took the space in the meantime.
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folders.shutil, "disk_usage", lambda path: plenty)
    assert refusal().startswith(f"--output: the disk of {small_disk}/again.pt is full (No space left on device)")
