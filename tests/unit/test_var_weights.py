"""VAR's .pth in and out: bit for bit, each row in its place, with the image tokenizer's tensors; how weights begin."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_cca.checkpoint.huggingface import compare_tensors, export_checkpoint, import_checkpoint, open_both
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import WeightsDescription
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import padded_vocab_size
from megatron_cca.models.gpt import build_gpt
from megatron_cca.models.initialization import initialize_by_name, sharded_tensors
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.models.var import PRESETS
from megatron_cca.models.var.weights import VAR_WEIGHTS, VarWeightsFile, read_features
from megatron_cca.parallel.ranks import initialize_distributed
from tests.references import huggingface, llamagen, var
from tests.references.var_in_megatron import frozen_tensors, whole_tensors

TINY = var.TINY
ODD = replace(TINY, layers=5, width=42, heads=7, codebook=37, classes=6, ffn_ratio=3)
TOKENIZER = "vae_ch160v4096z32.pth"
FEATURES = "embedding.features."


def weights(sizes=TINY, dtype=torch.float32, **changed):
    """As the authors' state_dict has them: trained tensors in ``dtype``, and buffers."""
    trained = {name: value.to(dtype) for name, value in var.random_weights(sizes).items()}
    zeros = {name: value.to(dtype) for name, value in var.buffers(sizes).items() if name.endswith("zero_k_bias")}
    return trained | var.buffers(sizes) | zeros | changed


def saved(folder, content, sizes=TINY, tokenizer=TOKENIZER):
    """The file of weights, with the image tokenizer's beside it."""
    folder.mkdir(exist_ok=True)
    torch.save(var.random_quantizer(sizes) | {"encoder.conv_in.weight": torch.zeros(3)}, folder / tokenizer)
    torch.save(content, folder / "var.pth")
    return folder / "var.pth"


def imported(path, output, **options):
    return import_checkpoint(path, output, progress_bar=False, **options)


def refused(content, folder, **options):
    path = saved(folder, content)
    message = huggingface.refused(path, folder, **options)
    assert message.startswith(f"--hf: {path}: ")
    return message.removeprefix(f"--hf: {path}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_go_in_and_come_out_bit_for_bit(dtype, tmp_path):
    state = weights(ODD, dtype)
    path = saved(tmp_path / "authors", state, ODD)
    imported(path, tmp_path / "checkpoint")
    source, target = open_both(path, tmp_path / "checkpoint")
    comparison = compare_tensors(source, target, progress_bar=False)
    assert comparison.identical
    # The authors' two buffers are not stored, the image tokenizer's three tensors are.
    assert comparison.compared == len(state) - 2 + 3
    output = export_checkpoint(tmp_path / "checkpoint", tmp_path / "again.pth", progress_bar=False)
    huggingface.assert_same_bits(torch.load(output, weights_only=True), state)


def of_trainer(quantizer):
    """As VAR's trainer saves: model and image tokenizer in one file."""
    parts = {"var_wo_ddp": weights(), "vae_local": quantizer, "var_opt": {"optimizer": {"state": {}}}}
    return {"epoch": 3, "iter": 0, "trainer": parts, "args": {"depth": 3}}


@pytest.mark.parametrize("has_another_beside", [False, True])
def test_a_file_of_the_trainer_brings_its_own_image_tokenizer(has_another_beside, tmp_path):
    own = var.random_quantizer(TINY, seed=5)
    if has_another_beside:
        saved(tmp_path, {})
    torch.save(of_trainer(own), tmp_path / "ar-ckpt-last.pth")
    folder = imported(tmp_path / "ar-ckpt-last.pth", tmp_path / "out")
    stored = StoredTensors(folder, "")
    for name, value in frozen_tensors(own, TINY).items():
        assert torch.equal(stored.read(name, None, 0, len(value)), value), name
    source, target = open_both(tmp_path / "ar-ckpt-last.pth", tmp_path / "out")
    assert compare_tensors(source, target, progress_bar=False).identical


def test_another_image_tokenizer_than_the_trainers_may_be_said(tmp_path):
    torch.save(of_trainer(var.random_quantizer(TINY, seed=5)), tmp_path / "ar-ckpt-last.pth")
    saved(tmp_path, {})
    folder = imported(tmp_path / "ar-ckpt-last.pth", tmp_path / "out", image_tokenizer=tmp_path / TOKENIZER)
    book = StoredTensors(folder, "").read(f"{FEATURES}codebook", None, 0, TINY.codebook)
    assert torch.equal(book, var.random_quantizer(TINY)["quantize.embedding.weight"])


def test_a_folder_of_files_says_what_it_holds(tmp_path):
    saved(tmp_path, weights())
    with pytest.raises(UserError) as caught:
        imported(tmp_path, tmp_path / "out")
    assert str(caught.value) == f"--hf: {tmp_path} holds {TOKENIZER}, var.pth; name one of them itself"
    for number in range(12):
        (tmp_path / f"var_{number:02}.pth").touch()
    with pytest.raises(UserError, match=r"holds vae.*, var_07.pth and 4 more; name one of them itself$"):
        imported(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_where_megatron_wants_it(dtype, tmp_path):
    state = weights(ODD, dtype)
    folder = imported(saved(tmp_path / "authors", state, ODD), tmp_path / "checkpoint")
    architecture = resolve_architecture(saved_config(folder, "").model)
    stored = StoredTensors(folder, "checkpoint")
    whole = whole_tensors(state, var.random_quantizer(ODD), ODD, 128)
    seen = set()
    for tensor in VAR_WEIGHTS.tensors(architecture):
        name = tensor.key.replace("layers.", f"layers.{tensor.layer}.")
        found = stored.read(tensor.key, tensor.layer, 0, tensor.num_rows)
        assert found.dtype == dtype
        assert torch.equal(found, whole[name][: tensor.num_rows].to(dtype)), name
        seen.add(name)
    for name in [name for name in whole if name.startswith(FEATURES)]:
        assert stored.dtype(name) == torch.float32
        assert torch.equal(stored.read(name, None, 0, len(whole[name])), whole[name]), name
        seen.add(name)
    assert seen == whole.keys()
    # Behind the codes.
    for name in ("output_layer.weight", "output_layer.bias"):
        assert not stored.read(name, None, ODD.codebook, 128).any()


def on_meta(sizes):
    return {name: torch.empty(shape, device="meta") for name, shape in var.shapes(sizes).items()}


@pytest.mark.parametrize("depth", var.PUBLISHED)
def test_released_sizes_are_recognised_by_shapes_alone(depth):
    sizes = var.PUBLISHED[depth]
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(sizes).items()}
    model = VarWeightsFile().read_model_config(shapes, {}, {})
    assert model.name == f"var-{depth}"
    architecture = resolve_architecture(model)
    assert architecture == PRESETS[model.name]
    expected = VAR_WEIGHTS.huggingface_shapes(architecture)
    trained = {name: shape for name, shape in expected.items() if not name.endswith("zero_k_bias")}
    assert trained == shapes


def test_the_number_of_parameters_is_the_plain_models():
    counts = {name: num_parameters(preset) for name, preset in PRESETS.items()}
    assert counts == {
        "var-d16": 310_283_520,
        "var-d20": 600_917_136,
        "var-d24": 1_033_399_360,
        "var-d30": 2_010_020_356,
        "var-tiny": var.num_parameters(TINY),
    }
    for depth, sizes in var.PUBLISHED.items():
        assert counts[f"var-{depth}"] == var.num_parameters(sizes)


def test_neither_import_nor_export_needs_megatron(tmp_path):
    state = weights()
    path = saved(tmp_path / "a", state)
    code = """
import sys
from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
import_checkpoint(sys.argv[1], "checkpoint")
export_checkpoint("checkpoint", "again.pth")
assert not {"transformers", "megatron.core"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=tmp_path, check=True, timeout=120)
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == state.keys()


def test_a_changed_weight_is_found(tmp_path):
    imported(saved(tmp_path / "a", weights()), tmp_path / "checkpoint")
    other = weights()
    # In the second half of the rows: the authors' shape has a dimension of one before them.
    other["pos_1LC"][0, 20, 3] += 1
    source, target = open_both(saved(tmp_path / "b", other), tmp_path / "checkpoint")
    (difference,) = compare_tensors(source, target, progress_bar=False).differences
    assert difference == "pos_1LC: 1 of 1008 elements differ, the first in row 20"


def test_a_changed_image_tokenizer_is_found(tmp_path):
    path = saved(tmp_path / "a", weights())
    imported(path, tmp_path / "checkpoint")
    other = var.random_quantizer(TINY)
    other["quantize.quant_resi.qresi_ls.2.bias"][3] += 1
    torch.save(other, tmp_path / "other.pth")
    source, target = open_both(
        path, tmp_path / "checkpoint", WeightsDescription(image_tokenizer=tmp_path / "other.pth")
    )
    (difference,) = compare_tensors(source, target, progress_bar=False).differences
    assert difference == f"{FEATURES}convolution_biases: 1 of 16 elements differ, the first in row 2"


def without(name):
    return {key: value for key, value in weights().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (weights() | {"shared_ada_lin.1.weight": torch.zeros(2, 2)}, "looks like VAR-d36 for 512 pixels"),
        (without("blocks.1.attn.zero_k_bias"), "tensor blocks.1.attn.zero_k_bias is missing"),
        (
            weights(**{"blocks.1.attn.zero_k_bias": torch.full((48,), 1e-9)}),
            "tensor blocks.1.attn.zero_k_bias is not zero, as it is in every var-tiny",
        ),
        (without("blocks.0.attn.scale_mul_1H11"), "tensor blocks.0.attn.scale_mul_1H11 is missing or has not 4 dim"),
        (without("blocks.2.ffn.fc2.bias"), "tensor blocks.2.ffn.fc2.bias is missing"),
        (weights(**{"blocks.1.bias": torch.zeros(3)}), "tensor blocks.1.bias belongs to no var-tiny"),
        (weights(pos_start=torch.zeros(1, 48)), "tensor pos_start has shape [1, 48], var-tiny has [1, 1, 48]"),
        (weights(lvl_1L=torch.zeros(1, 20)), "tensor lvl_1L has shape [1, 20], var-tiny has [1, 21]"),
        (weights(lvl_1L=torch.zeros(1, 21)), "tensor lvl_1L is not that of var-tiny; the scales differ"),
        (weights(pos_start=torch.zeros(1, 1, 48).half()), "they must be alike"),
        (
            weights(replace(TINY, scales=(1, 2, 3, 4))),
            "looks like a VAR of 3 layers of 48 (FFN 192), 4 heads, 256 codes, 10 classes, 30 codes an image, with 4 "
            "scales and features of 4 channels; known here are pyramids of 10 scales, 680 codes, 32 channels",
        ),
    ],
)
def test_another_model_is_told_what_it_looks_like(state, message, tmp_path):
    assert message in refused(state, tmp_path)


def test_a_size_that_the_tensors_do_not_have_is_refused(tmp_path):
    path = saved(tmp_path / "a", weights())
    with pytest.raises(UserError, match=r"model.num_attention_heads: 2, but the tensors have 4; leave it out"):
        imported(path, tmp_path / "out", sizes={"num_attention_heads": 2})


def test_buffers_that_follow_from_the_sizes_may_be_missing(tmp_path):
    state = {name: value for name, value in weights().items() if name not in ("lvl_1L", "attn_bias_for_masking")}
    imported(saved(tmp_path / "a", state), tmp_path / "checkpoint")
    output = export_checkpoint(tmp_path / "checkpoint", tmp_path / "again.pth", progress_bar=False)
    assert torch.load(output, weights_only=True).keys() == weights().keys()


def test_the_image_tokenizer_may_have_any_name_if_it_is_said(tmp_path):
    path = saved(tmp_path / "a", weights(), tokenizer="vae.pth")
    with pytest.raises(UserError) as caught:
        imported(path, tmp_path / "out")
    assert str(caught.value) == (
        f"--image-tokenizer: no file at {tmp_path}/a/{TOKENIZER}; var-tiny has frozen tensors of {TOKENIZER}, which "
        "FoundationVision/var on Hugging Face has; put it there or name it"
    )
    folder = imported(path, tmp_path / "out", image_tokenizer=tmp_path / "a" / "vae.pth")
    book = StoredTensors(folder, "").read(f"{FEATURES}codebook", None, 0, TINY.codebook)
    assert torch.equal(book, var.random_quantizer(TINY)["quantize.embedding.weight"])


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({"a": torch.zeros(2)}, "holds no tensor quantize.embedding.weight, so that it is no image tokenizer of VAR"),
        (var.random_quantizer(replace(TINY, codebook=41)), "weight has shape [41, 4], the model wants [256, 4]"),
        (var.random_quantizer(replace(TINY, phis=3)), "tensor quantize.quant_resi.qresi_ls.3.weight is missing"),
        (var.random_quantizer(replace(TINY, phis=5)), "qresi_ls.4.bias is one too many: VAR's scales share 4 conv"),
        (
            var.random_quantizer(TINY) | {"quantize.embedding.weight": torch.full((256, 4), torch.nan)},
            "tensor quantize.embedding.weight holds numbers that are not finite",
        ),
        (
            {"a": var.random_quantizer(TINY), "b": var.random_quantizer(TINY, seed=2)},
            "holds 2 image tokenizers that differ (a, b)",
        ),
    ],
)
def test_a_wrong_image_tokenizer_is_refused(quantizer, message, tmp_path):
    path = saved(tmp_path / "a", weights())
    torch.save(quantizer, path.with_name(TOKENIZER))
    with pytest.raises(UserError) as caught:
        imported(path, tmp_path / "out")
    assert str(caught.value).startswith(f"--image-tokenizer: {path.with_name(TOKENIZER)}: ")
    assert message in str(caught.value)


def test_who_needs_no_image_tokenizer_takes_none(hf, tmp_path):
    with pytest.raises(UserError, match=r"--image-tokenizer: a folder's model has no tensors of it; leave it out"):
        imported(hf, tmp_path / "out", image_tokenizer=tmp_path)
    sizes = llamagen.Sizes(4, 64, 4, grid=4, codebook=128, classes=10, ffn=176)
    torch.save(llamagen.random_weights(sizes), tmp_path / "c2i.pt")
    with pytest.raises(UserError, match=r"--image-tokenizer: llamagen-tiny has no tensors of it; leave it out"):
        imported(tmp_path / "c2i.pt", tmp_path / "out", image_tokenizer=tmp_path)


STD = 0.1


def begun(frozen):
    """All tensors of a new model, by name and layer."""
    config = load_config(None, ["model.name=var-tiny"])
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    (chunk,) = build_gpt(architecture, config.model, config.parallel, config.training)
    vocabulary = architecture.vocabulary
    sizes = {"num_layers": TINY.layers, "vocab_size": vocabulary.size, "output_size": vocabulary.output_size}
    initialize_by_name(chunk, seed=1, std=STD, frozen=frozen, **sizes)
    assert padded_vocab_size(architecture, config.model, 1) == 384
    shards = sharded_tensors(chunk.sharded_state_dict())
    return {(shard.key, *shard.global_offset[: shard.prepend_axis_num]): shard.data.clone() for shard in shards}


def test_a_new_model_begins_as_the_authors_do(tmp_path):
    path = saved(tmp_path / "a", {})
    frozen = read_features(path.with_name(TOKENIZER), PRESETS["var-tiny"])
    assert {name: value.tolist() for name, value in frozen.items()} == {
        name: value.tolist() for name, value in frozen_tensors(var.random_quantizer(TINY), TINY).items()
    }
    found = begun(frozen)
    shrunk = 1 / math.sqrt(2 * TINY.layers)
    factors = {
        "final_modulation.linear.weight": 0.5,
        "output_layer.weight": 0.02,
        "self_attention.linear_proj.weight": shrunk,
        "mlp.linear_fc2.weight": shrunk,
    }
    for (name, *_), value in found.items():
        if name in frozen:
            assert torch.equal(value.view_as(frozen[name]), frozen[name])
        elif name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("log_sharpness"):
            assert torch.equal(value, torch.full_like(value, math.log(4)))
        elif name.endswith("layers.modulation.linear.weight"):
            gates, rest = value.view(6, TINY.width, TINY.width).split([2, 4])
            assert gates.std().item() == pytest.approx(STD * 1e-5, rel=0.1)
            assert rest.std().item() == pytest.approx(STD * 0.5, rel=0.1)
        else:
            used = value[: TINY.codebook] if name == "output_layer.weight" else value
            factor = next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
            # The start of the first scale has but 48 numbers.
            assert used.std().item() == pytest.approx(STD * factor, rel=0.35 if used.numel() < 200 else 0.1), name
    assert not found["output_layer.weight",][TINY.codebook :].any()
    # Layers and tensors differ.
    assert len({value.flatten()[0].item() for (name, *_), value in found.items() if name.endswith("weight")}) > 10


def test_without_a_checkpoint_the_frozen_tensors_must_be_given():
    with pytest.raises(
        UserError, match=r"training.pretrained_checkpoint: none, and this model has tensors of an image"
    ):
        begun(None)
