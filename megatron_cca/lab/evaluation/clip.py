"""Whether samples show what their prompts say, as CLIP sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cca.errors import UserError

CLIP = "--clip"


@dataclass(frozen=True)
class Cut:
    """How many of ``count`` prompts have more tokens than the model reads, which are ``tokens``."""

    prompts: int
    count: int
    tokens: int

    def line(self) -> str | None:
        """For people; None where nothing is cut."""
        if not self.prompts:
            return None
        return (
            f"{self.prompts} of {self.count} prompts are longer than the {self.tokens} tokens that this CLIP reads; "
            "their ends are not scored"
        )


class ClipScorer:
    """CLIP score by a CLIP of transformers in a local folder; nothing is downloaded.

    Args:
        folder: with ``config.json``, the weights as safetensors, and the files of CLIPProcessor, such as a copy of
            openai/clip-vit-large-patch14.
        device: where the model runs.
        batch_size: images and prompts that go through it together.

    Raises:
        UserError: no such folder, or one that holds no CLIP.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        check_clip(folder)
        # Imported late: transformers takes seconds.
        from transformers import CLIPModel, CLIPProcessor

        try:
            # Neither weights in a pickle nor code that the folder brings.
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
        """100 * max(cosine, 0) of each image and its prompt, float32 ``[N]``.

        This is what the field's tables call CLIP score. CLIPScore's paper (arXiv 2104.08718) has 2.5 in place of 100
        and puts "A photo depicts" before the text, which is not done here. Prompts are cut to the model's length;
        :meth:`cut` counts those.

        Args:
            images: uint8 ``[N, H, W, 3]``.
            prompts: as many.
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

    def cut(self, prompts: Sequence[str]) -> Cut:
        """How many of some prompts are cut before they are scored."""
        long = 0
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            ids = self.processor.tokenizer(batch, truncation=False, verbose=False)["input_ids"]
            long += sum(len(one) > self._length for one in ids)
        return Cut(long, len(prompts), self._length)

    @property
    def _length(self) -> int:
        """Tokens that the model reads, begin and end included."""
        return self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def _batch(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        options = {"padding": True, "truncation": True, "max_length": self._length}
        inputs = self.processor(
            images=list(images), text=prompts, return_tensors="pt", input_data_format="channels_last", **options
        )
        # Both come normalised.
        outputs = self.model(**inputs.to(self.model.device))
        cosines = (outputs.image_embeds.float() * outputs.text_embeds.float()).sum(1)
        return (100 * cosines.clamp(min=0)).cpu().numpy()


def check_clip(folder: str | Path) -> None:
    """Refuse a folder that is none or has no configuration; nothing is loaded.

    Raises:
        UserError: names the folder and what would be right.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{CLIP}: {folder} has no config.json; give the folder of a CLIP in transformers' form, such as a copy of "
            "openai/clip-vit-large-patch14"
        )
