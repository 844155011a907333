"""A LlamaGen of any size: sizes from the tensors' shapes, what they do not tell from the user, nothing guessed."""

import pytest
import torch

from megatron_cca.checkpoint.huggingface import compare_tensors, export_checkpoint, import_checkpoint, open_both
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import WeightsDescription
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import ModelConfig
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.llamagen import PRESETS
from megatron_cca.models.llamagen.weights import LLAMAGEN_WEIGHTS, LlamaGenWeightsFile
from megatron_cca.models.written_sizes import sizes_beside_preset
from tests.references import llamagen, thin
from tests.references.huggingface import refused
from tests.references.llamagen_in_megatron import whole_tensors

# 2 layers of 128 as the user had; other classes and another codebook, too.
SMALL = llamagen.Sizes(2, 128, 4, grid=5, codebook=256, classes=7, ffn=96)
GIVEN = {"num_attention_heads": 4, "max_position_embeddings": 26}


def saved(path, content):
    torch.save(content, path)
    return path


def imported(path, output, **options):
    return import_checkpoint(path, output, progress_bar=False, **options)


@pytest.fixture
def small(tmp_path):
    return saved(tmp_path / "small.pt", {"model": llamagen.random_weights(SMALL)})


def told(shapes, given=None, assumed=None):
    return LlamaGenWeightsFile().read_model_config(shapes, given or {}, assumed or {})


def test_what_shapes_do_not_tell_is_asked_for(small, tmp_path):
    message = refused(small, tmp_path)
    assert "looks like a LlamaGen of 2 layers of 128 (FFN 96), 256 codes, 7 classes, which is none of those" in message
    assert "do not tell num_attention_heads and max_position_embeddings; give --set model.num_attention_h" in message
    message = refused(small, tmp_path, sizes={"num_attention_heads": 4})
    assert "do not tell max_position_embeddings; give --set model.max_position_embeddings=577" in message


def test_any_size_goes_in_and_out_bit_for_bit(small, tmp_path):
    folder = imported(small, tmp_path / "out", sizes=GIVEN)
    model, state = saved_config(folder, "").model, llamagen.random_weights(SMALL)
    architecture = resolve_architecture(model)
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (2, 128, 96)
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (4, 4)
    assert (architecture.rotary_base, architecture.layernorm_epsilon) == (10_000, 1e-5)
    vocabulary = architecture.vocabulary
    assert (vocabulary.size, vocabulary.output_size, vocabulary.num_classes, vocabulary.null_class) == (
        264,
        256,
        7,
        263,
    )
    # Each row where an independent reading of Megatron's layout has it.
    stored, whole = StoredTensors(folder, "checkpoint"), whole_tensors(state, SMALL, 384)
    for tensor in LLAMAGEN_WEIGHTS.tensors(architecture):
        name = tensor.key.replace("layers.", f"layers.{tensor.layer}.")
        assert torch.equal(stored.read(tensor.key, tensor.layer, 0, tensor.num_rows), whole[name][: tensor.num_rows])
    source, target = open_both(small, tmp_path / "out")
    assert compare_tensors(source, target, progress_bar=False).identical
    again = export_checkpoint(tmp_path / "out", tmp_path / "again.pt", progress_bar=False)
    found = torch.load(again, weights_only=True)["model"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_the_sizes_that_a_run_must_name_make_the_same_model(small, tmp_path):
    model = saved_config(imported(small, tmp_path / "out", sizes=GIVEN), "").model
    own = sizes_beside_preset(model)
    assert own["codebook_size"] == 256
    run = load_config(None, [f"model.{key}={value}" for key, value in own.items()])
    assert resolve_architecture(run.model) == resolve_architecture(model)
    for name in PRESETS:
        architecture = PRESETS[name]
        assert resolve_architecture(ModelConfig(name=name)) == architecture


def test_verify_takes_the_checkpoints_word_unless_told_otherwise(small, tmp_path):
    imported(small, tmp_path / "out", sizes=GIVEN | {"rotary_base": 500.0})
    open_both(small, tmp_path / "out")
    with pytest.raises(UserError, match=r"has num_attention_heads 4, .*small.pt 8"):
        open_both(small, tmp_path / "out", WeightsDescription({"num_attention_heads": 8}))
    with pytest.raises(UserError, match=r"has rotary_base 500.0, .*small.pt 10000.0"):
        open_both(small, tmp_path / "out", WeightsDescription({"rotary_base": 10_000.0}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_layers": 3}, "model.num_layers: 3, but the tensors have 2; leave it out"),
        ({"num_classes": 1000}, "model.num_classes: 1000, but the tensors have 7; leave it out"),
        ({"transformer_impl": "local"}, "model.transformer_impl: is no size of the weights; leave it out"),
        ({"num_attention_heads": 3}, "model.num_attention_heads: 3 does not divide hidden_size 128"),
        ({"num_attention_heads": 0}, "model.num_attention_heads: must be 1 or more"),
        ({"max_position_embeddings": 27}, "model.max_position_embeddings: 27 is not 1 and a square"),
        ({"heads": 4}, "model.heads: unknown key"),
    ],
)
def test_what_is_given_must_fit(given, message, small, tmp_path):
    assert message in refused(small, tmp_path, sizes=GIVEN | given)


def test_released_sizes_need_nothing_whatever_their_codes_and_classes():
    shapes = dict(llamagen.shapes(llamagen.PUBLISHED["L"]))
    assert told(shapes).max_position_embeddings == 577
    shapes["cls_embedding.embedding_table.weight"] = (101, 1024)
    model = told(shapes)
    assert (model.name, model.num_attention_heads, model.num_classes, model.vocab_size) == (
        "llamagen-l",
        16,
        100,
        16_485,
    )
    assert resolve_architecture(model).vocabulary.num_classes == 100


def test_our_own_small_preset_says_nothing_of_other_peoples_models():
    sizes = llamagen.Sizes(4, 64, 4, grid=4, ffn=176)
    with pytest.raises(UserError, match=r"4 layers of 64 .* do not tell num_attention_heads and max_position"):
        told(llamagen.shapes(sizes))


def test_saved_frequencies_tell_heads_and_positions(tmp_path):
    state = llamagen.random_weights(SMALL) | {"freqs_cis": torch.zeros(26, 16, 2)}
    path = saved(tmp_path / "f.pt", state)
    model = saved_config(imported(path, tmp_path / "out"), "").model
    assert (model.num_attention_heads, model.max_position_embeddings) == (4, 26)
    message = refused(path, tmp_path / "no", sizes={"num_attention_heads": 8})
    assert message.endswith("model.num_attention_heads: 8, but the tensors have 4; leave it out")


def test_key_heads_follow_from_the_query_heads(tmp_path):
    state = llamagen.random_weights(SMALL)
    # 4 query heads and 2 key and value heads of 32 channels.
    state |= {name: value[:256] for name, value in state.items() if name.endswith("wqkv.weight")}
    path = saved(tmp_path / "grouped.pt", state)
    model = saved_config(imported(path, tmp_path / "out", sizes=GIVEN), "").model
    assert (model.num_attention_heads, model.num_query_groups) == (4, 2)
    source, target = open_both(path, tmp_path / "out")
    assert compare_tensors(source, target, progress_bar=False).identical
    message = refused(path, tmp_path / "no", sizes=GIVEN | {"num_attention_heads": 1})
    assert "tensor layers.0.attention.wqkv.weight has 256 rows, which 1 query heads cannot have" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.name=emu3-tiny", "model.num_classes=5"],
            "model.num_classes: this model's vocabulary has one size, 456",
        ),
        (["model.name=llamagen-tiny", "model.num_classes=5", "model.vocab_size=139"], "model.vocab_size: 139, but"),
    ],
)
def test_a_vocabulary_of_classes_has_sizes_of_its_own(overrides, message):
    with pytest.raises(UserError) as caught:
        resolve_architecture(load_config(None, overrides).model)
    assert str(caught.value).startswith(message)


def test_emu3_of_any_size_says_its_own(tmp_path):
    hf = thin.save_emu3(tmp_path / "hf", num_hidden_layers=3, num_key_value_heads=2)
    model = saved_config(imported(hf, tmp_path / "out"), "").model
    assert (model.num_layers, model.num_query_groups, model.vocab_size) == (3, 2, 184_622)
    message = refused(hf, tmp_path / "no", sizes={"num_attention_heads": 4})
    assert message == "model.num_attention_heads: a folder says it itself, in config.json; leave it out"
