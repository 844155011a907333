"""Turn captioned images into a shard folder, in parts, on any number of processes: the options of such a job."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_cca.config import ModelConfig
from megatron_cca.data.image_headers import ImageLimits
from megatron_cca.data.sources.source_protocol import SourceOptions
from megatron_cca.io.options import Count, DeviceChoice, Folder, Option, PathOrWord, Seed, options


@options
class TokenizeSettings:
    """Tokenize a source into a shard folder. Under torchrun on several processes or GPUs; the same command goes on
    where an interrupted one stopped (finished parts wait in OUTPUT.parts).
    """

    source: Folder
    """where the images and captions are. Layouts (recognised from what lies there; else set --layout):
    - captions: captions.jsonl ({"file_name": ..., "caption": ...}), or a .txt or .caption beside each image
    - classes: one folder per class, as ImageNet; names from classes.json or LOC_synset_mapping.txt if there is one
    - journeydb: JourneyDB's annotation jsonl beside its imgs/ folders
    - webdataset: tars
    - datasets: what Hugging Face datasets opens from disk: parquet, arrow, imagefolder, save_to_disk
    - preferences: preferences.jsonl ({"prompt": ..., "winner": ..., "loser": ...}, or "images" and "scores"), or a data
      set in the columns of Pick-a-Pic, HPDv2 or ImageRewardDB; writes pairs of images
    - idx: MNIST's files and those in its form, such as Fashion-MNIST's: train-images-idx3-ubyte.gz and its labels
    - emu3: Emu3's own JSON list of tokenised .pth files (no image tokenizer needed)
    - llamagen: what LlamaGen's own extraction wrote: NAME_codes and NAME_labels (likewise)"""
    output: Folder
    """the shard folder to write; must not exist"""
    text_tokenizer: Folder | None = None
    """folder of the checkpoint: tokenizer.json or emu3.tiktoken; none for a model that takes classes"""
    image_tokenizer: Path | None = None
    """the model's own file or folder (Emu3-VisionTokenizer, an Emu3 in transformers' form, a Janus-Pro), or a folder
    with the demo's codebook.npy"""
    fit_codebook: Annotated[int, Field(ge=2, le=2**16), Option(metavar="CODES")] | None = None
    """in place of --image-tokenizer, fit a codebook of so many patches to 2,000 images of the source, grey if they are;
    a tiny preset (such as llamagen-tiny) then takes its sizes from the images and classes, and one of texts without
    --text-tokenizer gets one that is trained on their captions"""
    patch: Annotated[Count, Option(metavar="PIXELS")] | None = None
    """with --fit-codebook, the side of a patch"""
    layout: Annotated[str, Option(metavar="NAME")] = "auto"
    """one of the above"""
    limit: Annotated[Count, Option(metavar="RECORDS")] | None = None
    """take so many records of the source, at equal distances (default: all)"""
    source_options: SourceOptions = field(default_factory=SourceOptions)
    model: Annotated[PathOrWord, Option(metavar="NAME")] = "emu3-8b"
    """preset, or checkpoint folder, whose vocabulary is used"""
    sizes: Annotated[ModelConfig | None, Option(hidden=True)] = None
    """the ``model`` section of a checkpoint whose vocabulary and grid are used; None means the preset's"""
    grid: Annotated[tuple[Count, Count], Option(metavar=("H", "W"))] | None = None
    """codes of an image, for a model that has one size only (default: the preset's); images are cropped to it"""
    flips: bool = False
    """tokenize each image mirrored, too: a step sees one of the two"""
    crops: Annotated[int, Field(ge=0, lt=2**15), Option(metavar="N")] = 0
    """tokenize so many random crops of each image, of which a step sees one, for a model that has one size only; the
    shorter side is 9/8 of a crop's, as in VAR's training (default 0: the middle alone)"""
    area: Annotated[Count, Option(metavar="PIXELS")] | None = None
    """target area, aspect ratio kept (default 720*720, or the first image's with --fit-codebook)"""
    resize: Literal["dali", "authors"] = "dali"
    """who decodes and resizes: dali, in one pass, on a GPU where there is one; or authors, in Pillow, bit for bit as
    the programs of the model's authors: take it to train a released model on"""
    clip_meta: str | None = None
    """what stands between BOI and IMG of a clip, with {frames}, {height}, {width} of the code grid; Emu3's authors have
    not published theirs, so clips cannot be trained on without it"""
    max_caption_tokens: Count = 1024
    """records with longer captions are skipped"""
    max_skipped: Annotated[float, Field(ge=0, le=1), Option(metavar="SHARE")] = 0.1
    """of the records; more end the job. Ties, and records of one image, do not count"""
    max_pixels: Count = ImageLimits.max_pixels
    """of an image"""
    batch_size: Count = 8
    """images encoded together"""
    threads: Count | None = None
    """that read and decode (default: this process's share of the cores)"""
    block: Count = 1024
    """records a killed process repeats at most"""
    device: DeviceChoice = "auto"
    """of the image tokenizer"""

    @property
    def limits(self) -> ImageLimits:
        """The limits of an image."""
        return ImageLimits(max_pixels=self.max_pixels)

    @property
    def num_threads(self) -> int:
        """Threads of this process, of those that share the machine under torchrun."""
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.threads or max(1, share)


@options
class InspectSettings:
    """Check every file of a shard folder against its checksum. Prints counts and histograms of caption length and grid,
    and draws a contact sheet of decoded samples beside their captions.
    """

    shards: Annotated[Path, Option(metavar="SHARDS", name="SHARDS")]
    """the shard folder"""
    picture: Annotated[Path, Option(metavar="PNG")] | None = None
    """the contact sheet (default: SHARDS.png)"""
    samples: Count = 16
    """on the sheet"""
    seed: Seed = 0
    """which samples"""
    image_tokenizer: Path | None = None
    """(default: the one that the manifest names)"""
    device: DeviceChoice = "auto"
    """of the image tokenizer"""
