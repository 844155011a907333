"""CLIP score: how well samples match their prompts, and the scorers that a user can name for best of N."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import SCORER, Scorer
from megatron_cca.lab.evaluation.classifiers import is_function_spec, load_function
from megatron_cca.lab.evaluation.model_scorers import ModelScorer
from megatron_cca.lab.evaluation.named_networks import (
    SCORER_KINDS,
    check_folder,
    folder_of,
    kind_of,
    loaded,
    refuse_missing,
)
from megatron_cca.lab.evaluation.reward_files import FILE_KINDS, read_weights

CLIP = "--clip"


class ClipScorer(ModelScorer):
    """CLIP score by a CLIP of transformers in a local folder: 100 * max(cosine, 0).

    Nothing is downloaded. Tables in papers call this CLIP score. The CLIPScore paper (arXiv 2104.08718) has 2.5 in
    place of 100. It also puts "A photo depicts" before the text. This is not done here.

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

    @property
    def side(self) -> int:
        """Side in pixels of the square that the model sees."""
        return self.model.config.vision_config.image_size

    @property
    def _length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _lengths(self, prompts: list[str]) -> list[int]:
        return [len(one) for one in self.processor.tokenizer(prompts, truncation=False, verbose=False)["input_ids"]]

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
    """Refuse a scorer that cannot be opened, without building it.

    It raises the same errors as :func:`open_scorer`.
    """
    if (kind := kind_of(spec, SCORER_KINDS)) is not None:
        check_folder(kind, folder_of(spec, SCORER), SCORER)
    elif (kind := kind_of(spec, tuple(FILE_KINDS))) is not None:
        _check_file(kind, folder_of(spec, SCORER))
    elif is_function_spec(spec):
        load_function(spec, SCORER)
    else:
        known = (*(f"{kind}:FOLDER" for kind in SCORER_KINDS), *(f"{kind}:FILE" for kind in FILE_KINDS))
        raise UserError(f"{SCORER}: {spec!r} is none of {', '.join(known)} and FILE.py:FUNCTION")


def _check_file(kind: str, file: Path) -> None:
    read_weights(kind, file, SCORER)
    if kind == "imagereward":
        from megatron_cca.lab.evaluation.image_reward import check_vocabulary

        check_vocabulary(file, SCORER)
    elif find_spec("open_clip") is None:
        raise UserError(f"{SCORER}: {kind} needs open_clip_torch; pip install 'megatron-cca[eval]'")


def open_scorer(spec: str, device: str | torch.device) -> Scorer:
    """Open the scorer that a user named.

    Args:
        spec: ``clip:FOLDER`` for the CLIP score of a CLIP in a local folder, ``pickscore:FOLDER`` for PickScore,
            ``hpsv2:FILE`` for HPSv2 or HPSv2.1, ``imagereward:FILE`` for ImageReward, or ``FILE.py:FUNCTION`` for a
            user's function. It takes images uint8 ``[N, H, W, 3]`` and a list of N prompts. It returns N numbers.
        device: the device of the model.

    Raises:
        UserError: another form, or no such file, folder or function.
    """
    check_scorer(spec)
    if (kind := kind_of(spec, SCORER_KINDS)) is not None:
        return {"clip": ClipScorer, "pickscore": PickScorer}[kind](folder_of(spec, SCORER), device, option=SCORER)
    if (kind := kind_of(spec, tuple(FILE_KINDS))) is not None:
        return _opened_file(kind, folder_of(spec, SCORER), device)
    function = load_function(spec, SCORER)
    return lambda images, prompts: _checked(function(images, list(prompts)), len(images), spec)


def _opened_file(kind: str, file: Path, device: str | torch.device) -> Scorer:
    # Imported late: an ordinary evaluation needs neither.
    if kind == "hpsv2":
        from megatron_cca.lab.evaluation.hpsv2 import Hpsv2Scorer

        return Hpsv2Scorer(file, device, SCORER)
    from megatron_cca.lab.evaluation.image_reward import ImageRewardScorer

    return ImageRewardScorer(file, device, SCORER)


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
