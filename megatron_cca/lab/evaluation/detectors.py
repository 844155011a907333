"""Detectors of COCO's classes from a local folder in transformers' form, and the verdicts of GenEval by them.

Nothing is downloaded, no pickled weights are loaded, and no code of a folder runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from tqdm import tqdm

from megatron_cca.errors import UserError, error_context
from megatron_cca.lab.evaluation.clip import ClipScorer
from megatron_cca.lab.evaluation.geneval import (
    COLORS,
    DETECTOR,
    THRESHOLD,
    Found,
    GenevalResult,
    Verdict,
    by_text,
    class_names,
    judged,
)
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.named_networks import fingerprint, read_config, refuse_missing
from megatron_cca.lab.evaluation.shares import Share

_SEGMENTS = "mask2former"
# Those of transformers' object detectors that are published with COCO's classes.
MODEL_TYPES = (
    _SEGMENTS,
    "conditional_detr",
    "d_fine",
    "dab-detr",
    "deformable_detr",
    "deimv2",
    "detr",
    "lw_detr",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
    "yolos",
)
_REMEDY = (
    "give the folder of a detector of COCO's classes in transformers' form, such as a copy of "
    "facebook/mask2former-swin-small-coco-instance"
)
# COCO's own words, and darknet's, for classes that GenEval calls by other names.
_OTHER_WORDS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_OUTPUTS = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
_BATCH = 8
# Grey in place of what is not the object, and the sentences whose mean embedding is a colour's, as the authors have it.
_GREY = 153
_SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def check_detector(folder: Path) -> dict[int, str]:
    """Refuse a path that is no folder of a detector of COCO's classes, by its ``config.json``.

    No weights are loaded.

    Returns:
        GenEval's word for each of the detector's labels that is one of COCO's 80 classes.

    Raises:
        UserError: names the folder, what it looks like, and what would be right.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{DETECTOR}: {folder} has no config.json; {_REMEDY}")
    config = read_config(file)
    try:
        model_type, labels = config["model_type"], config.get("id2label", {})
        names = {int(label): str(name) for label, name in labels.items()}
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{DETECTOR}: {file} names no model_type, or has a damaged id2label; {_REMEDY}") from None
    if model_type not in MODEL_TYPES:
        raise UserError(f"{DETECTOR}: {folder} looks like a {str(model_type)[:40]!r}, not like a detector; {_REMEDY}")
    known, wanted = {}, class_names()
    for label, name in names.items():
        word = name.lower().replace("_", " ").strip()
        known[label] = _OTHER_WORDS.get(word, word)
    lacking = [name for name in wanted if name not in known.values()]
    if lacking:
        found = f"lacks {len(lacking)} of COCO's {len(wanted)} classes, such as {lacking[0]!r}"
        raise UserError(f"{DETECTOR}: {folder} {found}; {_REMEDY}")
    return {label: name for label, name in known.items() if name in wanted}


class Detector:
    """A detector of COCO's classes.

    Args:
        folder: with ``config.json``, ``preprocessor_config.json`` and the weights as safetensors.
        device: of the model.

    Raises:
        UserError: see :func:`check_detector`; damaged or missing weights.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self._names = check_detector(folder)
        try:
            model, self._processor = _model_and_processor(folder)
        except Exception as error:  # transformers promises no closed set for damaged folders
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{DETECTOR}: {folder} holds no usable detector ({type(error).__name__}: {reason})"
            ) from None
        self._model = model.eval().requires_grad_(False).to(device)
        self._has_masks = model.config.model_type == _SEGMENTS
        self.origin = {"folder": str(folder), "model_type": model.config.model_type, "sha256": fingerprint(folder)}

    @torch.no_grad()
    def find(self, images: np.ndarray) -> list[Found]:
        """Return the objects above the lower threshold in each of the images, uint8 ``[N, H, W, 3]``.

        Raises:
            UserError: the detector gives NaN.
        """
        inputs = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        outputs = self._model(**inputs.to(self._model.device))
        # transformers' processing of masks mixes devices unless all is on the CPU.
        tensors = {name: outputs[name].float().cpu() for name in _OUTPUTS if outputs.get(name) is not None}
        if any(one.isnan().any() for one in tensors.values()):
            raise UserError(f"{DETECTOR}: {self.origin['folder']} gives NaN; its weights are damaged")
        sizes = [images.shape[1:3]] * len(images)
        process = (
            self._processor.post_process_instance_segmentation
            if self._has_masks
            else self._processor.post_process_object_detection
        )
        more = {"return_binary_maps": True} if self._has_masks else {}
        answers = process(SimpleNamespace(**tensors), threshold=THRESHOLD, target_sizes=sizes, **more)
        return [(self._of_masks if self._has_masks else self._of_boxes)(one, images.shape[1:3]) for one in answers]

    def _of_boxes(self, answer: Mapping, size: tuple[int, int]) -> Found:
        labels = answer["labels"].tolist()
        known = [place for place, label in enumerate(labels) if label in self._names]
        height, width = size
        boxes = answer["boxes"].numpy().astype(np.float64)[known].clip(0, [width, height, width, height])
        return Found([self._names[labels[place]] for place in known], answer["scores"].numpy()[known], boxes)

    def _of_masks(self, answer: Mapping, size: tuple[int, int]) -> Found:
        segments = answer["segments_info"]
        known = [place for place, one in enumerate(segments) if one["label_id"] in self._names]
        names = [self._names[segments[place]["label_id"]] for place in known]
        if not known:
            return Found([], np.zeros(0), np.zeros((0, 4)), np.zeros((0, *size), dtype=bool))
        masks = answer["segmentation"].numpy()[known] > 0
        boxes = np.array([_extent(mask) for mask in masks], dtype=np.float64)
        return Found(names, np.array([segments[place]["score"] for place in known]), boxes, masks)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _model_and_processor(folder: Path) -> tuple:
    # Imported late: the import of transformers takes seconds.
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, Mask2FormerForUniversalSegmentation

    segments = read_config(Path(folder) / "config.json")["model_type"] == _SEGMENTS
    kind = Mask2FormerForUniversalSegmentation if segments else AutoModelForObjectDetection
    options = {"local_files_only": True, "trust_remote_code": False}
    model, report = kind.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    refuse_missing(report)
    return model, AutoImageProcessor.from_pretrained(folder, **options)


class ColorNamer:
    """The names of objects' colours by a CLIP: of GenEval's ten, the one whose sentences are nearest."""

    def __init__(self, clip: ClipScorer) -> None:
        self._model, self._processor = clip.model, clip.processor
        self._known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def names(self, image: np.ndarray, found: Found, places: Sequence[int], name: str) -> list[str]:
        """Return the colour of each of some objects of one class.

        An object is cut out by its box. Where there is a mask, what is not the object becomes grey.

        Args:
            image: uint8 ``[H, W, 3]``.
            found: its objects.
            places: which of them.
            name: their class.
        """
        crops = [self._crop(image, found, place) for place in places]
        inputs = self._processor.image_processor(crops, return_tensors="pt").to(self._model.device)
        pooled = self._model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        seen = normalize(self._model.visual_projection(pooled).float(), dim=1)
        return [COLORS[place] for place in (seen @ self._of_class(name).T).argmax(1).tolist()]

    @staticmethod
    def _crop(image: np.ndarray, found: Found, place: int) -> Image.Image:
        if found.masks is not None:
            image = np.where(found.masks[place][..., None], image, np.uint8(_GREY))
        left, top, right, bottom = (round(side) for side in found.boxes[place].tolist())
        # A box may be thinner than a pixel.
        left, top = min(left, image.shape[1] - 1), min(top, image.shape[0] - 1)
        return Image.fromarray(image).crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def _of_class(self, name: str) -> torch.Tensor:
        """Return the embeddings of the ten colours for a class, ``[10, D]``."""
        if name not in self._known:
            texts = [sentence.format(color=color, name=name) for color in COLORS for sentence in _SENTENCES]
            length = self._model.config.text_config.max_position_embeddings
            options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
            inputs = self._processor.tokenizer(texts, **options).to(self._model.device)
            pooled = self._model.text_model(**inputs).pooler_output
            each = normalize(self._model.text_projection(pooled).float(), dim=1)
            self._known[name] = normalize(each.view(len(COLORS), len(_SENTENCES), -1).mean(1), dim=1)
        return self._known[name]


def geneval_of(
    name: str, images: ImageSet, detector: Detector, colors: ColorNamer | None, batch_size: int, share: Share
) -> GenevalResult | None:
    """Return GenEval's verdicts on a set of samples. Shows a progress bar.

    The set is one that :func:`megatron_cca.lab.evaluation.geneval.check_prompts` lets pass. All processes of a job call
    this together. The verdicts are whole on rank 0.

    Returns:
        The verdicts, None if the set has no prompts.

    Raises:
        UserError: the detector gives NaN.
    """
    if images.prompts is None:
        return None
    verdicts, count = [], len(images.images)
    with (
        error_context(f"--samples {name}"),
        tqdm(total=count, unit="image", desc=f"GenEval of {name}", disable=None) as bar,
    ):
        for start in share.starts(count, batch_size):
            end = min(start + batch_size, count)
            for first in range(start, end, _BATCH):
                rows = slice(first, min(first + _BATCH, end))
                verdicts += _verdicts(images.images[rows], images.prompts[rows], detector, colors)
            bar.update(share.done(start, count, batch_size))
    return GenevalResult(tuple(share.collected(verdicts, count, batch_size)))


def _verdicts(
    images: np.ndarray, prompts: Sequence[str], detector: Detector, colors: ColorNamer | None
) -> Iterator[Verdict]:
    for image, prompt, found in zip(images, prompts, detector.find(images), strict=True):

        def named(places: Sequence[int], name: str, image: np.ndarray = image, found: Found = found) -> list[str]:
            return colors.names(image, found, places, name)

        yield judged(by_text()[prompt], found, named)
