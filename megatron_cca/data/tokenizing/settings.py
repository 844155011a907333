"""What a user says about a tokenising job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cca.config import ModelConfig
from megatron_cca.data.image_headers import ImageLimits
from megatron_cca.data.resizing import DALI
from megatron_cca.data.sources import SourceOptions


@dataclass(frozen=True)
class TokenizeSettings:
    """A job.

    Attributes:
        source, layout, source_options: where the images and captions are, see :func:`open_source`.
        output: the shard folder to write.
        model: the preset whose vocabulary the tokens are for, or a name for messages beside ``sizes``.
        sizes: the ``model`` section of a checkpoint whose vocabulary and grid they are for; None means the preset's.
        image_tokenizer: its folder; None for sources that hold codes already.
        text_tokenizer: its folder; None where the model's captions are classes.
        grid: height and width, in codes, that the model takes; None means the preset's, or any where it takes any.
        flips: whether each image is tokenised mirrored too, as a second variant.
        area: images are resized to about this many pixels, keeping their aspect ratio; for a model of one grid they are
            cropped to it instead.
        resize: who decodes and resizes: "dali", in one pass, or "authors", bit for bit as the model's authors do, see
            :mod:`megatron_cca.data.resizing`.
        clip_meta: what stands between BOI and IMG of a clip, see :meth:`ImageVocabulary.meta_text`.
        max_caption_tokens: records with longer captions are skipped.
        max_skipped: share of the records that may be skipped; more end the job.
        limits: of an image.
        batch_size: images that go through the image tokenizer together.
        threads: that read, check and decode images.
        block: records that one process works on at a time; what a killed process has to do again at most.
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
