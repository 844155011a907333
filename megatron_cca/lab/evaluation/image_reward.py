"""ImageReward: a BLIP whose text encoder looks at the image, and a reward head (arXiv 2304.05977)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError
from megatron_cca.lab.evaluation.model_scorers import ModelScorer
from megatron_cca.lab.evaluation.named_networks import resized, scaled
from megatron_cca.lab.evaluation.reward_files import count_layers, read_weights, square_side, unusable

VOCABULARY = "vocab.txt"
_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The authors' mean and deviation of the head's output over their data.
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
# The width of a head in both parts of the published model. The weights do not tell it.
_HEAD = 64
_VISION, _TEXT, _MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# Of the authors' names, in their order, to those of transformers' BLIP.
_RENAMED = (
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("cls_token", "embeddings.class_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.proj", ".self_attn.projection"),
    (".attn.", ".self_attn."),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
)


class ImageRewardScorer(ModelScorer):
    """ImageReward, as its authors' ``score`` returns it.

    Everything is computed in float32.

    Args:
        file: a state dict with the names of ``ImageReward.pt``. Sizes are read from the weights; heads are 64 wide.
            BERT's ``vocab.txt`` lies beside it, that of bert-base-uncased.
        device: the device of the model.
        option: the option that named the file, for messages.

    Raises:
        UserError: see :func:`megatron_cca.lab.evaluation.reward_files.read_weights`; no vocabulary; weights that are
            missing.
    """

    title = "ImageReward"

    def __init__(self, file: str | Path, device: str | torch.device = "cpu", option: str = "--scorer") -> None:
        check_vocabulary(file, option)
        weights = read_weights("imagereward", file, option)
        try:
            with torch.random.fork_rng(devices=[]):
                parts = _vision(weights), _text(weights), _head(weights)
            words = _vocabulary(Path(file).parent / VOCABULARY, parts[1].config.vocab_size)
            self.tokenizer = _tokenizer(words)
        except Exception as error:
            raise unusable(error, "ImageReward", file, option) from None
        self.vision, self.text, self.head = (one.eval().requires_grad_(False).float().to(device) for one in parts)

    @property
    def side(self) -> int:
        """Side in pixels of the square that the model sees."""
        return self.vision.config.image_size

    @property
    def _length(self) -> int:
        return _TOKENS

    def _lengths(self, prompts: list[str]) -> list[int]:
        return [len(one) for one in self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"]]

    @torch.no_grad()
    def _batch(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        device = self.vision.device
        pixels = shorter_side(torch.tensor(images).permute(0, 3, 1, 2).to(device), self.side)
        seen = self.vision(pixel_values=scaled(pixels.float() / 255, *_OPENAI)).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": _TOKENS, "return_tensors": "pt"}
        read = self.tokenizer(prompts, **options).to(device)
        hidden = self.text(read.input_ids, read.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return ((self.head(hidden[:, 0]).squeeze(1) - _MEAN) / _DEVIATION).cpu().numpy()


def check_vocabulary(file: str | Path, option: str) -> None:
    """Refuse a file without BERT's vocabulary beside it.

    Raises:
        UserError: names the missing file and where it is published.
    """
    vocabulary = Path(file).parent / VOCABULARY
    if Path(file).is_file() and not vocabulary.is_file():
        raise UserError(
            f"{option}: {vocabulary} is missing; put {VOCABULARY} of google-bert/bert-base-uncased beside {file}"
        )


def shorter_side(images: Tensor, side: int) -> Tensor:
    """Resize images so that their shorter side has ``side`` pixels, and cut the centre, as torchvision does.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        side: pixels.

    Returns:
        uint8 ``[N, 3, side, side]``.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    images = resized(images, (int(side * height / short), int(side * width / short)))
    top, left = (round((size - side) / 2) for size in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _vision(weights: dict[str, Tensor]) -> nn.Module:
    # Imported late: the import of transformers takes seconds.
    from transformers import BlipVisionConfig, BlipVisionModel

    found = _part(weights, _VISION)
    width, patch = found["patch_embed.proj.weight"].shape[0], found["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=found["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_layers(found, "blocks"),
        num_attention_heads=_heads(width),
        image_size=patch * square_side(found["pos_embed"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({_vision_name(name): value for name, value in found.items()})
    return model


def _vision_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name


def _text(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    found = _part(weights, _TEXT)
    # Older versions of transformers save the positions' numbers, too.
    found.pop("embeddings.position_ids", None)
    words, width = found["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=found["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=found["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=count_layers(found, "encoder.layer"),
        num_attention_heads=_heads(width),
        max_position_embeddings=len(found["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict(found)
    return model


def _heads(width: int) -> int:
    if width % _HEAD:
        raise ValueError(f"its heads are {_HEAD} numbers wide, found a width of {width}")
    return width // _HEAD


def _head(weights: dict[str, Tensor]) -> nn.Module:
    # Its layers have nothing but dropout between them, which does nothing here.
    found = _part(weights, _MLP)
    numbers = sorted(int(name.split(".")[1]) for name in found if name.endswith(".weight"))
    layers = nn.Sequential(*(nn.Linear(*found[f"layers.{number}.weight"].shape[::-1]) for number in numbers))
    places = {str(number): str(place) for place, number in enumerate(numbers)}
    layers.load_state_dict(
        {f"{places[name.split('.')[1]]}.{name.split('.')[2]}": value for name, value in found.items()}
    )
    return layers


def _vocabulary(file: Path, words: int) -> dict[str, int]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    found = {line: index for index, line in enumerate(lines)}
    lacking = [one for one in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if one not in found]
    if lacking or len(lines) > words:
        what = f"lacks {lacking[0]}" if lacking else f"has {len(lines)} words, the model only {words}"
        raise ValueError(f"{file} {what}; take that of google-bert/bert-base-uncased")
    return found


def _tokenizer(words: dict[str, int]) -> object:
    from transformers import BertTokenizer

    return BertTokenizer(vocab=words, do_lower_case=True)
