"""transformers' Janus, of a configuration in either form: its decoder of codes, and the shapes of its other parts."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from megatron_cca.errors import UserError, error_context
from megatron_cca.models.formats import Json, Shapes, transformers_refusals
from megatron_cca.models.llama_files import settings_of
from megatron_cca.models.weight_files import CONFIG

_OF_THE_DECODER = ("model.language_model.", "model.generation_")


def code_decoder(text: Json, num_codes: int, channels: int) -> nn.Module:
    """Return transformers' parts that draw images, on the meta device, in evaluation mode.

    Args:
        text: the configuration of the decoder.
        num_codes: codes of the image tokenizer.
        channels: of their embeddings.

    Raises:
        UserError: transformers refuses the configuration.
    """
    from transformers import JanusVQVAEConfig, LlamaConfig, LlamaModel
    from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

    with error_context(CONFIG), transformers_refusals():
        settings = LlamaConfig(**settings_of(text))
        width = settings.hidden_size
        images = JanusVQVAEConfig(
            num_embeddings=num_codes, embed_dim=channels, projection_dim=width, image_token_embed_dim=width
        )
        body = nn.Module()
        with torch.device("meta"):
            body.language_model = LlamaModel(settings)
            body.generation_embeddings = nn.Embedding(num_codes, channels)
            body.generation_aligner, body.generation_head = JanusVQVAEAlignerMLP(images), JanusVQVAEHead(images)
        rotary = body.language_model.rotary_emb
        body.language_model.rotary_emb = type(rotary)(settings)
    return CodeDecoder(body).eval()


class CodeDecoder(nn.Module):
    """The parts of transformers' Janus that draw images, for ids of which the first are codes, and the others words.

    Args:
        body: with the modules of transformers' ``JanusModel`` that take part.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.model = body

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return ``logits`` float32 ``[B, S, codes]`` for ids int64 ``[B, S]``."""
        body = self.model
        codes = body.generation_embeddings.num_embeddings
        images = body.generation_aligner(body.generation_embeddings(input_ids.clamp(max=codes - 1)))
        words = body.language_model.embed_tokens((input_ids - codes).clamp(min=0))
        inputs = torch.where((input_ids < codes)[..., None], images, words)
        hidden = body.language_model(inputs_embeds=inputs, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=body.generation_head(hidden))


def companion_shapes(config: Json, text: Json, most_tensors: int) -> Shapes:
    """Return the shapes of what is not the decoder, by transformers' names, for a configuration in transformers' form.

    Args:
        config: the configuration.
        text: its section of the decoder.
        most_tensors: a limit for the layers that the configuration may ask for.

    Raises:
        UserError: transformers refuses the configuration, or it asks for more layers.
    """
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig

    sections = {key: config.get(key) or {} for key in ("vision_config", "vq_config")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{key}: must be an object, found {repr(section)[:60]}")
    with transformers_refusals():
        vision, vq = (
            JanusVisionConfig(**settings_of(sections["vision_config"])),
            JanusVQVAEConfig(**settings_of(sections["vq_config"])),
        )
        layers = vision.num_hidden_layers + vision.depth + len(vq.channel_multiplier) * vq.num_res_blocks
    if layers > most_tensors:
        raise UserError(f"vision_config and vq_config want {layers} layers, more than {most_tensors}")
    with transformers_refusals(), torch.device("meta"):
        one_layer = {**settings_of(text), "num_hidden_layers": 1}
        model = JanusForConditionalGeneration(JanusConfig(text_config=one_layer, vision_config=vision, vq_config=vq))
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in state if not name.startswith(_OF_THE_DECODER)}
