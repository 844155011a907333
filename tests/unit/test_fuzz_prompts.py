"""Prompts, text tokenizers and lists of images that may hold anything."""

import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from megatron_cca.data.digits import captions_of
from megatron_cca.data.tokenizers import TIKTOKEN_FILE, open_text_tokenizer, train_tokenizer
from megatron_cca.data.tokenizers import TOKENIZER_FILE as TOKENIZER
from megatron_cca.generation.prompts import class_prompts, read_prompts
from megatron_cca.lab.evaluation.image_sets import PROMPTS, list_folder, read_images
from tests.references.fuzzing import NAMES, changed, fuzzed, names, plain, spoilt

LINES = [{"prompt": "a red fox", "seed": 3, "label": 1}, {"prompt": "a mouse"}]


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def rows_of(row):
    return st.lists(changed(row) | plain, min_size=1, max_size=3).map(as_lines)


@fuzzed("prompts text")
@given(spoilt(b"a red fox\na mouse\n") | st.binary(max_size=40))
@example(b"\xef\xbb\xbfa fox\r\n")
def test_no_text_of_prompts_gets_through(sandbox, content):
    path = sandbox.inside / "prompts.txt"
    path.write_bytes(content)
    sandbox.check(lambda: read_prompts(path))


@fuzzed("prompts jsonl")
@given(spoilt(as_lines(LINES)) | rows_of(LINES[0]))
@example(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}")
@example(b'{"prompt": "\\ud800"}')
def test_no_jsonl_of_prompts_gets_through(sandbox, content):
    path = sandbox.inside / "prompts.jsonl"
    path.write_bytes(content)
    for prompt in sandbox.check(lambda: read_prompts(path)) or []:
        prompt.title.encode()


def test_what_is_no_file_of_prompts_is_refused(sandbox):
    for name in NAMES:
        sandbox.check(lambda name=name: read_prompts(sandbox.inside / "no" / name.lstrip("/")))


CAPTIONS = [captions_of(label)[0] for label in range(10)]


@fuzzed("prompts classes")
@given(st.lists(names | st.sampled_from([*CAPTIONS, "all", "3", "10", "-1", "²", "٣", "9" * 5000]), max_size=3))
@example(["9" * 5000])
@example(["²"])
def test_no_class_gets_through(sandbox, wanted):
    sandbox.check(lambda: class_prompts(CAPTIONS, wanted))


FAST = train_tokenizer(CAPTIONS, 300).to_str().encode()


@fuzzed("tokenizer json")
@given(spoilt(FAST) | changed(json.loads(FAST)).map(json.dumps).map(str.encode))
def test_no_tokenizer_json_gets_through(sandbox, content):
    fill(sandbox.inside, {TOKENIZER: content})
    tokenizer = sandbox.check(lambda: open_text_tokenizer(sandbox.inside))
    if tokenizer is not None:
        sandbox.check(lambda: tokenizer.decode(tokenizer.encode("a handwritten seven")))
        sandbox.check(tokenizer.fingerprint)


def tiktoken_file():
    import base64

    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@fuzzed("tokenizer tiktoken")
@given(spoilt(tiktoken_file()))
def test_no_tiktoken_file_gets_through(sandbox, content):
    pytest.importorskip("tiktoken")
    fill(sandbox.inside, {TIKTOKEN_FILE: content})
    tokenizer = sandbox.check(lambda: open_text_tokenizer(sandbox.inside))
    if tokenizer is not None:
        sandbox.check(lambda: tokenizer.decode(tokenizer.encode("a handwritten seven")))


def fill(folder, files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def png(shade=7):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = {"a.png": png(), "b.png": png(9)}
LISTED = [{"file": "a.png", "prompt": "a", "label": 1}, {"file": "b.png", "prompt": "b", "label": 2}]
POINTING = st.lists(names.map(lambda name: LISTED[0] | {"file": name}), min_size=1, max_size=2).map(as_lines)


@fuzzed("image listing")
@given(spoilt(as_lines(LISTED)) | rows_of(LISTED[0]) | POINTING)
@example(as_lines([LISTED[0] | {"label": 10**30}]))
def test_no_listing_gets_through(sandbox, content):
    fill(sandbox.inside, PICTURES | {PROMPTS: content})
    sandbox.check(lambda: list_folder(sandbox.inside))
    sandbox.check(lambda: read_images(sandbox.inside))


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


WHOLE = archive(arr_0=np.zeros((2, 3, 4, 3), np.uint8), arr_1=np.arange(2), mu=np.zeros(3), sigma=np.eye(3))
DTYPES = st.sampled_from(["u1", "f4", "i8", "c8", "S3", "U2", "?", "M8[s]", "f4,i4"])
ARRAYS = st.builds(np.zeros, st.lists(st.integers(0, 3), max_size=4), DTYPES)
FIELDS = st.sampled_from(["arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s"])
FORGED = st.dictionaries(FIELDS, ARRAYS, min_size=1).map(
    lambda arrays: archive(**{"arr_0": np.zeros((2, 3, 4, 3), np.uint8)} | arrays)
)


@fuzzed("image archive")
@given(spoilt(WHOLE) | FORGED)
def test_no_archive_gets_through(sandbox, content):
    path = sandbox.inside / "images.npz"
    path.write_bytes(content)
    sandbox.check(lambda: read_images(path))


@fuzzed("image folder")
@given(spoilt(PICTURES["a.png"]))
def test_no_picture_gets_through(sandbox, content):
    fill(sandbox.inside, PICTURES | {"a.png": content})
    sandbox.check(lambda: read_images(sandbox.inside))
