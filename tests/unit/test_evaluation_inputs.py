"""What evaluation reads: sets of images in their forms, functions in the user's files."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from megatron_cca.data.digits import load_scans
from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.classifiers import class_accuracy, load_function, open_classifier
from megatron_cca.lab.evaluation.image_sets import read_images


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)


def save(folder, images, names):
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def message(path):
    with pytest.raises(UserError) as error:
        read_images(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_read_in_the_order_of_names_here_and_one_level_below(tmp_path, pixels):
    save(tmp_path, pixels[[2, 0, 1]], ["b/1.PNG", "a.png", "b/0.png"])
    save(tmp_path, pixels[3:], ["b/c/too_deep.png", ".hidden.png"])
    (tmp_path / "notes.txt").write_text("no image")
    found = read_images(tmp_path)
    assert np.array_equal(found.images, pixels[:3])
    assert found.images.dtype == np.uint8
    assert found.labels is None
    assert found.prompts is None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_colours_become_rgb(tmp_path, pixels, mode):
    Image.fromarray(pixels[0]).convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_images(tmp_path).images[0], expected)


def test_jpegs_are_read_upright(tmp_path):
    image = Image.fromarray(np.repeat(np.repeat(np.uint8([[0, 255]]), 16, 1), 16, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = read_images(tmp_path).images[0]
    assert found.shape == (32, 16, 3)
    assert found[:14].mean() < 20
    assert found[18:].mean() > 235


@pytest.mark.parametrize("labels", [True, False])
def test_generates_output_comes_with_prompts_and_labels_in_its_order(tmp_path, pixels, labels):
    save(tmp_path, pixels, [f"images/{index}.png" for index in range(5)])
    order = [3, 0, 4]
    records = [
        {"file": f"images/{index}.png", "prompt": f"a {index}", "label": index if labels else None, "seed": index}
        for index in order
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    found = read_images(tmp_path)
    assert np.array_equal(found.images, pixels[order])
    assert found.prompts == ["a 3", "a 0", "a 4"]
    assert found.labels.tolist() == order if labels else found.labels is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('{"file": "0.png"}\n{', "prompts.jsonl: line 2: is not valid JSON"),
        ("[]", 'prompts.jsonl: line 1: must be an object with "file"'),
        ('{"file": "1.png"}', "prompts.jsonl: line 1: 1.png is missing in"),
        ('{"file": "0.png", "label": "7"}', "line 1: \"label\" must be a whole number of 64 bits or null, found '7'"),
        (
            '{"file": "0.png", "label": 9223372036854775808}',
            'line 1: "label" must be a whole number of 64 bits or null, found 9223372036854775808',
        ),
        ('{"file": "0.png", "prompt": 7}', 'line 1: "prompt" must be a string or null, found 7'),
        ('{"file": "0.png", "label": 7}\n{"file": "0.png"}', "1 of 2 images have a label; give it for all or none"),
        ("\n", "prompts.jsonl: lists no images"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, pixels, lines, expected):
    save(tmp_path, pixels[:1], ["0.png"])
    (tmp_path / "prompts.jsonl").write_text(lines)
    assert expected in message(tmp_path)


def test_an_npz_is_read_as_openais_evaluator_reads_it(tmp_path, pixels):
    path = tmp_path / "samples.npz"
    np.savez(path, pixels)
    found = read_images(path)
    assert np.array_equal(found.images, pixels)
    assert found.labels is None
    np.savez(path, pixels, np.arange(5, dtype=np.int32))
    assert read_images(str(path)).labels.tolist() == [0, 1, 2, 3, 4]
    assert read_images(path).labels.dtype == np.int64
    np.savez_compressed(path, arr_0=pixels, mu=np.zeros(4, np.float32), sigma=np.eye(4))
    mean, covariance = read_images(path).moments["features"]
    assert mean.dtype == covariance.dtype == np.float64
    assert np.array_equal(covariance, np.eye(4))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": np.zeros(3)}, "has no arr_0; it must hold the images, uint8 [N, H, W, 3]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "must be uint8 [N, H, W, 3], found uint8 [2, 3, 4, 4]"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "must be uint8 [N, H, W, 3], found float64 [2, 4, 4, 3]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "arr_0 holds no images"),
        ({"arr_0": np.array([{}])}, "cannot be read as .npz"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.arange(3)},
            "for each of the 2 images, found int64 [3]",
        ),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.zeros(3), "sigma": np.eye(2)},
            "mu and sigma must be [D] and [D, D], found [3] and [2, 2]",
        ),
    ],
)
def test_unsuitable_archives_are_refused(tmp_path, arrays, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    assert expected in message(tmp_path / "a.npz")
    assert message(tmp_path / "a.npz").startswith(str(tmp_path / "a.npz"))


def test_damaged_archives_are_refused(tmp_path, pixels):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(256, size=(50, 8, 8, 3), dtype=np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[:600] + bytes(100) + whole[700:])
    assert message(path).startswith(f"{path}: cannot be read as .npz (")
    with path.open("wb") as file:
        np.save(file, pixels)
    assert message(path) == f"{path}: cannot be read as .npz: it is a numpy file; write it with numpy.savez"
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(content)
        assert message(path) == (
            f"{path}: cannot be read as .npz: it is cut short or something else; write it with numpy.savez"
        )


def test_mixed_sizes_damage_and_emptiness_are_refused_by_name(tmp_path, pixels):
    assert message(tmp_path) == f"{tmp_path}: holds no PNG or JPEG files, neither there nor one level below"
    assert message(tmp_path / "none").startswith(f"{tmp_path / 'none'}: does not exist; give a folder of images,")
    save(tmp_path, [*pixels[:2], pixels[2][:, :5]], ["0.png", "1.png", "2.png"])
    assert message(tmp_path).startswith(f"{tmp_path / '2.png'}: 6 x 5 pixels, but 0.png has 6 x 9; all images of a set")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:-40])
    assert message(tmp_path).startswith(f"{tmp_path / '2.png'}: ")
    (tmp_path / "2.png").write_text("no image")
    assert message(tmp_path).startswith(f"{tmp_path / '2.png'}: not an image")
    assert (
        message(tmp_path / "0.png")
        == f"{tmp_path / '0.png'}: is a file, but no .npz; give a folder of images or an .npz"
    )
    (tmp_path / "a.npz").write_text("no archive")
    assert message(tmp_path / "a.npz").startswith(f"{tmp_path / 'a.npz'}: cannot be read as .npz")


def test_the_digits_are_sets_too():
    train, held_out = load_scans()
    for word, scans in (("digits", train), ("digits-held-out", held_out)):
        found = read_images(word)
        assert np.array_equal(found.images, np.repeat(scans.images[..., None], 3, 3))
        assert np.array_equal(found.labels, scans.labels)


FUNCTIONS = "import numpy as np\nnumber = 3\ndef first(images):\n    return images[:, 0, 0, 0].astype(np.int64) % 3\n"


def test_class_accuracy_counts_right_answers(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    classifier = open_classifier(f"{tmp_path / 'own.py'}:first")
    images = np.zeros((6, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = [0, 1, 2, 3, 4, 5]
    found = class_accuracy(images, np.array([0, 1, 1, 1, 1, 2]), classifier)
    assert found.overall == pytest.approx(4 / 6)
    assert found.per_class == {0: 1.0, 1: 0.5, 2: 1.0}
    with pytest.raises(
        UserError, match=r"^--classifier: must answer 6 whole numbers for 6 images, found float64 \[6\]$"
    ):
        class_accuracy(images, np.zeros(6, np.int64), lambda images: np.zeros(len(images)))
    with pytest.raises(UserError, match=r"--classifier: 'svm' is neither digits nor FILE.py:FUNCTION nor FILE.judge"):
        open_classifier("svm")


def test_what_a_users_function_raises_is_one_line_with_its_place(tmp_path):
    file = tmp_path / "failing.py"
    file.write_text("def first(images):\n    raise ValueError('no\\nweights')\n")
    with pytest.raises(UserError) as error:
        load_function(f"{file}:first", "--scorer")([])
    assert str(error.value) == f"--scorer: {file}:first failed at line 2: ValueError: no weights"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (FUNCTIONS, "own.py", "is not of the form FILE.py:FUNCTION"),
        (FUNCTIONS, "other.py:first", "other.py does not exist"),
        (FUNCTIONS, "own.py:second", "own.py defines no 'second'"),
        (FUNCTIONS, "own.py:number", "'number' in own.py is not a function"),
        ("1 +", "own.py:first", "own.py cannot be run: SyntaxError: invalid syntax"),
        ("import nowhere", "own.py:first", "own.py cannot be run: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_functions_that_cannot_be_loaded_are_refused(tmp_path, monkeypatch, text, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_function(name, "--scorer")
    assert str(error.value).startswith("--scorer: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_of_a_folder_is_no_image_of_the_set_is_counted(tmp_path, pixels):
    save(tmp_path, pixels, ["a.PNG", "b/c.jpeg", "b/c/d.png", "b/c/e.JPG", ".hidden.png"])
    save(tmp_path, pixels[:2], ["b/f.webp", "g.bmp"])
    for name in ("._a.png", "Thumbs.db", "b/notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "b/deep").symlink_to(tmp_path / "b/c")
    found = read_images(tmp_path)
    assert len(found.images) == 3
    assert found.notices == (
        "2 images lie deeper than one level and are not read (b/c/d.png)",
        "not read: 2 hidden (._a.png), 1 .bmp (g.bmp), 1 .db (Thumbs.db), 1 .txt (b/notes.txt), 1 .webp (b/f.webp), "
        "1 linked folders (b/deep/)",
    )
    save(tmp_path / "other", pixels[:1], ["a.webp"])
    none = f"{tmp_path / 'other'}: holds no PNG or JPEG files, neither there nor one level below"
    assert message(tmp_path / "other") == f"{none}; not read: 1 .webp (a.webp)"
    save(tmp_path / "plain", pixels[:1], ["a.png"])
    assert read_images(tmp_path / "plain").notices == ()


def test_what_a_list_of_images_leaves_out_or_repeats_is_counted(tmp_path, pixels):
    save(tmp_path, pixels, [f"images/{index}.png" for index in range(4)] + ["sheet.png"])
    records = [{"file": f"images/{index}.png"} for index in (0, 1, 0)]
    content = "\ufeff" + "\r\n\r\n".join(map(json.dumps, records))
    (tmp_path / "prompts.jsonl").write_text(content, encoding="utf-8", newline="")
    found = read_images(tmp_path)
    assert len(found.images) == 3
    assert found.notices == (
        "1 lines name an image again, which counts again",
        f"2 images are not in prompts.jsonl and are not read ({tmp_path / 'images/2.png'})",
    )
    (tmp_path / "prompts.jsonl").write_bytes(json.dumps(records[0]).encode("utf-16"))
    assert message(tmp_path).endswith("prompts.jsonl: is text in UTF-16; it must hold one JSON object a line, in UTF-8")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"file": str(tmp_path / "images/0.png")}))
    assert message(tmp_path).endswith("; names are relative to it")


@pytest.mark.parametrize(("alpha", "count"), [(255, 0), (254, 1)])
def test_transparency_is_said_where_there_is_any(alpha, count, tmp_path, pixels):
    save(tmp_path, pixels[:1], ["a.png"])
    image = Image.fromarray(pixels[1]).convert("RGBA")
    image.putalpha(Image.fromarray(np.full(pixels.shape[1:3], alpha, np.uint8)))
    image.save(tmp_path / "b.png")
    Image.fromarray(pixels[2]).convert("L").save(tmp_path / "c.png")
    said = (f"{count} of 3 images are transparent in places; alpha is dropped",) if count else ()
    assert read_images(tmp_path).notices == said


def test_arrays_of_an_archive_that_are_not_read_are_named(tmp_path, pixels):
    np.savez(tmp_path / "a.NPZ.npz", arr_0=pixels, labels=np.arange(5))
    found = read_images(tmp_path / "a.NPZ.npz")
    assert (found.labels, found.notices) == (None, ("arrays are not read: labels",))
    (tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ")
    assert len(read_images(tmp_path / "a.NPZ").images) == 5
    np.savez(tmp_path / "b.npz", images=pixels, labels=np.arange(5))
    assert message(tmp_path / "b.npz").endswith("uint8 [N, H, W, 3], found images, labels")
    (tmp_path / "c.npz").write_bytes(gzip.compress(b"x"))
    assert "cannot be read as .npz: it is compressed (gzip);" in message(tmp_path / "c.npz")


def test_splits_that_are_taken_together_are_said(tmp_path, pixels):
    save(tmp_path, pixels[:3], ["train/a.png", "val/a.png", "cat/a.png"])
    assert read_images(tmp_path).notices == ("train and val are taken together as one set",)
