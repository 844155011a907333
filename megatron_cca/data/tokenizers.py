"""The tokenizers that a checkpoint or a shard folder comes with: of captions, and of images.

A text tokenizer is a file of the ``tokenizers`` library or of tiktoken. An image tokenizer is that of a model family,
or the demo's codebook of patches. The names of files decide which one a path holds. Where two families' have the same
names, their tensors' names decide.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_cca.data.codebooks import CODEBOOK_FILE, PYRAMID_FILE, codebook_file, open_patch_tokenizer
from megatron_cca.errors import UserError, error_context, first_line
from megatron_cca.models import FAMILIES
from megatron_cca.models.formats import ImageTokenizer, ImageTokenizerFiles
from megatron_cca.models.image_vocabulary import PromptTemplate

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILE = "emu3.tiktoken"

# More than any caption has. Emu3's pattern fails on far longer runs of blanks (a million).
MAX_CHARACTERS = 100_000

# Emu3's pattern for cutting text before byte pairs are merged (baaivision/Emu3, tokenization_emu3.py). Digits stay
# single.
_EMU3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The sections of tokenizer.json that turn ordinary text into ids and back.
_ORDINARY = ("normalizer", "pre_tokenizer", "model", "decoder")
# Added tokens can be removed from the vocabularies of these. A Unigram's is a list whose places are the ids.
_MODELS = ("BPE", "WordLevel", "WordPiece")


@dataclass(frozen=True)
class TextTokenizer:
    """An encoder of ordinary text to ids, and their decoder. :func:`open_text_tokenizer` makes one.

    In a caption, text that looks like a special token is plain text. No caption has control or visual ids.

    Attributes:
        size: ids are below it.
        encode_ordinary, decode_ordinary: functions of the library that the files belong to.
        encode_with_added: encodes text in which the names of added tokens stand for these tokens.
        files: the contents that :meth:`save` writes, by name.
        meaning: everything that the ids depend on. :meth:`fingerprint` hashes it.
    """

    size: int
    encode_ordinary: Callable[[str], list[int]]
    decode_ordinary: Callable[[list[int]], str]
    encode_with_added: Callable[[str], list[int]]
    files: dict[str, bytes]
    meaning: bytes

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without begin, end or padding.

        Raises:
            UserError: a lone surrogate, which is no character, a text of more than ``MAX_CHARACTERS``, or one that the
                tokenizer cannot encode.
        """
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"a text of {len(text)} characters; at most {MAX_CHARACTERS} are taken")
        lone = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if lone is not None:
            raise UserError(f"a lone surrogate (U+{ord(text[lone]):04X}) at character {lone + 1}, which is no text")
        with _in_one_line(f"{next(iter(self.files))} cannot encode {text[:40]!r}"):
            return self.encode_ordinary(text)

    def encode_caption(self, caption: str, template: PromptTemplate | None) -> list[int]:
        """Return the ids of a caption as a prompt has it, with the words of its template.

        Raises:
            UserError: as :meth:`encode` does.
        """
        if template is None:
            return self.encode(caption)
        before, after = self._words(template.before), self._words(template.after)
        return [*before, *self.encode(f" {caption.strip()}"), *after]

    def decode_caption(self, ids: Sequence[int], template: PromptTemplate | None) -> str:
        """Return the text of a caption without the words of its template. Raises as :meth:`decode` does."""
        if template is None:
            return self.decode(ids)
        start, stop = len(self._words(template.before)), len(ids) - len(self._words(template.after))
        return self.decode(ids[start:stop]).removeprefix(" ")

    def _words(self, text: str) -> list[int]:
        with _in_one_line(f"{next(iter(self.files))} cannot encode {text[:40]!r}"):
            return self.encode_with_added(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. An id that is only a part of a character becomes U+FFFD.

        Raises:
            UserError: an id that is not one of text.
        """
        for number in ids:
            if not 0 <= number < self.size:
                raise UserError(f"id {number} is not one of text; those are below {self.size}")
        return self.decode_ordinary([int(number) for number in ids])

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's file into a folder, byte for byte as it was read, for :func:`open_text_tokenizer`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def fingerprint(self) -> str:
        """Return a short hash of everything that the ids depend on.

        Added tokens and the file's formatting do not count.
        """
        return hashlib.sha256(self.meaning).hexdigest()[:16]


def open_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Open the text tokenizer in a folder: ``tokenizer.json``, else the original Emu3's ``emu3.tiktoken``.

    The normaliser, pre-tokeniser, model and decoder of ``tokenizer.json`` are used. Added tokens, template, truncation,
    padding and a dropout of merges are not. ``emu3.tiktoken`` is used with Emu3's pattern on text in NFC.

    Raises:
        UserError: no such file, or a damaged one; names the file.
    """
    folder = Path(folder)
    for name, read in ((TOKENIZER_FILE, _read_json_file), (TIKTOKEN_FILE, _read_tiktoken_file)):
        path = folder / name
        with error_context(path):
            try:
                if path.is_file():
                    return read(path.name, path.read_bytes())
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}") from None
    raise UserError(f"{folder} holds no text tokenizer: neither {TOKENIZER_FILE} nor {TIKTOKEN_FILE}")


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with at most ``vocab_size`` entries. Digits stay single tokens, as in Emu3's "90*90"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def tokenizer_facts(
    text: TextTokenizer | None, images: ImageTokenizer | None, path: Path | None, weights: Path | None = None
) -> dict[str, Any]:
    """Return a manifest's facts on the tokenizers that its samples were made with.

    Args:
        text: None where captions are classes.
        images: None where the codes were made elsewhere.
        path, weights: where the image tokenizer is, see :func:`open_image_tokenizer`.
    """
    found = None
    if images is not None:
        found = {"kind": images.kind, "fingerprint": images.fingerprint(), "folder": str(path.resolve())}
        found |= {} if weights is None else {"weights": str(weights.resolve())}
    return {
        "image_tokenizer": found,
        "text_tokenizer": None if text is None else {"fingerprint": text.fingerprint()},
    }


def open_image_tokenizer(
    path: str | Path,
    device: str | torch.device = "cpu",
    scales: tuple[int, ...] = (),
    weights: str | Path | None = None,
) -> ImageTokenizer:
    """Open the image tokenizer in a folder or file: the demo's codebook of patches, or that of a model family.

    Args:
        path: on disk. Nothing is downloaded.
        device: where a family's model runs. A patch codebook always runs on the CPU.
        scales: of the model that the codes are for, where it is known and has some.
        weights: the folder of its tensors, for the files that a checkpoint keeps. None means that they are in ``path``.

    Raises:
        UserError: nothing there, no tokenizer in it, or a damaged one; names the file.
    """
    path = Path(path)
    families = [family.image_tokenizer for family in FAMILIES.values() if family.image_tokenizer is not None]
    try:
        if not path.exists():
            raise UserError(f"no file or folder at {path}; nothing is fetched from a hub here, download it first")
        if codebook_file(path) is not None:
            return open_patch_tokenizer(path)
        if found := [files for files in families if files.recognises(path)]:
            known = [files for files in found if files.knows(path)] if len(found) > 1 else found
            return _opened_by(known or found, path, device, scales, None if weights is None else Path(weights))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    described = " nor ".join([CODEBOOK_FILE, PYRAMID_FILE, *(files.description for files in families)])
    raise UserError(f"{path} holds no image tokenizer: neither {described}")


def check_scales(tokenizer: ImageTokenizer, scales: tuple[int, ...]) -> None:
    """Check that an image tokenizer makes the grids of codes that a model takes.

    Args:
        tokenizer: any.
        scales: of the model.

    Raises:
        UserError: it does not. The message does not name the file.
    """
    if tokenizer.scales != scales:
        found, wanted = (_grids_named(sides) for sides in (tokenizer.scales, scales))
        raise UserError(f"makes {found} of an image, and the model takes {wanted}; give the model's own")


def _grids_named(scales: tuple[int, ...]) -> str:
    return f"grids of codes of side {', '.join(str(side) for side in scales)}" if scales else "one grid of codes"


def _opened_by(
    families: Sequence[ImageTokenizerFiles],
    path: Path,
    device: str | torch.device,
    scales: tuple[int, ...],
    weights: Path | None,
) -> ImageTokenizer:
    """Open a path by the first family that takes it. If none does, say why each does not."""
    refusals: list[str] = []
    for files in families:
        try:
            return files.open(path, device, weights, scales)
        except UserError as error:
            refusals.append(str(error))
    first, *others = dict.fromkeys(refusals)
    raise UserError("; ".join([first, *(one.removeprefix(f"{path}: ") for one in others)]))


def _read_json_file(name: str, content: bytes) -> TextTokenizer:
    try:
        found = json.loads(content)
        model, added = found["model"], found.get("added_tokens") or []
        vocabulary, special = model["vocab"], {token["content"] for token in added}
        kind = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("is damaged: expected the JSON of the tokenizers library, with a model's vocab") from None
    if kind not in _MODELS or not isinstance(vocabulary, dict):
        raise UserError(f"has a model of type {str(kind)[:40]!r}; those read are {', '.join(_MODELS)}, by name and id")
    # An added token may also be an entry of the model. Ordinary text could then be encoded to it.
    special -= {token for token in special if token == model.get("unk_token")}
    model = model | {"vocab": {token: number for token, number in vocabulary.items() if token not in special}}
    if "dropout" in model:
        model["dropout"] = None
    kept = {key: found.get(key) for key in _ORDINARY} | {"model": model}
    tokenizer = _build(kept | {"version": "1.0"})
    return TextTokenizer(
        size=max(tokenizer.get_vocab().values(), default=-1) + 1,
        encode_ordinary=lambda text: tokenizer.encode(text).ids,
        decode_ordinary=tokenizer.decode,
        encode_with_added=partial(_encode_with_added, content),
        files={name: content},
        meaning=json.dumps(kept, sort_keys=True).encode(),
    )


@lru_cache(maxsize=64)
def _encode_with_added(content: bytes, text: str) -> list[int]:
    """Return the ids of a template's words by a whole file. The result is kept, since every caption needs it."""
    return Tokenizer.from_buffer(content).encode(text, add_special_tokens=False).ids


def text_tokenizer_of(tokenizer: Tokenizer) -> TextTokenizer:
    """Return the text tokenizer that :func:`open_text_tokenizer` opens where ``tokenizer`` was saved."""
    return _read_json_file(TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())


def _build(sections: dict[str, Any]) -> Tokenizer:
    with _in_one_line("the tokenizers library does not take it"):
        return Tokenizer.from_str(json.dumps(sections))


def _read_tiktoken_file(name: str, content: bytes) -> TextTokenizer:
    try:
        import tiktoken
    except ImportError:
        raise UserError("needs tiktoken; pip install tiktoken") from None
    ranks = _ranks(content)
    encoding = tiktoken.Encoding("emu3", pat_str=_EMU3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> list[int]:
        return encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    return TextTokenizer(
        size=len(ranks),
        encode_ordinary=encode,
        decode_ordinary=encoding.decode,
        # The file does not name the added tokens.
        encode_with_added=encode,
        files={name: content},
        meaning=b"\n".join([_EMU3_PATTERN.encode(), *(base64.b64encode(token) for token in ranks)]),
    )


def _ranks(content: bytes) -> dict[bytes, int]:
    """Return the id of each token, in the order of ids."""
    pairs: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split() if line else (None, None)
            if token is not None:
                pairs[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"line {number} is not a token in base64 and its rank") from None
    ranks = dict(sorted(pairs.items(), key=lambda pair: pair[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}: it is truncated or damaged"
        )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"has no token for the single byte {byte}: it is truncated or damaged")
    return ranks


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer library raises into one line."""
    try:
        yield
    except BaseException as error:
        # A panic in the libraries' Rust code is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {first_line(error)}") from None
