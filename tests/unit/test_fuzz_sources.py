"""Images and captions, in every layout on a disk, that may hold anything."""

import gzip
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from megatron_cca.data.image_headers import Rejected, read_header
from megatron_cca.data.sources import Unreadable, open_source
from megatron_cca.data.sources.source_protocol import Comparison
from tests.references.fuzzing import NAMES, Sandbox, changed, fuzzed, names, plain, spoilt
from tests.references.idx_files import clothes, idx


def encoded(kind, **options):
    file = io.BytesIO()
    Image.effect_noise((19, 13), 40).convert("RGB").save(file, kind, **options)
    return file.getvalue()


PNG = encoded("PNG")
JPEG = encoded("JPEG")
TEXT = st.one_of(names, st.binary(max_size=20))


def fill(folder, **files):
    shutil.rmtree(folder)
    folder.mkdir()
    put(folder, files)


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_everything(sandbox: Sandbox, layout: str, path=None):
    """Every record and the fingerprint; nothing that is read is what lies beside the folder."""
    source = sandbox.check(lambda: open_source(path or sandbox.inside, layout))
    if source is None:
        return
    for index in range(min(len(source), 20)):
        record = sandbox.check(lambda index=index: source[index], Unreadable)
        if isinstance(record, Comparison):
            assert all(isinstance(image, Unreadable) or b"secret" not in image.frames for image in record.images)
            assert all(0 <= place < len(record.images) for pair in record.pairs for place in pair)
            continue
        assert record is None or b"secret" not in record.frames
        assert record is None or record.caption is None or record.caption.encode()
    sandbox.check(source.fingerprint, Unreadable)


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


CAPTIONS = [{"file_name": "a.png", "caption": "a", "condition": "x"}, {"frames": ["a.png", "b/a.png"], "caption": "b"}]
POINTING = names.map(lambda name: [{"file_name": name, "caption": name}, {"frames": [name, "a.png"], "caption": "c"}])


@fuzzed("captions list")
@given(spoilt(as_lines(CAPTIONS)) | changed(CAPTIONS).map(json.dumps).map(str.encode) | POINTING.map(as_lines))
def test_no_list_of_captions_gets_through(sandbox, content):
    fill(sandbox.inside, **{"a.png": PNG, "b/a.png": PNG, "captions.jsonl": content})
    read_everything(sandbox, "captions")


PREFERENCES = [
    {"prompt": "a", "winner": "a.png", "loser": ["b.jpg", "a.png"]},
    {"caption": "b", "images": ["b.jpg", "a.png", "c.png"], "scores": [1, 0.5, None]},
    {"label": 3, "file_path": ["b.jpg", "a.png"], "rank": [2, 1]},
]
NAMED = names.map(lambda name: [{"prompt": name, "winner": name, "loser": ["a.png", name]}])


@fuzzed("preferences list")
@given(spoilt(as_lines(PREFERENCES)) | changed(PREFERENCES).map(json.dumps).map(str.encode) | NAMED.map(as_lines))
def test_no_list_of_preferences_gets_through(sandbox, content):
    fill(sandbox.inside, **{"a.png": PNG, "b.jpg": JPEG, "preferences.jsonl": content})
    read_everything(sandbox, "auto")


FILE_NAMES = names.filter(lambda name: 0 < len(name.encode("utf-8", "replace")) < 200 and not set(name) & {"\0", "/"})


@fuzzed("captions folder")
@given(FILE_NAMES.filter(lambda name: name not in (".", "..")), spoilt(b"a caption\n"), st.booleans())
def test_no_folder_of_captions_gets_through(sandbox, name, text, is_link):
    try:
        fill(sandbox.inside, **{f"{name}/a.png": PNG, f"{name}/a.txt": text, "b.png": PNG})
    except (OSError, UnicodeEncodeError):
        return
    if is_link:
        (sandbox.inside / "b.txt").symlink_to(sandbox.beside / "secret.txt")
        (sandbox.inside / "c.png").symlink_to(sandbox.beside / "secret.png")
    for layout in ("auto", "captions", "classes"):
        read_everything(sandbox, layout)


CLASSES = {"a": "an apple", "b": "a bear"}
SYNSETS = b"a apple, fruit\nb bear, animal\n"


@fuzzed("class names")
@given(
    st.one_of(
        st.tuples(
            st.just("classes.json"), spoilt(json.dumps(CLASSES).encode()) | plain.map(json.dumps).map(str.encode)
        ),
        st.tuples(st.just("LOC_synset_mapping.txt"), spoilt(SYNSETS)),
    )
)
def test_no_class_names_get_through(sandbox, named):
    fill(sandbox.inside, **{"a/1.png": PNG, "b/1.png": PNG, named[0]: named[1]})
    read_everything(sandbox, "classes")


JOURNEY = [{"img_path": "./000/a.png", "prompt": "a", "Task2": {"Caption": "b"}}]


@fuzzed("journeydb list")
@given(
    spoilt(as_lines(JOURNEY))
    | changed(JOURNEY).map(json.dumps).map(str.encode)
    | names.map(lambda name: as_lines([JOURNEY[0] | {"img_path": name}]))
)
def test_no_journeydb_gets_through(sandbox, content):
    fill(sandbox.inside, **{"imgs/000/a.png": PNG, "train_anno_realease_repath.jsonl": content})
    read_everything(sandbox, "journeydb")


def tar(members, kind=tarfile.PAX_FORMAT, **attributes):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


MEMBERS = [
    ("0.png", PNG),
    ("0.json", b'{"caption": "a", "text": "b"}'),
    ("0.cls", b"3"),
    ("1.jpg", JPEG),
    ("1.txt", b"b"),
]
TARS = [tar(MEMBERS, kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
TARS.append(tar([("x" * 300 + ".txt", b"long")], tarfile.GNU_FORMAT))


@st.composite
def forged_tars(draw):
    attributes = {"type": draw(st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"S", b"x", b"L", b"V"]))}
    attributes["linkname"] = draw(st.sampled_from(NAMES))
    if draw(st.booleans()):
        attributes["pax_headers"] = {
            draw(st.sampled_from(["path", "size", "GNU.sparse.map", "hdrcharset"])): draw(
                st.sampled_from([*NAMES, "-1", "999999999999999999999", "1,2,3"])
            )
        }
    try:
        return tar([(draw(names) + ".txt", b"abc")], draw(st.sampled_from([0, 1, 2])), **attributes)
    except (ValueError, UnicodeError, OverflowError):
        return b""


def with_checksums(content):
    """Spoilt headers whose checksums are right again, so that what they say is looked at."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(content)


@fuzzed("tar")
@given(spoilt(*TARS) | spoilt(*TARS).map(with_checksums) | forged_tars())
def test_no_tar_gets_through(sandbox, content):
    fill(sandbox.inside, **{"a.tar": content})
    read_everything(sandbox, "webdataset")


def pth(found):
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


WHOLE = pth({"name": "1", "images": torch.arange(6).view(2, 3), "texts": "a"})
LIST = {"prefix": "feature", "path_list": ["1.pth", "2.pth"]}


@fuzzed("emu3 list")
@given(
    spoilt(json.dumps(LIST).encode())
    | changed(LIST).map(json.dumps).map(str.encode)
    | names.map(lambda name: json.dumps(LIST | {"path_list": [name]}).encode())
)
def test_no_list_of_emu3s_gets_through(sandbox, content):
    fill(sandbox.inside, **{"list.json": content, "feature/1.pth": WHOLE})
    read_everything(sandbox, "emu3")


IMAGES = st.sampled_from([torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.int64), torch.tensor(3), "x", None, 10**30])
IMAGES |= st.just(torch.zeros(1, dtype=torch.int64).expand(1 << 20, 1 << 20))
IMAGES |= st.just(np.arange(6).reshape(2, 3)) | st.just(torch.arange(4).to_sparse())
OLD = io.BytesIO()
torch.save({"images": torch.arange(6).view(2, 3), "texts": "a"}, OLD, _use_new_zipfile_serialization=False)


@fuzzed("emu3 file")
@given(spoilt(WHOLE, OLD.getvalue()) | st.builds(lambda a, b: pth({"images": a, "texts": b}), IMAGES, names))
def test_no_file_of_emu3s_gets_through(sandbox, content):
    fill(sandbox.inside, **{"list.json": json.dumps(LIST).encode(), "feature/1.pth": content})
    read_everything(sandbox, "emu3")


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


CODE_FILE = npy(np.arange(48).reshape(1, 3, 16))
FORGED = (b"(1, 3, 99)", b"(9**9999 )", b"(-1,3,-16)", b"[1, 3, 16]")
SHAPES = [CODE_FILE.replace(b"(1, 3, 16)", shape) for shape in FORGED]


@fuzzed("code file")
@given(spoilt(CODE_FILE, *SHAPES) | st.binary(max_size=200))
def test_no_file_of_codes_gets_through(sandbox, content):
    fill(sandbox.inside, **{"a_codes/0.npy": content, "a_labels/0.npy": npy([3])})
    read_everything(sandbox, "llamagen")


@fuzzed("label file")
@given(spoilt(npy([3]), npy(["a"]), npy([2**63 - 1])) | st.binary(max_size=200))
def test_no_label_gets_through(sandbox, content):
    fill(sandbox.inside, **{"a_codes/0.npy": CODE_FILE, "a_labels/0.npy": content})
    read_everything(sandbox, "llamagen")


IDX_IMAGES, IDX_LABELS = (idx(array) for array in clothes(3, 4, 5))
BOASTING = IDX_IMAGES[:4] + b"\0\xff\xff\xff" * 3


@fuzzed("IDX file")
@given(
    spoilt(IDX_IMAGES, BOASTING, gzip.compress(IDX_IMAGES, mtime=0), gzip.compress(BOASTING, mtime=0)),
    spoilt(IDX_LABELS, gzip.compress(IDX_LABELS, mtime=0)),
)
def test_no_idx_file_gets_through(sandbox, images, labels):
    fill(sandbox.inside, **{"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": labels})
    read_everything(sandbox, "idx")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What datasets' save_to_disk leaves, by name."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved") / "data"
    rows = {
        "image": [{"bytes": PNG, "path": None}, {"bytes": JPEG, "path": None}],
        "text": ["a", "b"],
        "label_0": [1.0, 0.5],
        "label_1": [0.0, 0.5],
        "jpg_0": [PNG, PNG],
        "jpg_1": [JPEG, JPEG],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzzed("dataset folder")
@given(data=st.data())
def test_no_saved_dataset_gets_through(sandbox, saved, hf_cache, data):
    name = data.draw(st.sampled_from(sorted(saved)))
    content = spoilt(saved[name])
    if name.endswith(".json"):
        content |= changed(json.loads(saved[name])).map(json.dumps).map(str.encode)
    fill(sandbox.inside, **saved | {name: data.draw(content)})
    for layout in ("auto", "datasets"):
        read_everything(sandbox, layout)


def test_offsets_in_arrow_stay_inside(sandbox, saved, hf_cache):
    """pyarrow follows them wherever they lead: the process ended."""
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 1, 2))
    (name,) = (name for name in saved if name.endswith(".arrow"))
    assert saved[name].count(offsets) == 1
    far = saved[name].replace(offsets, offsets[:8] + (2**31 - 1).to_bytes(4, "little"))
    fill(sandbox.inside, **saved | {name: far})
    assert sandbox.check(lambda: open_source(sandbox.inside, "datasets")) is None


ENCODED = [
    PNG,
    JPEG,
    encoded("JPEG", progressive=True),
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
    encoded("BMP"),
]
ENCODED.append(encoded("JPEG", exif=Image.Exif()))


@fuzzed("image header")
@given(spoilt(*ENCODED) | st.binary(max_size=64))
@example(b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + bytes(28))
def test_no_image_header_gets_through(sandbox, content):
    sandbox.check(lambda: read_header(content), Rejected)
