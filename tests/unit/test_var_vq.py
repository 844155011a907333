"""VAR's image tokenizer against an independent one in float64, and everything that it refuses."""

import argparse

import pytest
import torch
from PIL import Image

from megatron_cca.data.inspection import decoded_samples
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import check_scales, open_image_tokenizer
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.models.llamagen.image_tokenizer import open_llamagen_vq
from megatron_cca.models.scale_quantizer import quantized
from megatron_cca.models.var import PRESETS
from megatron_cca.models.var.image_tokenizer import open_var_vq
from megatron_cca.models.var.weights import read_features
from tests.references import llamagen_vq, var
from tests.references.image_tokenizers import pixels, refused
from tests.references.var_vq import RELEASED, TINY, decoded, encoded, levels, random_var_vq, save_var_vq, shapes

# Ten scales, the last of 16 codes a side, of 2 pixels each.
IMAGES, NUM_CODES = (3, 32, 32, 3), 680
# Three scales, for images of 8 pixels.
FEW = (1, 2, 4)
HITS, TABLE = "quantize.ema_vocab_hit_SV", "quantize.embedding.weight"


def codes_of(number, codes=NUM_CODES, seed=0):
    return torch.randint(0, TINY["codebook"][0], (number, 1, codes), generator=torch.Generator().manual_seed(seed))


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def state():
    return random_var_vq()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    return save_var_vq(state, tmp_path_factory.mktemp("vq") / "vae_ch160v4096z32.pth")


@pytest.fixture(scope="module")
def tokenizer(file):
    return open_image_tokenizer(file)


def assert_decodes_as(tokenizer, state, codes, scales=var.RELEASED_SCALES):
    """Within 1e-5 of the largest in float; in levels, equal but where a fraction was next to a whole level."""
    exact = decoded(state, codes, scales)
    assert exact.std() > 0.2, "too flat to tell anything"
    found = tokenizer.decode_floats(codes).double()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    differences = (tokenizer.decode(codes).int() - levels(exact).int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 1e-3


def test_codes_and_pixels_are_the_references(tokenizer, state):
    assert (tokenizer.kind, tokenizer.spatial_factor, tokenizer.temporal_factor, tokenizer.codebook_size) == (
        "var-vq",
        2,
        0,
        256,
    )
    assert tokenizer.scales == var.RELEASED_SCALES
    codes = tokenizer.encode(pixels(IMAGES))
    assert (codes.dtype, codes.shape) == (torch.int64, (3, 1, NUM_CODES))
    assert torch.equal(codes, encoded(state, pixels(IMAGES)))
    assert codes.unique().numel() > 20
    assert_decodes_as(tokenizer, state, codes_of(2))


@pytest.mark.full
def test_the_released_sizes(tmp_path):
    """Of an image of three scales, since the whole ten take minutes in float64."""
    state = random_var_vq(RELEASED)
    path = save_var_vq(state, tmp_path / "vae.pth")
    assert open_image_tokenizer(path).scales == var.RELEASED_SCALES
    tokenizer = open_image_tokenizer(path, scales=FEW)
    assert (tokenizer.spatial_factor, tokenizer.codebook_size) == (16, 4096)
    images = pixels((1, 64, 64, 3))
    assert torch.equal(tokenizer.encode(images), encoded(state, images, FEW))
    codes = torch.randint(0, 4096, (1, 1, 21), generator=torch.Generator().manual_seed(0))
    assert_decodes_as(tokenizer, state, codes, FEW)


def test_the_released_one_has_the_authors_number_of_parameters():
    """As their VQVAE of 160 channels counts them."""
    assert sum(torch.Size(shape).numel() for shape in shapes(RELEASED).values()) == 108_948_355


def test_other_scales_are_given_by_who_knows_them(state, file, tmp_path):
    path = save_var_vq(random_var_vq(scales=3), tmp_path / "vae.pth")
    assert "is of 3 scales (quantize.ema_vocab_hit_SV), whose sides no file tells; known are the 10 of" in refused(path)
    for given in (file, path, save_var_vq({k: v for k, v in state.items() if k != HITS}, tmp_path / "no_hits.pth")):
        tokenizer = open_image_tokenizer(given, scales=FEW)
        images = pixels((4, 8, 8, 3))
        codes = tokenizer.encode(images)
        assert codes.shape == (4, 1, 21)
        assert torch.equal(codes, encoded(state, images, FEW))
        assert_decodes_as(tokenizer, state, codes_of(4, 21), FEW)
    assert open_image_tokenizer(file, scales=FEW).fingerprint() != open_image_tokenizer(file).fingerprint()
    assert open_image_tokenizer(file, scales=()).fingerprint() == open_image_tokenizer(file).fingerprint()


def test_images_go_there_and_back_as_the_references_do(tokenizer, state):
    images = tokenizer.decode(tokenizer.encode(pixels(IMAGES)))
    exact = levels(decoded(state, encoded(state, pixels(IMAGES))))
    assert (images.dtype, images.shape) == (torch.uint8, IMAGES)
    assert (images.int() - exact.int()).abs().max() <= 1


def test_vectors_of_the_codebook_come_back(state, tmp_path):
    """Of a single scale, where the convolutions copy: nothing is left over, and nothing is lost."""
    changed = {name: tensor.clone() for name, tensor in state.items()}
    for phi in range(4):
        changed[f"quantize.quant_resi.qresi_ls.{phi}.bias"].zero_()
        weight = changed[f"quantize.quant_resi.qresi_ls.{phi}.weight"].zero_()
        weight[range(4), range(4), 1, 1] = 1
    tokenizer = open_var_vq(save_var_vq(changed, tmp_path / "vae.pth"), scales=(4,))
    codes = codes_of(2, 16)[:, 0]
    vectors = state[TABLE][codes].movedim(-1, 1).unflatten(2, (4, 4))
    assert torch.equal(tokenizer._picture(codes), vectors)
    assert torch.equal(quantized(tokenizer.features(), vectors), codes)


def test_of_equal_vectors_the_first_is_taken(state, tmp_path):
    table = state[TABLE].clone()
    table[128:] = table[:128]
    doubled = open_image_tokenizer(save_var_vq(state | {TABLE: table}, tmp_path / "vae.pth"))
    codes = doubled.encode(pixels(IMAGES))
    assert codes.max() < 128
    assert torch.equal(codes, encoded(state | {TABLE: table}, pixels(IMAGES)))
    one = codes_of(2) % 128
    assert torch.equal(doubled.decode(one), doubled.decode(one + 128))


def test_an_image_does_not_depend_on_its_batch(tokenizer, monkeypatch):
    codes, images = tokenizer.encode(pixels(IMAGES)), tokenizer.decode(codes_of(3))
    assert torch.equal(codes, torch.cat([tokenizer.encode(image[None]) for image in pixels(IMAGES)]))
    drawn = torch.cat([tokenizer.decode(one[None]) for one in codes_of(3)])
    assert (drawn.int() - images.int()).abs().max() <= 1
    # In parts of two, as a batch that is too large, and with few places compared at a time.
    monkeypatch.setattr("megatron_cca.models.vq_network._PIXELS_AT_ONCE", 2 * 32 * 32)
    monkeypatch.setattr("megatron_cca.models.scale_quantizer._PLACES_AT_ONCE", 7)
    seen = []
    hook = tokenizer._network.encoder.register_forward_hook(lambda _, given, found: seen.append(len(found)))
    assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)
    assert (tokenizer.decode(codes_of(3)).int() - images.int()).abs().max() <= 1
    hook.remove()
    assert seen == [2, 1]


def test_autocast_does_not_reach_the_codes_nor_do_gradients_leave(tokenizer):
    codes = tokenizer.encode(pixels(IMAGES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels(IMAGES)), codes)
    assert not tokenizer.decode(codes).requires_grad
    assert not tokenizer.decode_floats(codes).requires_grad


def test_an_empty_batch_has_shapes_too(tokenizer):
    assert tokenizer.encode(pixels((0, 32, 32, 3))).shape == (0, 1, NUM_CODES)
    assert tokenizer.decode(torch.zeros(0, 1, NUM_CODES, dtype=torch.int64)).shape == (0, 32, 32, 3)


def test_black_and_white_are_reached_but_not_passed(state, tmp_path):
    weight, bias = state["decoder.conv_out.weight"], state["decoder.conv_out.bias"]
    for shift, level in ((9.0, 255), (-9.0, 0), (0.0, 127), (1.0, 255), (-1.0, 0)):
        flat = {"decoder.conv_out.weight": torch.zeros_like(weight), "decoder.conv_out.bias": bias * 0 + shift}
        tokenizer = open_image_tokenizer(save_var_vq(state | flat, tmp_path / "vae.pth"))
        assert (tokenizer.decode(codes_of(1)) == level).all(), shift


def test_the_models_inputs_are_made_of_the_files_features(tokenizer, state, file):
    found, features = read_features(file, PRESETS["var-tiny"]), tokenizer.features()
    assert found.keys() == {f"embedding.features.{name}" for name in features.state_dict()}
    assert all(torch.equal(found[f"embedding.features.{name}"], one) for name, one in features.state_dict().items())
    codes = codes_of(2)[:, 0]
    sizes = var.Sizes(0, 0, 1, codebook=var.TINY.codebook, channels=var.TINY.channels)
    assert torch.allclose(features(codes), var.features(state, codes, sizes), atol=1e-5)


@pytest.mark.parametrize(
    "found",
    [
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            "epoch": 3,
            "trainer": {"vae_local": state, "var_wo_ddp": var.random_weights(var.TINY), "var_opt": {"state": {}}},
            "args": argparse.Namespace(depth=3),
        },
    ],
    ids=["state_dict", "wrapped", "VAR's trainer"],
)
def test_other_forms_of_the_file(found, state, tokenizer, tmp_path):
    path = save_var_vq(found(state), tmp_path / "vae.pt")
    assert open_image_tokenizer(path).fingerprint() == tokenizer.fingerprint()
    assert open_image_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_the_fingerprint_is_of_weights_and_not_of_hits(state, tokenizer, tmp_path):
    other = open_image_tokenizer(save_var_vq(state | {HITS: state[HITS] + 1}, tmp_path / "vae.pth"))
    assert other.fingerprint() == tokenizer.fingerprint()
    name = "quantize.quant_resi.qresi_ls.3.bias"
    other = open_image_tokenizer(save_var_vq(state | {name: state[name] + 1}, tmp_path / "vae.pth"))
    assert other.fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 32, 30, 3), "pixels: 32 x 30; this tokenizer takes 32 x 32 alone"),
        ((1, 64, 64, 3), "pixels: 64 x 64; this tokenizer takes 32 x 32 alone"),
        ((1, 2, 32, 32, 3), "pixels: must be uint8 [N, H, W, 3], found torch.uint8 [1, 2, 32, 32, 3]"),
        ((1, 0, 32, 3), "pixels: height 0 is not a multiple of"),
    ],
)
def test_pixels_that_cannot_be_are_refused(shape, message, tokenizer):
    assert refusal(tokenizer.encode, torch.zeros(shape, dtype=torch.uint8)).startswith(message)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 1, NUM_CODES), 256), "codes: 256 does not fit a codebook of 256"),
        (torch.zeros(1, 1, 679, dtype=torch.int64), "codes: [1, 679] for an image; scales of side 1, 2, 3, 4, 5, 6, 8"),
        (torch.zeros(1, 16, 16, dtype=torch.int64), "codes: [16, 16] for an image; scales of side 1, 2, 3, 4, 5, 6, 8"),
        (torch.zeros(1, NUM_CODES, dtype=torch.int64), "codes: must be int64 [N, h, w], found torch.int64 [1, 680]"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, message, tokenizer):
    assert refusal(tokenizer.decode, codes).startswith(message)


QKV, DOWN, PHI = "decoder.mid.attn_1.qkv", "encoder.down.1.block.0.conv1.weight", "quantize.quant_resi.qresi_ls.3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(f"{QKV}.weight"), f"tensor {QKV}.weight is missing"),
        (lambda found: found.pop(f"{PHI}.bias"), f"tensor {PHI}.bias is missing"),
        (lambda found: found.pop(HITS), f"tensor {HITS} is missing, which tells the number of scales"),
        (lambda found: found.pop(TABLE), f"is not VAR's image tokenizer: tensor {TABLE} is missing"),
        (
            lambda found: found.update({HITS: torch.ones(10, 255)}),
            f"tensor {HITS} has shape [10, 255], not a row of 256",
        ),
        (lambda found: found.update({HITS: torch.ones(10)}), f"tensor {HITS} has shape [10], not a row of 256"),
        (lambda found: found.update(extra=torch.ones(3)), "tensor extra is not one of VAR's image tokenizer's"),
        (
            lambda found: found.update({f"{QKV}.bias": torch.ones(191)}),
            f"tensor {QKV}.bias has shape [191], [192] would fit the others",
        ),
        (
            lambda found: found.update({"quant_conv.weight": torch.ones(4, 4, 1, 1)}),
            "tensor quant_conv.weight has shape [4, 4, 1, 1], [4, 4, 3, 3] would fit the others",
        ),
        (lambda found: found.update({DOWN: torch.ones(48, 32, 3, 3)}), f"tensor {DOWN} has 48 channels, not"),
        (lambda found: found.update({DOWN: found[DOWN].to(torch.int8)}), f"tensor {DOWN} has dtype torch.int8, which"),
        (lambda found: found[DOWN].fill_(torch.inf), f"tensor {DOWN} holds numbers that are not finite"),
        (lambda found: found.update({DOWN: [1.0]}), f"{DOWN} is no tensor"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(change, message, state, tmp_path):
    found = {name: tensor.clone() for name, tensor in state.items()}
    change(found)
    path = save_var_vq(found, tmp_path / "vae.pth")
    # By itself, whatever a damaged file looks like among other families' files.
    assert refusal(open_var_vq, path).startswith(f"{path}: {message}")


def test_a_file_of_another_kind_is_called_what_it_is(state, file, tmp_path):
    llamagen = llamagen_vq.save_vq(llamagen_vq.random_vq(), tmp_path / "vq_ds16_c2i.pth")
    missing = "tensor encoder.down.0.block.0.conv1.weight is missing"
    assert refusal(open_var_vq, llamagen) == f"{llamagen}: is not VAR's image tokenizer: {missing}"
    missing = "tensor encoder.conv_blocks.0.res.0.conv1.weight is missing"
    assert refusal(open_llamagen_vq, file) == f"{file}: is not LlamaGen's image tokenizer: {missing}"
    # The names within decide, whatever the file is called.
    assert open_image_tokenizer(llamagen).kind == "llamagen-vq"
    assert open_image_tokenizer(save_var_vq(state, tmp_path / "vq_ds16_c2i.pt")).kind == "var-vq"


def test_the_models_own_file_is_no_tokenizer(tmp_path):
    path = save_var_vq(var.random_weights(var.TINY), tmp_path / "var_d16.pth")
    advice = "give the image tokenizer's own, such as vae_ch160v4096z32.pth"
    assert refused(path) == f"{path}: looks like VAR's decoder (word_embed.weight); {advice}"


def test_a_trainers_file_without_one_is_called_what_it_is(tmp_path):
    """CCA's program saves the model alone, under the trainer's key."""
    path = tmp_path / "var_d16.pth"
    torch.save({"trainer": var.random_weights(var.TINY), "epoch": 1}, path)
    assert refusal(open_image_tokenizer, path) == (
        f"{path}: looks like VAR's decoder (word_embed.weight); give the image tokenizer's own, such as "
        "vae_ch160v4096z32.pth"
    )


def test_a_file_of_no_family_is_refused_for_each(tmp_path):
    path = save_var_vq({"weight": torch.ones(4, 2)}, tmp_path / "other.pth")
    missing = "image tokenizer: tensor encoder.conv_in.weight is missing"
    assert refused(path) == f"{path}: is not LlamaGen's {missing}; is not VAR's {missing}"


def tokenizing(vae, folder):
    pictures, shards = folder / "pictures", folder / "shards"
    return TokenizeSettings(pictures, shards, image_tokenizer=vae, model="var-tiny", resize="authors", layout="classes")


def test_pictures_become_shards_and_shards_pictures(tmp_path):
    state = random_var_vq(scales=len(FEW))
    images = pixels((2, 8, 8, 3))
    for number, image in enumerate(images):
        (tmp_path / f"pictures/{number}").mkdir(parents=True)
        Image.fromarray(image.numpy()).save(tmp_path / f"pictures/{number}/a.png")
    settings = tokenizing(save_var_vq(state, tmp_path / "vae.pth"), tmp_path)
    assert tokenize(settings, 0, 1, torch.device("cpu")).samples == 2
    shards = TokenShards(settings.output, PRESETS["var-tiny"].vocabulary)
    codes = torch.stack([torch.from_numpy(shards.codes(sample)[0].astype("int64")) for sample in range(2)])
    assert torch.equal(codes, encoded(state, images, FEW))
    found, captions = decoded_samples(shards, 2, 0, None, torch.device("cpu"))
    assert captions == ["class 0", "class 1"]
    exact = levels(decoded(state, codes, FEW)).int()
    assert (torch.stack([torch.from_numpy(one) for one in found]).int() - exact).abs().max() <= 1


def test_a_tokenizer_of_other_grids_than_the_models_is_refused(file, tmp_path):
    llamagen = llamagen_vq.save_vq(llamagen_vq.random_vq(llamagen_vq.TINY | {"codebook": (256, 8)}), tmp_path / "vq.pt")
    (tmp_path / "pictures").mkdir()
    said = "makes one grid of codes of an image, and the model takes grids of codes of side 1, 2, 4"
    refused_by_job = refusal(tokenize, tokenizing(llamagen, tmp_path), 0, 1, torch.device("cpu"))
    assert refused_by_job == f"--image-tokenizer: {llamagen}: {said}; give the model's own"
    said = refusal(check_scales, open_image_tokenizer(file, scales=FEW), ())
    assert said.startswith("makes grids of codes of side 1, 2, 4 of an image, and the model takes one grid of codes;")


def test_damaged_files_are_named(file, tmp_path):
    path = tmp_path / "vae.pth"
    content = file.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"a picture"):
        path.write_bytes(damaged)
        assert refused(path).startswith(f"{path}: is truncated or not what torch.save writes")
        assert refusal(open_var_vq, path).startswith(f"{path}: is truncated or not what torch.save writes")


def test_the_tiny_one_is_a_file_of_the_same_names():
    def elsewhere(sizes):
        return {name for name in shapes(sizes) if ".down." not in name and ".up." not in name}

    assert elsewhere(TINY) == elsewhere(RELEASED)
