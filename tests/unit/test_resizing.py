"""Images brought to size as the models' authors do. Oracle: their steps, restated with other libraries, bit for bit."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")

from PIL import Image

from megatron_cca.data.codebooks import PatchCodebook
from megatron_cca.data.image_headers import ImageLimits, Rejected
from megatron_cca.data.inspection import open_for_inspection, report
from megatron_cca.data.parts import PartsFolder
from megatron_cca.data.resizing import AuthorsResizing, centre
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.data.tokenizing import TokenizeSettings
from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.errors import UserError
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.models.llamagen import class_vocabulary
from tests.references.authors_pixels import adm_pixels, emu3_pixels, photographs
from tests.unit.test_images import ALLOWED, HEIGHT, WIDTH, encoded, exif, picture

CPU = torch.device("cpu")
PHOTOGRAPHS = photographs()
AREA = 720 * 720


@pytest.fixture(scope="module")
def authors():
    return AuthorsResizing(CPU, 2, ImageLimits())


def to_area(authors, data, area, factor=8):
    (pixels,) = authors.decode([data], [authors.to_area(*authors.check_image(data), area, factor)])
    return pixels.numpy()


def to_cover(authors, data, side):
    (pixels,) = authors.decode([data], [authors.to_cover(*authors.check_image(data), side)])
    return centre(pixels, side, side).numpy()


def larger(data, size):
    """A photograph of other sides, losslessly."""
    return encoded(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.LANCZOS), "PNG")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("area", [512 * 512, AREA])
def test_photographs_at_emu3s_areas(name, area, authors):
    expected = emu3_pixels(PHOTOGRAPHS[name], area)
    assert np.array_equal(to_area(authors, PHOTOGRAPHS[name], area), expected)


@pytest.mark.parametrize("size", [pytest.param((1501, 1003), marks=pytest.mark.full), (700, 1333)])
def test_a_photograph_of_another_shape_at_emu3s_released_area(size, authors):
    data = larger(PHOTOGRAPHS["china.jpg"], size)
    assert np.array_equal(to_area(authors, data, AREA), emu3_pixels(data, AREA))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("side", [256, 384, 107, 53])
def test_photographs_at_llamagens_sides(name, side, authors):
    """427 x 640: as they are for 256 and 384, halved once or more for 107 and 53."""
    assert np.array_equal(to_cover(authors, PHOTOGRAPHS[name], side), adm_pixels(PHOTOGRAPHS[name], side))


@pytest.mark.parametrize(("size", "side"), [((1501, 1003), 384), ((513, 512), 256)])
def test_halving_leaves_odd_sides_out(size, side, authors):
    data = larger(PHOTOGRAPHS["flower.jpg"], size)
    assert np.array_equal(to_cover(authors, data, side), adm_pixels(data, side))


OTHERS = {
    "turned by EXIF": encoded(picture(), "JPEG", exif=exif(6)),
    "PNG turned by EXIF": encoded(picture(), "PNG", exif=exif(3)),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG"),
    "with a video behind it": ALLOWED["JPEG rgb"] + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\0\xff\xd9" * 400,
}


@pytest.mark.parametrize("name", [*ALLOWED, *OTHERS])
def test_every_kind_of_image_is_decoded_as_the_authors_do(name, authors):
    """That is as it is stored, whatever EXIF says, and without alpha."""
    data = (ALLOWED | OTHERS)[name]
    assert authors.check_image(data) == (HEIGHT, WIDTH)
    assert np.array_equal(to_cover(authors, data, 16), adm_pixels(data, 16))
    assert np.array_equal(to_area(authors, data, 48 * 48, 8), emu3_pixels(data, 48 * 48, 8, (48 * 48, 1024**2)))


def test_what_the_authors_read_wrongly_or_not_at_all_is_rejected(authors):
    deep = encoded(Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)), "PNG")
    with pytest.raises(Rejected, match="16-bit PNG"):
        authors.check_image(deep)
    (found,) = authors.decode([b""], [((5, 5, False),)])
    assert isinstance(found, Rejected)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Pictures of several kinds in folders for two classes."""
    root = tmp_path_factory.mktemp("classes")
    for label, kinds in enumerate((ALLOWED, OTHERS)):
        (root / str(label)).mkdir()
        for index, data in enumerate(kinds.values()):
            (root / str(label) / f"{index:02d}.{'png' if data.startswith(b'\x89') else 'jpg'}").write_bytes(data)
    for index, data in enumerate(PHOTOGRAPHS.values()):
        (root / "1" / f"photo{index}.jpg").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def captions(classes, tmp_path_factory):
    """The same with a caption each."""
    root = tmp_path_factory.mktemp("captions")
    for place, file in enumerate(sorted(classes.rglob("*.*"))):
        (root / f"{place:03d}{file.suffix}").write_bytes(file.read_bytes())
        (root / f"{place:03d}.txt").write_text("a handwritten seven")
    return root


def grey_codes(codebook, pixels):
    return codebook.encode(np.asarray(Image.fromarray(pixels).convert("L"))[None])[0]


def test_a_job_for_a_model_of_classes_has_the_authors_codes(classes, digit_shards, tmp_path):
    settings = TokenizeSettings(
        classes, tmp_path / "made", None, digit_shards, model="llamagen-tiny", resize="authors", flips=True
    )
    files, codebook = sorted(classes.rglob("*.*")), PatchCodebook.load(digit_shards)
    assert tokenize(settings, 0, 1, CPU).samples == len(files)
    shards = TokenShards(settings.output, class_vocabulary(codebook_size=128, num_classes=10))
    for index, file in enumerate(files):
        pixels = adm_pixels(file.read_bytes(), 8)
        for variant, wanted in enumerate((pixels, np.ascontiguousarray(pixels[:, ::-1]))):
            assert np.array_equal(shards.codes(index, variant)[0], grey_codes(codebook, wanted)), file
    assert "images resized by   authors" in report(open_for_inspection(settings.output))


@pytest.fixture
def settings(captions, digit_shards, tmp_path):
    return TokenizeSettings(
        captions, tmp_path / "made", digit_shards, digit_shards, model="emu3-tiny", area=4096, resize="authors", block=5
    )


def test_a_job_for_a_model_of_texts_has_the_authors_codes(settings, captions, digit_shards):
    files = sorted(file for file in captions.iterdir() if file.suffix != ".txt")
    assert tokenize(settings, 0, 1, CPU).samples == len(files)
    shards, codebook = TokenShards(settings.output, tiny_vocabulary()), PatchCodebook.load(digit_shards)
    for index, file in enumerate(files):
        pixels = emu3_pixels(file.read_bytes(), 4096, 2, (4096, 1024**2))
        assert np.array_equal(shards.codes(index)[0], grey_codes(codebook, pixels)), file
    assert json.loads((settings.output / "manifest.json").read_text())["resize"] == "authors"


@pytest.mark.parametrize(
    "begun",
    [
        {"resize": "authors"},
        pytest.param({"resize": "dali"}, marks=pytest.mark.full),
        {"flips": True},
        pytest.param({"flips": False}, marks=pytest.mark.full),
    ],
)
def test_a_job_does_not_go_on_with_parts_made_otherwise(begun, classes, digit_shards, tmp_path, monkeypatch):
    (name, value), tokenizer = *begun.items(), type(open_image_tokenizer(digit_shards))
    settings = TokenizeSettings(
        classes, tmp_path / "made", None, digit_shards, model="llamagen-tiny", block=5, batch_size=5, **begun
    )
    original, calls = tokenizer.encode, []

    def interrupted(self, pixels):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(tokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(settings, 0, 1, CPU)
    assert PartsFolder(settings.output, 30, 5).done()
    other = {"authors": "dali", "dali": "authors"}.get(value, not value)
    with pytest.raises(UserError, match=rf"was begun with {name} .*, not .*; go on as it was begun"):
        tokenize(replace(settings, **{name: other}), 0, 1, CPU)
    result = tokenize(settings, 0, 1, CPU)
    # DALI does not read the one of four components.
    assert (result.samples, result.skipped) == ((30, 0) if begun.get("resize") == "authors" else (29, 1))


def test_dalis_way_stays_the_default_and_says_nothing(settings, monkeypatch):
    assert TokenizeSettings(settings.source, settings.output).resize == "dali"
    tokenize(replace(settings, resize="dali"), 0, 1, CPU)
    assert "resize" not in json.loads((settings.output / "manifest.json").read_text())
    assert "CMYK" in (settings.output / "skipped.jsonl").read_text()


def test_another_way_is_refused(settings):
    with pytest.raises(UserError, match="--resize: must be dali or authors, found 'pillow'"):
        tokenize(replace(settings, resize="pillow"), 0, 1, CPU)


def test_codes_are_not_resized(settings, tmp_path):
    torch.save({"images": np.zeros((2, 2), np.int64), "texts": "zero"}, tmp_path / "0.pth")
    (tmp_path / "train.json").write_text(json.dumps({"prefix": str(tmp_path), "path_list": ["0.pth"]}))
    with pytest.raises(UserError, match=r"--resize: .* holds codes, which nobody resizes; leave it out"):
        tokenize(replace(settings, source=tmp_path / "train.json"), 0, 1, CPU)


@pytest.mark.parametrize("resize", ["dali", "authors"])
def test_a_line_of_pixels_is_not_made_a_square_of_gigabytes(resize, digit_shards, tmp_path):
    (tmp_path / "images/0").mkdir(parents=True)
    (tmp_path / "images/0/a.png").write_bytes(encoded(Image.new("L", (60_000, 1)), "PNG"))
    (tmp_path / "images/0/b.png").write_bytes(ALLOWED["PNG rgb"])
    settings = TokenizeSettings(
        tmp_path / "images",
        tmp_path / "made",
        None,
        digit_shards,
        model="llamagen-tiny",
        grid=(256, 256),
        max_skipped=0.5,
    )
    assert tokenize(replace(settings, resize=resize), 0, 1, CPU).skipped == 1
    assert "it is 60000 x 1, too long to be cut to a square of 512" in (settings.output / "skipped.jsonl").read_text()
