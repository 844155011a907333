"""Which text and image tokenizer belong to a checkpoint: those it brings, or those of the data it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.data.digits import KEYWORD, ensure_digit_shards
from megatron_cca.data.image_tokenizers import open_image_tokenizer
from megatron_cca.data.manifest import FILE_NAME as MANIFEST
from megatron_cca.data.manifest import read_manifest
from megatron_cca.data.patch_codebook import FILE_NAME as CODEBOOK_FILE
from megatron_cca.data.text import FILE_NAME as TOKENIZER_FILE
from megatron_cca.data.text import TIKTOKEN_NAME, TextTokenizer, open_text_tokenizer
from megatron_cca.errors import UserError, said_of
from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3.image_tokenizer import open_emu3_vq
from megatron_cca.models.emu3.vocabulary import EMU3_VOCABULARY, Emu3Vocabulary
from megatron_cca.models.emu3.vq_config import CONFIG
from megatron_cca.models.image_tokenizers import ImageTokenizer

OPTIONS = ("--text-tokenizer", "--image-tokenizer")


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers of a model."""

    text: TextTokenizer
    images: ImageTokenizer


def open_tokenizers(
    checkpoint: Path,
    config: Config,
    vocabulary: Emu3Vocabulary,
    *,
    text: Path | None = None,
    images: Path | None = None,
    device: str | torch.device = "cpu",
    options: tuple[str, str] = OPTIONS,
) -> Tokenizers:
    """The tokenizers of a checkpoint.

    Args:
        checkpoint: its own folder, or a Hugging Face folder.
        config: what it says of itself; ``data.path`` is looked at last.
        vocabulary: which the tokenizers must fit.
        text, images: folders that the user named; None means to look for them.
        device: of the image tokenizer.
        options: where a user names them, for messages.

    Raises:
        UserError: none found, damaged, or of another size than the model's vocabulary; names option or folder.
    """
    with said_of(options[0]):
        words = open_text_tokenizer(text) if text is not None else _text_of(checkpoint, config)
        if words.size > vocabulary.text_size:
            raise UserError(f"has {words.size} words, the model {vocabulary.text_size}; give the model's own")
    with said_of(options[1]):
        codes = open_image_tokenizer(images, device) if images is not None else _images_of(checkpoint, config, device)
        if codes.codebook_size != vocabulary.codebook_size:
            raise UserError(
                f"has a codebook of {codes.codebook_size}, the model one of {vocabulary.codebook_size}; give the "
                "model's own"
            )
    return Tokenizers(words, codes)


def usual_grid(config: Config) -> tuple[int, int]:
    """Height and width, in visual tokens, of all that a model was trained on; Emu3's own 90 x 90 where nothing says it.

    Raises:
        UserError: images of several sizes, or a model that is not Emu3's and whose data are gone.
    """
    grids = {grid for folder in _data_folders(config) if (folder / MANIFEST).is_file() for grid in _grids(folder)}
    if len(grids) == 1:
        return grids.pop()
    if resolve_architecture(config.model).vocabulary == EMU3_VOCABULARY:
        return 90, 90
    seen = f"{len(grids)} sizes" if grids else "data that are not here"
    raise UserError(f"the model was trained on {seen}; give height and width in visual tokens, such as 16 16")


def _grids(folder: Path) -> Iterator[tuple[int, int]]:
    for key in read_manifest(folder)["meta_words"]:
        frames, height, width = map(int, key.split("x"))
        if frames == 1:
            yield height, width


def _text_of(checkpoint: Path, config: Config) -> TextTokenizer:
    for folder in (checkpoint, checkpoint / layout.COMPANION_FILES, *_data_folders(config)):
        if (folder / TOKENIZER_FILE).is_file() or (folder / TIKTOKEN_NAME).is_file():
            return open_text_tokenizer(folder)
    raise UserError(
        f"neither {checkpoint} nor the data it was trained on has a text tokenizer; give a folder with "
        f"{TOKENIZER_FILE} or {TIKTOKEN_NAME}"
    )


def _images_of(checkpoint: Path, config: Config, device: str | torch.device) -> ImageTokenizer:
    kept, weights = checkpoint / layout.COMPANION_FILES, checkpoint / layout.COMPANION_TENSORS
    if weights.is_dir():
        return open_emu3_vq(kept, device, weights=weights)
    if (checkpoint / CONFIG).is_file():
        try:
            return open_emu3_vq(checkpoint, device)
        except UserError:
            pass  # the decoder alone, whose image tokenizer has a folder of its own
    for folder in _data_folders(config):
        if (folder / CODEBOOK_FILE).is_file():
            return open_image_tokenizer(folder, device)
    raise UserError(f"{checkpoint} has no image tokenizer with it; give its folder, such as Emu3-VisionTokenizer")


def _data_folders(config: Config) -> Iterator[Path]:
    names = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    for name in names:
        yield ensure_digit_shards() if name == KEYWORD else Path(name)
