"""Text tokenizers: the libraries' own ids on ordinary captions, and no special token from any text."""

import base64
import json
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_cca.data.tokenizers import MAX_CHARACTERS, open_text_tokenizer, train_tokenizer
from megatron_cca.errors import UserError

# As tokenization_emu3.py writes it.
PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)

CAPTIONS = [
    "a handwritten seven",
    "Don't   they'll 90*90\n\n  two lines\r\n",
    "Ein schönes Bild, für Jürgen – 50 €",
    "красивый дом на берегу моря",
    "夕暮れの富士山、１２３",
    "صورة جميلة لقطة",
    "तस्वीर में एक बिल्ली",
    "한국어 캡션",
    "e\u0301te\u0301 \u212b \ufb01",
    "👩‍👩‍👧 🏳️‍🌈 x² ½",
    "\t tabs\u3000and\u00a0blanks  ",
    "",
]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|extra_203|>",
    "<|image start|>",
    "<|image token|>",
    "<|visual token 000000|>",
    "<image>",
]


def fast_tokenizer(blanks=False):
    """A small transformers tokenizer of Emu3's kind; its special tokens are entries of the model's vocabulary too."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.WhitespaceSplit() if blanks else pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    size = len(state["model"]["vocab"])
    state["model"]["vocab"] |= {token: size + number for number, token in enumerate(SPECIAL)}
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|extra_203|> $A <|endoftext|>",
        special_tokens=[(name, size + SPECIAL.index(name)) for name in ("<|extra_203|>", "<|endoftext|>")],
    )
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=50, pad_token=SPECIAL[0], pad_id=size)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), size


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """(transformers' tokenizer, number of ordinary tokens, ours from the folder that it saved)."""
    theirs, size = fast_tokenizer()
    folder = tmp_path_factory.mktemp("fast")
    theirs.save_pretrained(folder)
    return theirs, size, open_text_tokenizer(folder)


@pytest.fixture(scope="module")
def ranks():
    """Bytes, then pieces of the captions, longer ones last."""
    pieces = {word[:end] for text in CAPTIONS for word in text.encode().split(b" ") for end in range(2, 9)}
    pieces |= {b" " + piece for piece in pieces} | {b"<|", b"|>", b"endoftext", b" \xff"}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += sorted((piece for piece in pieces if len(piece) > 1), key=lambda piece: (len(piece), piece))
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(folder, ranks):
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "emu3.tiktoken").write_text("".join(lines))


@pytest.fixture(scope="module")
def original(ranks, tmp_path_factory):
    """(tiktoken's encoding with Emu3's special tokens, number of ordinary tokens, ours)."""
    special = {token: len(ranks) + number for number, token in enumerate(SPECIAL)}
    theirs = tiktoken.Encoding("oracle", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    folder = tmp_path_factory.mktemp("original")
    write_tiktoken(folder, ranks)
    return theirs, len(ranks), open_text_tokenizer(folder)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ordinary_captions_have_transformers_ids(caption, fast):
    theirs, _, ours = fast
    expected = theirs(caption, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    assert ours.encode(caption) == expected
    assert ours.decode(ours.encode(caption)) == unicodedata.normalize("NFC", caption)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ordinary_captions_have_the_originals_ids(caption, original):
    theirs, _, ours = original
    expected = theirs.encode(unicodedata.normalize("NFC", caption), allowed_special="all")
    assert ours.encode(caption) == expected
    assert ours.decode(expected) == unicodedata.normalize("NFC", caption)


def test_the_cases_are_not_all_single_bytes(fast, original):
    for _, _, ours in (fast, original):
        assert len(ours.encode(CAPTIONS[0])) < len(CAPTIONS[0]) / 2


@pytest.mark.parametrize("kind", ["fast", "original"])
@pytest.mark.parametrize("special", SPECIAL)
def test_what_looks_like_a_special_token_stays_text(kind, special, request):
    theirs, size, ours = request.getfixturevalue(kind)
    control = theirs.convert_tokens_to_ids(special) if kind == "fast" else theirs.encode_single_token(special)
    assert control >= size == ours.size  # the oracle knows it as special
    for text in (special, f"a {special} b", special * 3, f"{special[:-1]}", f" {special}"):
        ids = ours.encode(text)
        assert all(0 <= number < size for number in ids)
        assert ours.decode(ids) == text


def test_a_text_that_is_cut_just_there_does_not_meet_a_special_entry_of_the_vocabulary(tmp_path):
    theirs, size = fast_tokenizer(blanks=True)
    theirs.save_pretrained(tmp_path)
    ours = open_text_tokenizer(tmp_path)
    for special in SPECIAL:
        assert all(number < size for number in ours.encode(f"a {special} b"))


TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*SPECIAL, *CAPTIONS, " ", "\r\n"])), max_size=5)


@settings(max_examples=150, deadline=None)
@given(parts=TEXTS)
def test_any_text_has_ordinary_ids_and_comes_back(parts, fast, original):
    text = "".join(parts)
    for _, size, ours in (fast, original):
        ids = ours.encode(text)
        assert all(type(number) is int and 0 <= number < size for number in ids)
        assert ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_nothing_is_added_cut_or_padded(fast, original):
    for _, _, ours in (fast, original):
        assert ours.encode("") == []
        assert len(ours.encode("x 1 " * 500)) >= 1000


def test_the_demos_own_tokenizer(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 320)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = open_text_tokenizer(tmp_path)
    assert ours.size == tokenizer.get_vocab_size() == 320
    for caption in [*CAPTIONS, *SPECIAL]:
        assert ours.encode(caption) == tokenizer.encode(caption).ids
        assert ours.decode(ours.encode(caption)) == caption


@pytest.mark.parametrize("kind", ["fast", "original"])
def test_what_is_saved_opens_as_the_same(kind, request, tmp_path):
    _, _, ours = request.getfixturevalue(kind)
    ours.save(tmp_path / "new" / "folder")
    again = open_text_tokenizer(tmp_path / "new" / "folder")
    assert (again.size, again.fingerprint()) == (ours.size, ours.fingerprint())
    assert all(again.encode(caption) == ours.encode(caption) for caption in CAPTIONS)


def test_what_is_saved_is_still_transformers(fast, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs, _, ours = fast
    ours.save(tmp_path)
    again = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert again.get_vocab() == theirs.get_vocab()


def test_the_fingerprint_is_of_the_meaning(fast, tmp_path, ranks, original):
    _, _, ours = fast
    state = json.loads(ours.files["tokenizer.json"])
    path = tmp_path / "tokenizer.json"

    def with_state(changed):
        path.write_text(json.dumps(changed, indent=7))
        return open_text_tokenizer(tmp_path).fingerprint()

    assert with_state(state) == with_state(state | {"padding": None, "post_processor": None}) == ours.fingerprint()
    assert with_state(state | {"normalizer": None}) != ours.fingerprint()
    path.unlink()
    swapped = list(ranks)
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    write_tiktoken(tmp_path, {token: rank for rank, token in enumerate(swapped)})
    assert open_text_tokenizer(tmp_path).fingerprint() != original[2].fingerprint()


def test_tokenizer_json_comes_first(fast, ranks, tmp_path):
    write_tiktoken(tmp_path, ranks)
    fast[2].save(tmp_path)
    assert open_text_tokenizer(tmp_path).fingerprint() == fast[2].fingerprint()


def test_merges_are_never_left_to_chance(fast, tmp_path):
    state = json.loads(fast[2].files["tokenizer.json"])
    state["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert all(open_text_tokenizer(tmp_path).encode(text) == fast[2].encode(text) for text in CAPTIONS)


@pytest.mark.parametrize("kind", ["fast", "original"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800", "a lone surrogate (U+D800) at character 3, which is no text"),
        ("\udfff", "a lone surrogate (U+DFFF) at character 1, which is no text"),
        (" " * (MAX_CHARACTERS + 1), "a text of 100001 characters; at most 100000 are taken"),
    ],
)
def test_texts_that_cannot_be_are_refused(kind, text, message, request):
    _, _, ours = request.getfixturevalue(kind)
    with pytest.raises(UserError) as error:
        ours.encode(text)
    assert str(error.value) == message


@pytest.mark.parametrize("letter", [" ", "\n", "\u3000", "a", "!", "\u0301"])
def test_the_longest_text_is_encoded(letter, fast, original):
    text = letter * (MAX_CHARACTERS - 1) + "x"
    for _, _, ours in (fast, original):
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", ["fast", "original"])
def test_ids_that_are_not_of_text_are_refused(kind, request):
    _, size, ours = request.getfixturevalue(kind)
    for number in (size, size + 3, -1, 2**70):
        with pytest.raises(UserError, match=f"id {number} is not one of text; those are below {size}"):
            ours.decode([0, number])


def refused(folder):
    with pytest.raises(UserError) as error:
        open_text_tokenizer(folder).encode("any text")
    assert "\n" not in str(error.value)
    return str(error.value)


DAMAGED = "is damaged: expected the JSON of the tokenizers library, with a model's vocab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", DAMAGED),
        ("[]", DAMAGED),
        ("[" * 10**5, DAMAGED),
        ("\xff\xfe", DAMAGED),
        ('{"model": null}', DAMAGED),
        ('{"model": {"vocab": {}}, "added_tokens": [3]}', DAMAGED),
        ('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "has a model of type 'Unigram'; those read are BPE"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "the tokenizers library does not take it: "),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
            "the tokenizers library does not take it: ",
        ),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": []}}', "the tokenizers library does not"),
    ],
)
def test_a_damaged_tokenizer_json_is_named(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    assert refused(tmp_path).startswith(f"{path}: {message}")


def test_a_panic_of_the_library_is_one_line_too(fast, tmp_path):
    state = json.loads(fast[2].files["tokenizer.json"])
    state["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert "tokenizer.json: the tokenizers library does not take it: " in refused(tmp_path)


def test_an_unknown_word_stays_one_where_that_token_is_an_added_one_too(tmp_path):
    vocabulary = {"a": 0, "<unk>": 1, "<image>": 2}
    state = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token} for token, number in vocabulary.items() if number],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    ours = open_text_tokenizer(tmp_path)
    assert (ours.encode("a b <image> a"), ours.size) == ([0, 1, 1, 0], 2)


def test_a_text_that_the_model_has_no_token_for_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}'
    )
    assert refused(tmp_path).startswith("tokenizer.json cannot encode 'any text': WordLevel error: Missing [UNK]")


BYTES = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no token for the single byte 0: it is truncated or damaged"),
        (b"IQ== 0\nIg== 1\n", "has no token for the single byte 0: it is truncated or damaged"),
        (BYTES[:-9], "has no token for the single byte 255: it is truncated or damaged"),
        (BYTES[:-3], "the ranks of its 256 tokens are not 0 to 255: it is truncated or damaged"),
        (BYTES + b"YWI= 255\n", "the ranks of its 257 tokens are not 0 to 256"),
        (BYTES + b"YWI= -1\n", "the ranks of its 257 tokens are not 0 to 256"),
        (BYTES + b"YW!I= 256\n", "line 257 is not a token in base64 and its rank"),
        (BYTES + b"YWI= 256 3\n", "line 257 is not a token in base64 and its rank"),
        (BYTES + b"YWI= " + b"9" * 5000, "line 257 is not a token in base64 and its rank"),
        (b"\x80\x04K\x01.", "line 1 is not a token in base64 and its rank"),
    ],
)
def test_a_damaged_tiktoken_file_is_named(content, message, tmp_path):
    path = tmp_path / "emu3.tiktoken"
    path.write_bytes(content)
    assert refused(tmp_path).startswith(f"{path}: {message}")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert refused(folder) == f"{folder} holds no text tokenizer: neither tokenizer.json nor emu3.tiktoken"
    assert "cannot be read: File name too long" in refused(tmp_path / ("x" * 5000))
