"""HPSv2 and HPSv2.1: a CLIP ViT-H-14 of open_clip that was fine-tuned on people's choices (arXiv 2306.09341)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from megatron_cca.lab.evaluation.model_scorers import ModelScorer
from megatron_cca.lab.evaluation.named_networks import scaled
from megatron_cca.lab.evaluation.reward_files import FILE_KINDS, count_layers, read_weights, square_side, unusable

_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Those of ViT-H-14. The weights do not tell them.
_VISION_HEAD, _TEXT_HEAD = 80, 64


class Hpsv2Scorer(ModelScorer):
    """HPSv2: the cosine of image and prompt, as its authors' ``score`` returns it. Their benchmark shows 100 times it.

    Everything is computed in float32; the authors' code takes mixed precision on a GPU.

    Args:
        file: a state dict of open_clip's ViT-H-14, such as ``HPS_v2.1_compressed.pt``. Other sizes are read from the
            weights; heads are 80 wide for images and 64 for texts, as in ViT-H-14.
        device: the device of the model.
        option: the option that named the file, for messages.

    Raises:
        UserError: see :func:`megatron_cca.lab.evaluation.reward_files.read_weights`; weights of another size.
    """

    title = "HPSv2"

    def __init__(self, file: str | Path, device: str | torch.device = "cpu", option: str = "--scorer") -> None:
        # Imported late: the import takes seconds, and the package is optional.
        from open_clip.tokenizer import SimpleTokenizer

        weights = read_weights("hpsv2", file, option)
        self.tokenizer = SimpleTokenizer()
        try:
            model = _model(weights, self.tokenizer.vocab_size)
        except Exception as error:
            raise unusable(error, "HPSv2", file, option) from None
        self.model = model.eval().requires_grad_(False).to(device)

    @property
    def side(self) -> int:
        """Side in pixels of the square that the model sees."""
        return self.model.visual.image_size[0]

    @property
    def _length(self) -> int:
        return self.model.context_length

    def _lengths(self, prompts: list[str]) -> list[int]:
        return [len(self.tokenizer.encode(one)) + 2 for one in prompts]

    @torch.no_grad()
    def _batch(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        device = self.model.logit_scale.device
        pixels = longest_side(torch.tensor(images).permute(0, 3, 1, 2).to(device), self.side)
        seen = self.model.encode_image(scaled(pixels, *_OPENAI), normalize=True)
        read = self.model.encode_text(self.tokenizer(prompts, self._length).to(device), normalize=True)
        return (seen * read).sum(1).cpu().numpy()


def longest_side(images: Tensor, side: int) -> Tensor:
    """Resize images so that their longer side has ``side`` pixels, and pad them to a square with black.

    It follows the authors' transform: bicubic on values from 0 to 1, neither rounded nor clipped, and antialiased, as
    torchvision does since 0.17.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        side: pixels.

    Returns:
        float32 ``[N, 3, side, side]``.
    """
    height, width = images.shape[2:]
    pixels, scale = images.float() / 255, side / max(height, width)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    if size != (height, width):
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
    rows, columns = side - size[0], side - size[1]
    return pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _model(weights: dict[str, Tensor], vocabulary: int) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    patches, words, places = (
        weights[name] for name in ("visual.conv1.weight", "token_embedding.weight", "positional_embedding")
    )
    width, patch, text_width = patches.shape[0], patches.shape[-1], places.shape[1]
    if width % _VISION_HEAD or text_width % _TEXT_HEAD:
        raise ValueError(
            f"{FILE_KINDS['hpsv2'].article} is a ViT-H-14 with heads of {_VISION_HEAD} and {_TEXT_HEAD} numbers, found "
            f"widths {width} and {text_width}"
        )
    if len(words) != vocabulary:
        raise ValueError(f"it reads {len(words)} words, the tokenizer has {vocabulary}")
    vision = CLIPVisionCfg(
        layers=count_layers(weights, "visual.transformer.resblocks"),
        width=width,
        head_width=_VISION_HEAD,
        mlp_ratio=weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        patch_size=patch,
        image_size=patch * square_side(len(weights["visual.positional_embedding"]) - 1),
    )
    text = CLIPTextCfg(
        context_length=len(places),
        vocab_size=len(words),
        width=text_width,
        heads=text_width // _TEXT_HEAD,
        layers=count_layers(weights, "transformer.resblocks"),
        mlp_ratio=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / text_width,
    )
    # The weights that a new model draws must not move the state of the sampler's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = CLIP(weights["text_projection"].shape[1], vision, text)
    model.load_state_dict(weights)
    return model.float()
