"""CLIP score: how well samples match their prompts, and the scorers that a user can name for best of N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.decode_loop import SCORER, Scorer
from megatron_cca.io.paths import typed_path
from megatron_cca.lab.evaluation.classifiers import is_function_spec, load_function

CLIP = "--clip"
_CLIP_PREFIX = "clip:"


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

    Raises:
        UserError: no such folder, or a folder without a CLIP.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        check_clip(folder)
        # Imported late: the import of transformers takes seconds.
        from transformers import CLIPModel, CLIPProcessor

        try:
            # Load no pickled weights, and run no code from the folder.
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers promises no closed set for damaged folders
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{CLIP}: {folder} holds no usable CLIP ({type(error).__name__}: {reason})") from None
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
        cosines = (outputs.image_embeds.float() * outputs.text_embeds.float()).sum(1)
        return (100 * cosines.clamp(min=0)).cpu().numpy()


def check_clip(folder: str | Path) -> None:
    """Refuse a path that is no folder of a CLIP.

    Nothing is loaded.

    Raises:
        UserError: names the folder and what would be right.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{CLIP}: {folder} has no config.json; give the folder of a CLIP in transformers' form, such as a copy of "
            "openai/clip-vit-large-patch14"
        )


def check_scorer(spec: str) -> None:
    """Refuse a scorer that cannot be opened, without opening it.

    It raises the same errors as :func:`open_scorer`.
    """
    if spec.startswith(_CLIP_PREFIX):
        try:
            check_clip(_clip_folder(spec))
        except UserError as error:
            raise UserError(str(error).replace(CLIP, SCORER, 1)) from None
    elif is_function_spec(spec):
        load_function(spec, SCORER)
    else:
        raise UserError(f"{SCORER}: {spec!r} is neither clip:FOLDER nor FILE.py:FUNCTION")


def open_scorer(spec: str, device: str | torch.device) -> Scorer:
    """Open the scorer that a user named.

    Args:
        spec: ``clip:FOLDER`` for the CLIP score of a CLIP in a local folder, or ``FILE.py:FUNCTION`` for a user's
            function. It takes images uint8 ``[N, H, W, 3]`` and a list of N prompts. It returns N numbers.
        device: the device of CLIP.

    Raises:
        UserError: another form, or no such file, folder or function.
    """
    check_scorer(spec)
    if spec.startswith(_CLIP_PREFIX):
        return ClipScorer(_clip_folder(spec), device)
    function = load_function(spec, SCORER)
    return lambda images, prompts: _checked(function(images, list(prompts)), len(images), spec)


def _clip_folder(spec: str) -> Path:
    with error_context(SCORER):
        return Path(typed_path(spec.removeprefix(_CLIP_PREFIX)))


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
