"""Janus-Pro's image tokenizer in every folder that holds it, against transformers' own and one in float64."""

import json

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.data.tokenizers import open_image_tokenizer
from tests.references.huggingface import edit_config, edit_tensors, load_tensors
from tests.references.image_tokenizers import pixels, refused
from tests.references.janus import CODES, FORMS, authors_name, random_janus, save_janus
from tests.references.llamagen_vq import decoded, encoded

PREFIX = "gen_vision_model."
# Of the side of the grids that transformers' decodes, 4 x 4, at 4 pixels a code.
IMAGES = (6, 16, 16, 3)


def authors_state(model):
    """The image tokenizer's tensors by the names of LlamaGen's authors."""
    names = {name: authors_name(name) for name in model.state_dict()}
    return {
        theirs.removeprefix(PREFIX): model.state_dict()[name]
        for name, theirs in names.items()
        if theirs.startswith(PREFIX)
    }


@pytest.fixture(scope="module")
def model():
    return random_janus()


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    return save_janus(tmp_path_factory.mktemp("vq") / "hf", request.param, shards=2)


@torch.no_grad()
def test_codes_and_pixels_are_those_of_transformers(folder, model):
    tokenizer = open_image_tokenizer(folder)
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.codebook_size) == ("llamagen-vq", 4, CODES)
    images = pixels(IMAGES)
    planes = images.movedim(-1, 1).float() / 127.5 - 1
    wanted = model.model.vqmodel.encode(planes).image_tokens.view(6, 4, 4)
    assert torch.equal(tokenizer.encode(images), wanted)
    assert wanted.unique().numel() > 10
    exact = model.decode_image_tokens(wanted.flatten(1))
    assert exact.std() > 0.1, "too flat to tell anything"
    assert (tokenizer.decode_floats(wanted) - exact).abs().max() <= 1e-4 * exact.abs().max()
    levels = ((exact + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (tokenizer.decode(wanted).int() - levels.int()).abs().max() <= 1


def test_every_form_and_llamagens_own_file_are_one_tokenizer(folder, model, tmp_path):
    torch.save({"model": authors_state(model)}, tmp_path / "vq_ds16_t2i.pt")
    assert open_image_tokenizer(folder).fingerprint() == open_image_tokenizer(tmp_path / "vq_ds16_t2i.pt").fingerprint()


@pytest.mark.parametrize("form", FORMS[:2])
def test_an_import_keeps_it(form, tmp_path):
    hf = save_janus(tmp_path / "hf", form, dtype=torch.bfloat16)
    kept = import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    found = open_image_tokenizer(kept / layout.COMPANION_FILES, weights=kept / layout.COMPANION_TENSORS)
    assert found.fingerprint() == open_image_tokenizer(hf).fingerprint()


@pytest.mark.parametrize("form", FORMS[:2])
def test_codes_are_directions_as_the_authors_have_it(form, tmp_path):
    """transformers compares lengths, too, which the released model's authors do not."""
    hf = save_janus(tmp_path / "hf", form)
    prefix = "model.vqmodel." if form == "transformers" else PREFIX
    longer = torch.linspace(0.5, 3, CODES)[:, None]
    edit_tensors(hf, lambda found: found[f"{prefix}quantize.embedding.weight"].mul_(longer))
    state = authors_state(random_janus())
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] * longer
    tokenizer, images = open_image_tokenizer(hf), pixels(IMAGES)
    codes = encoded(state, images)
    assert torch.equal(tokenizer.encode(images), codes)
    exact = decoded(state, codes)
    assert (tokenizer.decode_floats(codes).double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("form", "name"),
    [("transformers", "decoder.up.1.block.0.conv1.weight"), ("original", "decoder.conv_blocks.1.res.0.conv1.weight")],
)
def test_tensors_are_named_as_the_file_names_them(form, name, tmp_path):
    hf = save_janus(tmp_path / "hf", form)
    prefix = "model.vqmodel." if form == "transformers" else PREFIX
    whole = f"{prefix}{name}"
    edit_tensors(hf, lambda found: found.update({whole: found[whole][1:].clone()}))
    said = f"{hf}: {prefix}*: tensor {name}"
    assert refused(hf) == f"{said} has shape [31, 64, 3, 3], [32, 64, 3, 3] would fit the others"
    edit_tensors(hf, lambda found: found.pop(whole))
    assert refused(hf) == f"{said} is missing"


def test_a_folder_without_it_and_one_of_another_model_are_refused(tmp_path):
    hf = save_janus(tmp_path / "hf")
    table = "model.vqmodel.quantize.embedding.weight"
    edit_tensors(hf, lambda found: found[table][3].zero_())
    assert "vector 3 is zero, which has no direction" in refused(hf)
    edit_tensors(hf, lambda found: [found.pop(name) for name in list(found) if "vqmodel" in name])
    assert refused(hf) == f"{hf}: model.vqmodel.*: there are no such tensors"
    assert load_tensors(hf)
    edit_config(hf, model_type="llama")
    assert "model_type 'llama' is not Janus-Pro's: multi_modality or janus" in refused(hf)
    (hf / "config.json").write_text("{")
    assert refused(hf) == f"{hf / 'config.json'}: is not valid JSON"
    (hf / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    (hf / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(hf)
