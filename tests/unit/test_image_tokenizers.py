"""Image tokenizers: Emu3's VQ in every form against transformers' own forward, the demo's codebook, image sizes."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_cca.data.resizing import target_size
from megatron_cca.data.tokenizers import PatchCodebook, open_image_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq, uint8_pixels
from tests.references.emu3_vq import original_name, save_composite, save_original, small_vq

STILLS, CLIPS = (3, 16, 24, 3), (2, 8, 24, 8, 3)


@pytest.fixture(scope="module")
def model():
    return small_vq()


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    return save_original(model, tmp_path_factory.mktemp("vq") / "original")


@pytest.fixture
def spoilt(original, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "vq"))


def pixels(shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@torch.no_grad()
def transformers_codes(model, images, mean=0.5, std=0.5):
    """transformers' forward on normalised float32; whatever the sizes of a clip, nothing is cropped."""
    normalised = (images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    found = model.encode(normalised.movedim(-1, -3), image_sizes=[(10**6, 10**6)] * len(images))
    return torch.stack(list(found.image_tokens))


def postprocessed(values, mean=0.5, std=0.5):
    """Float ``[..., 3, H, W]`` as the image processor of transformers, whose formula is the authors', writes images."""
    from transformers import Emu3ImageProcessor

    processor = Emu3ImageProcessor(image_mean=mean, image_std=std)
    found = [
        np.asarray(processor.postprocess(plane, input_data_format="channels_first")["pixel_values"][0])
        for plane in values.flatten(0, -4)
    ]
    return torch.from_numpy(np.stack(found)).unflatten(0, values.shape[:-3])


@torch.no_grad()
def transformers_pixels(model, codes, mean=0.5, std=0.5):
    return postprocessed(model.decode(codes), mean, std)


def assert_nearly(ours, theirs):
    """Equal but for a grey level here and there, whose fraction lies at its end."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    differences = (ours.int() - theirs.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 0.01


def save_form(form, model, folder):
    if form == "original":
        return save_original(model, folder)
    if form == "saved":
        model.save_pretrained(folder)
        return folder
    return save_composite(model, folder, form)


@pytest.mark.parametrize("form", ["original", "saved", "vqmodel.", "model.vqmodel."])
def test_every_form_has_transformers_codes_and_pixels(form, model, original, tmp_path):
    tokenizer = open_image_tokenizer(save_form(form, model, tmp_path / "vq"))
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "emu3-vq",
        2,
        4,
        48,
    )
    for shape in (STILLS, CLIPS):
        codes = tokenizer.encode(pixels(shape))
        assert codes.dtype == torch.int64
        assert torch.equal(codes, transformers_codes(model, pixels(shape)))
        assert codes.unique().numel() > 5
        assert_nearly(tokenizer.decode(codes), transformers_pixels(model, codes))
    assert tokenizer.fingerprint() == open_image_tokenizer(original).fingerprint()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.down_block.down.0.block.1.nin_shortcut.bias", "encoder.down.0.block.1.nin_shortcut.bias"),
        ("encoder.down_block.down.3.attn_norms.1.weight", "encoder.down.3.attn.1.norm.weight"),
        ("encoder.down_block.down.3.attn.0.q_proj.weight", "encoder.down.3.attn.0.q.weight"),
        ("encoder.down_block.down.0.downsample.conv.weight", "encoder.down.0.downsample.conv.weight"),
        ("encoder.middle_block.attn_1.out_proj.bias", "encoder.mid.attn_1.proj_out.bias"),
        ("encoder.middle_block.attn_norm.weight", "encoder.mid.attn_1.norm.weight"),
        ("encoder.time_res_stack.0.norm1.running_var", "encoder.time_res_stack.0.norm1.running_var"),
        ("decoder.up_block.up.3.attn_norms.2.conv_y.weight", "decoder.up.3.attn.2.norm.conv_y.weight"),
        ("decoder.up_block.up.1.upsample.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("decoder.middle_block.attn_norm.norm_layer.weight", "decoder.mid.attn_1.norm.norm_layer.weight"),
        ("decoder.norm_out.norm_layer.weight", "decoder.norm_out.norm_layer.weight"),
        ("decoder.time_conv.1.conv.conv.weight", "decoder.time_conv.1.conv.conv.weight"),
        ("post_quant_conv.conv.weight", "post_quant_conv.conv.weight"),
        ("quantize.embedding.weight", "quantize.embedding.weight"),
    ],
)
def test_the_oracle_spells_the_originals_names(ours, theirs):
    assert original_name(ours) == theirs  # as in modeling_emu3visionvq.py


def test_an_image_does_not_depend_on_its_batch_nor_on_what_came_before(original):
    tokenizer = open_image_tokenizer(original)
    images = pixels(STILLS)
    codes = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
    tokenizer.encode(pixels(CLIPS))
    assert torch.equal(tokenizer.encode(images), codes)


def test_running_statistics_count(model, original, spoilt):
    edit_tensors(spoilt, lambda found: found["encoder.time_res_stack.0.norm1.running_mean"].add_(3.0))
    one, other = open_image_tokenizer(original), open_image_tokenizer(spoilt)
    assert not torch.equal(one.encode(pixels(STILLS)), other.encode(pixels(STILLS)))
    assert one.fingerprint() != other.fingerprint()


def test_autocast_does_not_reach_the_codes_nor_do_gradients_leave(original):
    tokenizer = open_image_tokenizer(original)
    codes = tokenizer.encode(pixels(STILLS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels(STILLS)), codes)
    assert not any(tensor.requires_grad for tensor in (codes, tokenizer.decode(codes)))


# By torch's older switches and by its newer ones, which may not be asked for in one process.
PRECISION = """
import sys, torch
from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq, uint8_pixels

cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
if sys.argv[2] == "older":
    torch.set_float32_matmul_precision("medium")
    cudnn.allow_tf32 = True
else:
    for place in (cuda.matmul, cudnn.conv, mkldnn.matmul):
        place.fp32_precision = "tf32"
def state():
    older = [torch.get_float32_matmul_precision(), cudnn.allow_tf32] if sys.argv[2] == "older" else []
    places = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    return [*older, *(place.fp32_precision for place in places), cudnn.deterministic]
tokenizer, before, inside = open_emu3_vq(sys.argv[1]), state(), []
hook = lambda *_: inside.extend(place.fp32_precision for place in (cudnn.conv, cuda.matmul, mkldnn.matmul))
tokenizer._model.encoder.register_forward_hook(hook)
tokenizer.encode(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
assert not {"tf32", "bf16"} & {*inside} and len(inside) == 3, inside
assert state() == before, (before, state())
"""


@pytest.mark.parametrize("switches", [pytest.param("older", marks=pytest.mark.full), "newer"])
def test_a_lower_precision_of_the_program_does_not_reach_the_codes(switches, original):
    found = subprocess.run(
        [sys.executable, "-c", PRECISION, str(original), switches], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr


def test_an_empty_batch_has_shapes_too(original):
    tokenizer = open_image_tokenizer(original)
    assert tokenizer.encode(pixels((0, 8, 4, 3))).shape == (0, 4, 2)
    assert tokenizer.encode(pixels((0, 4, 8, 4, 3))).shape == (0, 1, 4, 2)
    assert tokenizer.decode(torch.zeros(0, 4, 2, dtype=torch.int64)).shape == (0, 8, 4, 3)
    assert tokenizer.decode(torch.zeros(0, 1, 4, 2, dtype=torch.int64)).shape == (0, 4, 8, 4, 3)


def test_half_precision_on_disk_and_in_memory(model, original, spoilt):
    edit_tensors(spoilt, lambda found: found.update({name: t.bfloat16() for name, t in found.items() if t.dim()}))
    tokenizer = open_image_tokenizer(spoilt)
    assert tokenizer.decode(tokenizer.encode(pixels(STILLS))).shape == STILLS
    assert tokenizer.fingerprint() != open_image_tokenizer(original).fingerprint()
    fast = open_emu3_vq(original, dtype=torch.bfloat16)
    assert fast.encode(pixels(STILLS)).shape == (3, 8, 12)
    assert fast.decode(fast.encode(pixels(CLIPS))).dtype == torch.uint8
    assert fast.fingerprint() == open_image_tokenizer(original).fingerprint()


CLIP_MEAN, CLIP_STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.mark.parametrize(
    ("file", "content", "mean", "std"),
    [
        (None, None, 0.5, 0.5),
        ("preprocessor_config.json", {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}, CLIP_MEAN, CLIP_STD),
        ("preprocessor_config.json", {"image_mean": 0.25, "image_std": None, "rescale_factor": 1 / 255}, 0.25, 0.5),
        ("processor_config.json", {"image_processor": {"image_mean": CLIP_MEAN}}, CLIP_MEAN, 0.5),
        ("processor_config.json", {"processor_class": "Emu3Processor"}, 0.5, 0.5),
    ],
)
def test_normalisation_is_the_folders_own_and_else_one_half(file, content, mean, std, model, spoilt):
    (spoilt / "preprocessor_config.json").unlink()
    if file:
        (spoilt / file).write_text(json.dumps(content))
    tokenizer = open_image_tokenizer(spoilt)
    codes = tokenizer.encode(pixels(STILLS))
    assert torch.equal(codes, transformers_codes(model, pixels(STILLS), mean, std))
    assert_nearly(tokenizer.decode(codes), transformers_pixels(model, codes, mean, std))


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (CLIP_MEAN, CLIP_STD), (0.25, [0.3, 0.7, 1.1])])
def test_fractions_of_grey_levels_are_cut_off_as_the_authors_do(mean, std):
    values = torch.randn(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    values[0, 0, :, 0] = torch.linspace(-1, 1, 24)
    # What encoding makes of every grey level, and what lies beyond white and black.
    values[0, 1, :, 1:12] = ((torch.arange(264) / 255 - 0.5) / 0.5).view(11, 24)
    values[0, 2, :, 0, :2] = torch.tensor([1e4, -1e4])
    found = uint8_pixels(values, *(each if isinstance(each, list) else [each] * 3 for each in (mean, std)))
    assert (found.dtype, found.shape) == (torch.uint8, (2, 4, 16, 24, 3)) and found.is_contiguous()
    assert torch.equal(found, postprocessed(values, mean, std))
    assert found.min() == 0 and found.max() == 255


def test_of_two_processors_transformers_first_counts(original, spoilt):
    section = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (spoilt / "preprocessor_config.json").write_text(json.dumps(section))
    other = open_image_tokenizer(spoilt).fingerprint()
    shutil.copyfile(original / "preprocessor_config.json", spoilt / "preprocessor_config.json")
    (spoilt / "processor_config.json").write_text(json.dumps({"image_processor": section}))
    assert open_image_tokenizer(spoilt).fingerprint() == other != open_image_tokenizer(original).fingerprint()


def test_what_transformers_processor_saves_is_followed(model, spoilt):
    from transformers import Emu3ImageProcessor

    processor = Emu3ImageProcessor(do_resize=False)
    processor.save_pretrained(spoilt)
    images = pixels(STILLS)
    theirs = processor(list(images.numpy()), return_tensors="pt")["pixel_values"].reshape(3, 3, 16, 24).float()
    with torch.no_grad():
        codes = torch.stack(model.encode(theirs, image_sizes=[(16, 24)] * 3).image_tokens)
    assert torch.equal(open_image_tokenizer(spoilt).encode(images), codes)


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
def test_pixels_that_cannot_be_are_refused(given_pixels, message, original):
    with pytest.raises(UserError) as error:
        open_image_tokenizer(original).encode(given_pixels)
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
def test_codes_that_cannot_be_are_refused(codes, message, original):
    with pytest.raises(UserError) as error:
        open_image_tokenizer(original).decode(codes)
    assert message in str(error.value)


def edit_tensors(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, **options):
    with pytest.raises(UserError) as error:
        open_image_tokenizer(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


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
def test_tensors_that_are_not_the_models_are_named(change, message, spoilt):
    edit_tensors(spoilt, change)
    found = refused(spoilt)
    assert found.startswith(str(spoilt))
    assert message in found


def test_a_counter_of_training_batches_may_be_missing(spoilt, original):
    edit_tensors(
        spoilt, lambda found: [found.pop(name) for name in list(found) if name.endswith("num_batches_tracked")]
    )
    assert open_image_tokenizer(spoilt).fingerprint() == open_image_tokenizer(original).fingerprint()


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
def test_configurations_that_cannot_be_are_named(values, message, spoilt):
    edit_config(spoilt, **values)
    found = refused(spoilt)
    assert found.startswith(str(spoilt))
    assert message in found


def test_the_width_of_transformers_attention_is_checked(model, tmp_path):
    model.save_pretrained(tmp_path)
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
def test_a_damaged_processor_is_named(content, message, spoilt):
    path = spoilt / "preprocessor_config.json"
    path.write_text(content)
    assert refused(spoilt).startswith(f"{path}: {message}")


def test_missing_and_damaged_files_are_named(spoilt, tmp_path):
    assert refused(tmp_path / "nowhere").startswith(f"no file or folder at {tmp_path / 'nowhere'}")
    assert refused(tmp_path).startswith(f"{tmp_path} holds no image tokenizer: neither codebook.npy nor")
    file = spoilt / "model.safetensors"
    for size in (-1, 1000, 5, 0):
        file.write_bytes(file.read_bytes()[:size])
        assert refused(spoilt).startswith(f"{spoilt}: model.safetensors is truncated or not a safetensors file: ")
    file.unlink()
    (spoilt / "pytorch_model.bin").write_bytes(b"")
    assert refused(spoilt).endswith("(pytorch_model.bin is a pickle, which is not read; save it as safetensors)")
    (spoilt / "config.json").write_text("[" * 10**5)
    assert refused(spoilt) == f"{spoilt / 'config.json'}: is not valid JSON"


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
def test_a_damaged_index_is_named(weight_map, message, model, tmp_path):
    save_composite(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert message in refused(tmp_path)


def test_a_shard_that_is_missing_or_another_is_named(model, tmp_path):
    save_composite(model, tmp_path)
    first, second = (tmp_path / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    shutil.copyfile(second, first)
    assert "is not in model-00001-of-00003.safetensors, where model.safetensors.index.json says" in refused(tmp_path)
    first.unlink()
    assert "model-00001-of-00003.safetensors is missing" in refused(tmp_path)


def test_a_device_that_is_not_there_is_named(original):
    assert refused(original, device="gpu").startswith("device gpu: ")


@pytest.fixture
def codebook(tmp_path):
    centres = np.random.default_rng(0).uniform(0, 255, (16, 2, 2)).astype(np.float32)
    PatchCodebook(centres).save(tmp_path)
    return PatchCodebook(centres), tmp_path


def test_a_patch_codebook_sees_grey_as_pil_does(codebook):
    patches, folder = codebook
    tokenizer = open_image_tokenizer(folder)
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "patch-codebook",
        2,
        0,
        16,
    )
    images = pixels((5, 32, 64, 3))
    grey = np.stack([np.asarray(Image.fromarray(image.numpy()).convert("L")) for image in images])
    codes = tokenizer.encode(images)
    assert torch.equal(codes, torch.from_numpy(patches.encode(grey)))
    back = tokenizer.decode(codes)
    assert back.dtype == torch.uint8
    assert all(np.array_equal(back[..., channel].numpy(), patches.decode(codes.numpy())) for channel in range(3))
    grey_images = torch.from_numpy(grey)[..., None].repeat(1, 1, 1, 3)
    assert torch.equal(tokenizer.encode(grey_images), codes)


def test_grey_is_pils_to_the_last_level(tmp_path):
    PatchCodebook(np.arange(256, dtype=np.float32).reshape(256, 1, 1)).save(tmp_path)
    images = pixels((1, 256, 256, 3))
    grey = np.asarray(Image.fromarray(images[0].numpy()).convert("L"))
    assert np.array_equal(open_image_tokenizer(tmp_path).encode(images)[0].numpy(), grey)


def test_a_patch_codebooks_limits(codebook):
    patches, folder = codebook
    tokenizer = open_image_tokenizer(folder)
    with pytest.raises(UserError, match=r"pixels: must be uint8 \[N, H, W, 3\], found"):
        tokenizer.encode(pixels((1, 4, 4, 4, 3)))
    with pytest.raises(UserError, match="codes: 16 does not fit a codebook of 16"):
        tokenizer.decode(torch.full((1, 2, 2), 16))
    before = tokenizer.fingerprint()
    PatchCodebook(patches.centres + 1).save(folder)
    assert open_image_tokenizer(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2, 3), np.float32), "must have the shape [K, P, P], has [4, 2, 3]"),
        (np.zeros((0, 2, 2), np.float32), "must have the shape [K, P, P], has [0, 2, 2]"),
        (np.zeros((4, 2, 2)), "must hold one float32 array"),
        (np.array([{}], dtype=object), "is damaged or not a codebook: "),
        (np.full((4, 2, 2), np.nan, np.float32), "holds numbers that are not finite"),
    ],
)
def test_a_damaged_codebook_is_named(array, message, tmp_path):
    path = tmp_path / "codebook.npy"
    np.save(path, array)
    assert refused(tmp_path).startswith(f"{path}: {message}")


def test_a_codebooks_file_that_is_cut_or_boasts_is_named(codebook):
    _, folder = codebook
    path = folder / "codebook.npy"
    content = path.read_bytes()
    boast = content.replace(b"(16, 2, 2), }      ", b"(16000000, 2, 2), }")
    assert boast != content
    for damaged in (content[:-1], content[:20], b"", b"PK\3\4", boast):
        path.write_bytes(damaged)
        assert refused(folder).startswith(f"{path}: is damaged or not a codebook: ")


def restated_size(height, width, area, factor):
    """prepare_data.py's smart_resize, then the image processor's, written once more."""
    scale = (area / (height * width)) ** 0.5
    sides = [round(side * scale) for side in (height, width)]
    if min(sides) < factor or max(sides) / min(sides) > 5:
        return None
    tokens = [round(side / factor) for side in sides]
    found = tokens[0] * tokens[1] * factor * factor
    least, most = min(512**2, area), max(1024**2, area)
    if found > most:
        tokens = [math.floor(side / math.sqrt(sides[0] * sides[1] / most) / factor) for side in sides]
    elif found < least:
        tokens = [math.ceil(side * math.sqrt(least / (sides[0] * sides[1])) / factor) for side in sides]
    return tokens[0] * factor, tokens[1] * factor


@pytest.mark.parametrize(
    ("size", "area", "grid"),
    [
        ((1000, 1000), 720 * 720, (90, 90)),
        ((1200, 1600), 720 * 720, (78, 104)),
        ((1080, 1920), 720 * 720, (68, 120)),
        ((2000, 3000), 720 * 720, (74, 110)),  # 588 / 8 = 73.5 goes to the even neighbour
        ((3000, 2000), 720 * 720, (110, 74)),
        ((300, 300), 512 * 512, (64, 64)),
        ((300, 400), 512 * 512, (56, 74)),  # below the area, so rounded up
        ((100, 100), 64 * 64, (8, 8)),
        ((5000, 1000), 720 * 720, (201, 40)),
        ((4000, 3000), 2048 * 2048, (295, 221)),  # above the area, so rounded down
    ],
)
def test_known_grids(size, area, grid):
    assert target_size(*size, area, 8) == (grid[0] * 8, grid[1] * 8) == restated_size(*size, area, 8)


@settings(max_examples=500, deadline=None)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    area=st.one_of(st.integers(1, 5000), st.integers(1, 3_000_000), st.sampled_from([512**2, 720**2, 1024**2])),
    factor=st.sampled_from([1, 2, 8, 16]),
)
def test_sizes_are_emu3s(height, width, area, factor):
    expected = restated_size(height, width, area, factor)
    if expected is None:
        with pytest.raises(
            ValueError, match=r"^(aspect ratio [\d.]+ is beyond 5, which|\d+ x \d+ pixels at an area of)"
        ):
            target_size(height, width, area, factor)
    else:
        assert target_size(height, width, area, factor) == expected
        assert min(expected) >= factor
        assert not any(side % factor for side in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 730, 720 * 720, 8), "aspect ratio 7.32 is beyond 5, which Emu3's own processor refuses"),
        ((1000, 5030, 720 * 720, 8), "aspect ratio 5.04 is beyond 5"),
        ((10, 10, 49, 8), "7 x 7 pixels at an area of 49: a side is below the 8 of one token"),
        ((1, 10**6, 720 * 720, 8), "1 x 720000 pixels at an area of 518400: a side is below"),
        ((0, 10, 64, 8), "height must be a positive integer below 2**31, found 0"),
        ((10, 10.5, 64, 8), "width must be a positive integer below 2**31, found 10.5"),
        ((10, 10, True, 8), "area must be a positive integer below 2**31, found True"),
        ((10, 10, 10**400, 8), "area must be a positive integer below 2**31, found 1000"),
    ],
)
def test_sizes_that_cannot_be_are_said(arguments, message):
    with pytest.raises(ValueError) as error:
        target_size(*arguments)
    assert message in str(error.value)
