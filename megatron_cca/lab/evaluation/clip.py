"""CLIP score: how well samples match their prompts, and the scorers that a user can name for best of N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import SCORER, Scorer
from megatron_cca.lab.evaluation.classifiers import is_function_spec, load_function
from megatron_cca.lab.evaluation.named_networks import (
    SCORER_KINDS,
    check_folder,
    folder_of,
    kind_of,
    loaded,
    refuse_missing,
)

CLIP = "--clip"


@dataclass(frozen=True)
class TruncatedPrompts:
    """The number of prompts, of ``count``, that the model reads only in part.

    The model reads ``tokens`` tokens.
    """

    prompts: int
    count: int
    tokens: int

    def line(self) -> str | None:
        """Return a line for the user; None if no prompt is cut."""
        if not self.prompts:
            return None
        return (
            f"{self.prompts} of {self.count} prompts are longer than the {self.tokens} tokens that this CLIP reads; "
            "their ends are not scored"
        )


class ClipScorer:
    """CLIP score by a CLIP of transformers in a local folder.

    Nothing is downloaded.

    Args:
        folder: a folder with ``config.json``, the weights as safetensors, and the files of CLIPProcessor, such as a
            copy of openai/clip-vit-large-patch14.
        device: the device of the model.
        batch_size: number of images and prompts in one batch.
        option: the option that named the folder, for messages.

    Raises:
        UserError: no such folder, or a folder without a CLIP.
    """

    kind = "clip"

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", batch_size: int = 64, option: str = CLIP
    ) -> None:
        check_folder(self.kind, folder, option)
        model, self.processor = loaded(self.kind, Path(folder), option, lambda: _model_and_processor(folder))
        self.model = model.eval().requires_grad_(False).to(device)
        self.batch_size = batch_size

    def scores(
        self, images: np.ndarray, prompts: Sequence[str], on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Return 100 * max(cosine, 0) of each image and its prompt, float32 ``[N]``.

        Tables in papers call this CLIP score. The CLIPScore paper (arXiv 2104.08718) has 2.5 in place of 100. It also
        puts "A photo depicts" before the text. This is not done here. Prompts are cut to the model's length.
        :meth:`cut` counts those that are cut.

        Args:
            images: uint8 ``[N, H, W, 3]``.
            prompts: as many prompts.
            on_progress: called with the number of images just scored.
        """
        assert len(images) == len(prompts)
        scores = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores.append(self._batch(images[rows], list(prompts[rows])))
            if on_progress is not None:
                on_progress(len(scores[-1]))
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    __call__ = scores

    def cut(self, prompts: Sequence[str]) -> TruncatedPrompts:
        """Count the prompts that are cut before they are scored."""
        long = 0
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            ids = self.processor.tokenizer(batch, truncation=False, verbose=False)["input_ids"]
            long += sum(len(one) > self._length for one in ids)
        return TruncatedPrompts(long, len(prompts), self._length)

    @property
    def _length(self) -> int:
        """Number of tokens that the model reads, begin and end included."""
        return self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def _batch(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        options = {"padding": True, "truncation": True, "max_length": self._length}
        inputs = self.processor(
            images=list(images), text=prompts, return_tensors="pt", input_data_format="channels_last", **options
        )
        # Both embeddings are normalised.
        outputs = self.model(**inputs.to(self.model.device))
        return self._scaled((outputs.image_embeds.float() * outputs.text_embeds.float()).sum(1)).cpu().numpy()

    def _scaled(self, cosines: Tensor) -> Tensor:
        return 100 * cosines.clamp(min=0)


class PickScorer(ClipScorer):
    """PickScore (arXiv 2305.01569): the cosine times the exponential of the learnt scale, as its authors do.

    A PickScore is a fine-tuned CLIP-H. Its folder says nothing that tells it from another CLIP.
    """

    kind = "pickscore"

    def _scaled(self, cosines: Tensor) -> Tensor:
        return self.model.logit_scale.exp().float() * cosines


def _model_and_processor(folder: str | Path) -> tuple:
    # Imported late: the import of transformers takes seconds.
    from transformers import CLIPModel, CLIPProcessor

    # Load no pickled weights, and run no code from the folder.
    model, report = CLIPModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    refuse_missing(report)
    return model, CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_clip(folder: str | Path) -> None:
    """Refuse a path that is no folder of a CLIP.

    Nothing is loaded.

    Raises:
        UserError: names the folder and what would be right.
    """
    check_folder("clip", folder, CLIP)


def check_scorer(spec: str) -> None:
    """Refuse a scorer that cannot be opened, without opening it.

    It raises the same errors as :func:`open_scorer`.
    """
    kind = kind_of(spec, SCORER_KINDS)
    if kind is not None:
        check_folder(kind, folder_of(spec, SCORER), SCORER)
    elif is_function_spec(spec):
        load_function(spec, SCORER)
    else:
        raise UserError(f"{SCORER}: {spec!r} is none of clip:FOLDER, pickscore:FOLDER and FILE.py:FUNCTION")


def open_scorer(spec: str, device: str | torch.device) -> Scorer:
    """Open the scorer that a user named.

    Args:
        spec: ``clip:FOLDER`` for the CLIP score of a CLIP in a local folder, ``pickscore:FOLDER`` for PickScore, or
            ``FILE.py:FUNCTION`` for a user's function. It takes images uint8 ``[N, H, W, 3]`` and a list of N prompts.
            It returns N numbers.
        device: the device of CLIP.

    Raises:
        UserError: another form, or no such file, folder or function.
    """
    check_scorer(spec)
    kind = kind_of(spec, SCORER_KINDS)
    if kind is not None:
        return {"clip": ClipScorer, "pickscore": PickScorer}[kind](folder_of(spec, SCORER), device, option=SCORER)
    function = load_function(spec, SCORER)
    return lambda images, prompts: _checked(function(images, list(prompts)), len(images), spec)


def _checked(found: object, count: int, spec: str) -> np.ndarray:
    try:
        scores = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # torch's for a tensor with a gradient
        raise UserError(f"{SCORER}: {spec} must return numbers, found a {type(found).__name__}") from None
    wanted = f"{SCORER}: {spec} must return {count} finite numbers for as many images"
    if scores.shape != (count,):
        raise UserError(f"{wanted}, found {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise UserError(f"{wanted}, found {scores[~np.isfinite(scores)][0]} among them")
    return scores
