"""Emu3's image tokenizer, in every form, against transformers' own forward: the same codes, and the same pixels."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq, uint8_pixels
from tests.references.emu3_vq import original_name, save_composite, save_original
from tests.references.huggingface import edit_tensors
from tests.references.image_tokenizers import pixels

STILLS, CLIPS = (3, 16, 24, 3), (2, 8, 24, 8, 3)


@torch.no_grad()
def transformers_codes(vq_model, images, mean=0.5, std=0.5):
    """transformers' forward on normalised float32; whatever the sizes of a clip, nothing is cropped."""
    normalised = (images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    found = vq_model.encode(normalised.movedim(-1, -3), image_sizes=[(10**6, 10**6)] * len(images))
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
def transformers_pixels(vq_model, codes, mean=0.5, std=0.5):
    return postprocessed(vq_model.decode(codes), mean, std)


def assert_nearly(ours, theirs):
    """Equal but for a grey level here and there, whose fraction lies at its end."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    differences = (ours.int() - theirs.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 0.01


def save_form(form, vq_model, folder):
    if form == "original":
        return save_original(vq_model, folder)
    if form == "saved":
        vq_model.save_pretrained(folder)
        return folder
    return save_composite(vq_model, folder, form)


@pytest.mark.parametrize("form", ["original", "saved", "vqmodel.", "model.vqmodel."])
def test_every_form_has_transformers_codes_and_pixels(form, vq_model, vq_folder, tmp_path):
    tokenizer = open_image_tokenizer(save_form(form, vq_model, tmp_path / "vq"))
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "emu3-vq",
        2,
        4,
        48,
    )
    for shape in (STILLS, CLIPS):
        codes = tokenizer.encode(pixels(shape))
        assert codes.dtype == torch.int64
        assert torch.equal(codes, transformers_codes(vq_model, pixels(shape)))
        assert codes.unique().numel() > 5
        assert_nearly(tokenizer.decode(codes), transformers_pixels(vq_model, codes))
    assert tokenizer.fingerprint() == open_image_tokenizer(vq_folder).fingerprint()


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


def test_an_image_does_not_depend_on_its_batch_nor_on_what_came_before(vq_folder):
    tokenizer = open_image_tokenizer(vq_folder)
    images = pixels(STILLS)
    codes = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
    tokenizer.encode(pixels(CLIPS))
    assert torch.equal(tokenizer.encode(images), codes)


def test_running_statistics_count(vq_model, vq_folder, spoilt_vq):
    edit_tensors(spoilt_vq, lambda found: found["encoder.time_res_stack.0.norm1.running_mean"].add_(3.0))
    one, other = open_image_tokenizer(vq_folder), open_image_tokenizer(spoilt_vq)
    assert not torch.equal(one.encode(pixels(STILLS)), other.encode(pixels(STILLS)))
    assert one.fingerprint() != other.fingerprint()


def test_autocast_does_not_reach_the_codes_nor_do_gradients_leave(vq_folder):
    tokenizer = open_image_tokenizer(vq_folder)
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
def test_a_lower_precision_of_the_program_does_not_reach_the_codes(switches, vq_folder):
    found = subprocess.run(
        [sys.executable, "-c", PRECISION, str(vq_folder), switches], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr


def test_an_empty_batch_has_shapes_too(vq_folder):
    tokenizer = open_image_tokenizer(vq_folder)
    assert tokenizer.encode(pixels((0, 8, 4, 3))).shape == (0, 4, 2)
    assert tokenizer.encode(pixels((0, 4, 8, 4, 3))).shape == (0, 1, 4, 2)
    assert tokenizer.decode(torch.zeros(0, 4, 2, dtype=torch.int64)).shape == (0, 8, 4, 3)
    assert tokenizer.decode(torch.zeros(0, 1, 4, 2, dtype=torch.int64)).shape == (0, 4, 8, 4, 3)


def test_half_precision_on_disk_and_in_memory(vq_model, vq_folder, spoilt_vq):
    edit_tensors(spoilt_vq, lambda found: found.update({name: t.bfloat16() for name, t in found.items() if t.dim()}))
    tokenizer = open_image_tokenizer(spoilt_vq)
    assert tokenizer.decode(tokenizer.encode(pixels(STILLS))).shape == STILLS
    assert tokenizer.fingerprint() != open_image_tokenizer(vq_folder).fingerprint()
    fast = open_emu3_vq(vq_folder, dtype=torch.bfloat16)
    assert fast.encode(pixels(STILLS)).shape == (3, 8, 12)
    assert fast.decode(fast.encode(pixels(CLIPS))).dtype == torch.uint8
    assert fast.fingerprint() == open_image_tokenizer(vq_folder).fingerprint()


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
def test_normalisation_is_the_folders_own_and_else_one_half(file, content, mean, std, vq_model, spoilt_vq):
    (spoilt_vq / "preprocessor_config.json").unlink()
    if file:
        (spoilt_vq / file).write_text(json.dumps(content))
    tokenizer = open_image_tokenizer(spoilt_vq)
    codes = tokenizer.encode(pixels(STILLS))
    assert torch.equal(codes, transformers_codes(vq_model, pixels(STILLS), mean, std))
    assert_nearly(tokenizer.decode(codes), transformers_pixels(vq_model, codes, mean, std))


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


def test_of_two_processors_transformers_first_counts(vq_folder, spoilt_vq):
    section = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (spoilt_vq / "preprocessor_config.json").write_text(json.dumps(section))
    other = open_image_tokenizer(spoilt_vq).fingerprint()
    shutil.copyfile(vq_folder / "preprocessor_config.json", spoilt_vq / "preprocessor_config.json")
    (spoilt_vq / "processor_config.json").write_text(json.dumps({"image_processor": section}))
    assert open_image_tokenizer(spoilt_vq).fingerprint() == other != open_image_tokenizer(vq_folder).fingerprint()


def test_what_transformers_processor_saves_is_followed(vq_model, spoilt_vq):
    from transformers import Emu3ImageProcessor

    processor = Emu3ImageProcessor(do_resize=False)
    processor.save_pretrained(spoilt_vq)
    images = pixels(STILLS)
    theirs = processor(list(images.numpy()), return_tensors="pt")["pixel_values"].reshape(3, 3, 16, 24).float()
    with torch.no_grad():
        codes = torch.stack(vq_model.encode(theirs, image_sizes=[(16, 24)] * 3).image_tokens)
    assert torch.equal(open_image_tokenizer(spoilt_vq).encode(images), codes)
