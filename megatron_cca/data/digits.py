"""The demo's data, scikit-learn's ``load_digits``: 1,797 real 8 x 8 scans of handwritten digits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from megatron_cca.config import Config, ModelConfig
from megatron_cca.data import DIGITS
from megatron_cca.data.codebooks import PatchCodebook, PyramidCodebook
from megatron_cca.data.manifest import FILE_NAME as MANIFEST
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.tokenizers import text_tokenizer_of, train_tokenizer
from megatron_cca.errors import SurroundingsError, UserError
from megatron_cca.io.paths import refusal
from megatron_cca.models import tiny_architecture
from megatron_cca.models.image_vocabulary import ImageVocabulary

# The folders of their tokens, below the working directory.
_WITH_TEXTS, _WITH_CLASSES = Path("runs/data/digits"), Path("runs/data/digits_classes")
_AS_PYRAMIDS = Path("runs/data/digits_pyramids")

HELD_OUT = 360
PATCH = 2
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = ("a handwritten {}", "the digit {}", "a scan of a {}", "{} in handwriting")


@dataclass(frozen=True)
class Scans:
    """Real scans: ``images`` uint8 ``[N, 8, 8]`` with grey levels 0 to 255, ``labels`` int64 ``[N]``."""

    images: np.ndarray
    labels: np.ndarray


def load_scans() -> tuple[Scans, Scans]:
    """Return the training split (1,437 scans) and the held-out split (360), stratified by digit.

    They are always the same.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("data.path: digits needs scikit-learn; pip install 'megatron-cca[eval]'") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        images, bunch.target.astype(np.int64), test_size=HELD_OUT, random_state=0, stratify=bunch.target
    )
    return Scans(parts[0], parts[2]), Scans(parts[1], parts[3])


def captions_of(label: int) -> list[str]:
    """Return every phrasing of a digit."""
    return [phrasing.format(DIGIT_NAMES[label]) for phrasing in PHRASINGS]


def digit_shards(model: ModelConfig) -> Path:
    """Return the digits' shards for the small model of a ``model`` section's family.

    See :func:`ensure_digit_shards`.
    """
    return ensure_digit_shards(tiny_architecture(model).vocabulary)


def data_folders(config: Config, *, make: bool = True) -> Iterator[Path]:
    """Yield the folders of shards that ``data.path`` names. The word digits stands for :func:`digit_shards`.

    Args:
        config: of a run.
        make: whether to make the digits' shards. Otherwise their folder need not exist.
    """
    path = config.data.path
    for name in [path] if isinstance(path, str) else path or ():
        if name != DIGITS:
            yield Path(name)
        else:
            yield digit_shards(config.model) if make else usual_folder(tiny_architecture(config.model).vocabulary)


def usual_folder(vocabulary: ImageVocabulary) -> Path:
    """Return the folder below the working directory that holds the digits' shards for a small model's vocabulary."""
    by_condition = _WITH_TEXTS if vocabulary.num_classes is None else _WITH_CLASSES
    folder = _AS_PYRAMIDS if vocabulary.scales else by_condition
    return folder if vocabulary.template is None else folder.with_name(f"{folder.name}_{vocabulary.fingerprint()}")


def ensure_digit_shards(vocabulary: ImageVocabulary, folder: Path | None = None) -> Path:
    """Tokenise the training split unless that was done before. Many processes may call this at the same time.

    Args:
        vocabulary: of a small model. Captions are texts or classes, as it needs.
        folder: where the shards are. None means the usual folder below the working directory.

    Raises:
        SurroundingsError: there are no shards, and the folder cannot be written.
    """
    folder = usual_folder(vocabulary) if folder is None else folder
    refused = refusal(folder.parent)
    if refused is not None and (not folder.exists() or _is_of_an_earlier_version(folder)):
        raise SurroundingsError(
            f"{folder.absolute()} cannot be written ({refused.strerror}), where the word digits has its shards made; "
            "start in a folder that can be"
        )
    if refused is not None:
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_of_an_earlier_version(folder):
            shutil.rmtree(folder)
        if not folder.exists():
            _tokenize(folder, vocabulary)
    return folder


def _is_of_an_earlier_version(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        read_manifest(folder)
    except UserError:
        return True
    return False


def _tokenize(folder: Path, vocabulary: ImageVocabulary) -> None:
    train, _ = load_scans()
    codebook = _fitted(train.images, vocabulary)
    text = None
    if vocabulary.num_classes is None:
        captions = (text for label in range(10) for text in captions_of(label))
        text = text_tokenizer_of(train_tokenizer(captions, vocabulary.text_size))

    def write_extras(partial: Path) -> None:
        if text is not None:
            text.save(partial)
        codebook.save(partial)

    phrasings = np.random.default_rng(0).integers(len(PHRASINGS), size=len(train.labels))
    captions = (
        [label] if text is None else text.encode_caption(captions_of(label)[phrasing], vocabulary.template)
        for label, phrasing in zip(train.labels, phrasings, strict=True)
    )
    samples = (
        Sample(codes, np.array(caption), f"digit {label}")
        for codes, caption, label in zip(codebook.encode(train.images), captions, train.labels, strict=True)
    )
    write_shards(folder, samples, vocabulary, None if text is None else text.encode, write_extras)


def _fitted(images: np.ndarray, vocabulary: ImageVocabulary) -> PatchCodebook | PyramidCodebook:
    if vocabulary.scales:
        return PyramidCodebook.fit(images, vocabulary.codebook_size, PATCH, vocabulary.scales)
    return PatchCodebook.fit(images, vocabulary.codebook_size, PATCH)
