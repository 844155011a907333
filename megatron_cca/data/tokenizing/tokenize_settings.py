"""The settings of a tokenising job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cca.config import ModelConfig
from megatron_cca.data.image_headers import ImageLimits
from megatron_cca.data.resizing import DALI
from megatron_cca.data.sources import SourceOptions


@dataclass(frozen=True)
class TokenizeSettings:
    """The settings of a job.

    Attributes:
        source, layout, source_options: the images and captions, see :func:`open_source`.
        output: the shard folder to write.
        model: the preset whose vocabulary the tokens have. With ``sizes``, only a name for messages.
        sizes: the ``model`` section of a checkpoint whose vocabulary and grid the tokens have. None means the preset's.
        image_tokenizer: its folder. None for sources that hold codes already.
        text_tokenizer: its folder. None where the model's captions are classes.
        grid: height and width, in codes, that the model takes. None means the preset's, or any where it takes any.
        flips: whether each image is tokenised mirrored too, as a second variant.
        area: images are resized to about this many pixels, with their aspect ratio. For a model of one grid they are
            cropped to that grid instead.
        resize: how images are decoded and resized: "dali", in one pass, or "authors", bit for bit as the model's
            authors do, see :mod:`megatron_cca.data.resizing`.
        clip_meta: the text between BOI and IMG of a clip, see :meth:`ImageVocabulary.meta_text`.
        max_caption_tokens: records with longer captions are skipped.
        max_skipped: the share of records that may be skipped. More end the job.
        limits: of an image.
        batch_size: images that go through the image tokenizer together.
        threads: how many read, check and decode images.
        block: how many records one process works on at a time. A killed process loses at most so many.
    """

    source: Path
    output: Path
    text_tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    layout: str = "auto"
    source_options: SourceOptions = field(default_factory=SourceOptions)
    model: str = "emu3-8b"
    sizes: ModelConfig | None = None
    grid: tuple[int, int] | None = None
    flips: bool = False
    area: int = 518_400
    resize: str = DALI
    clip_meta: str | None = None
    max_caption_tokens: int = 1024
    max_skipped: float = 0.1
    limits: ImageLimits = field(default_factory=ImageLimits)
    batch_size: int = 8
    threads: int = 4
    block: int = 1024
