"""Small random Janus-Pros on disk, in transformers' form and in their authors', and transformers' logits of codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_cca.models import FAMILIES
from tests.references.family import Oracle, tensors_in

# The sizes of the preset janus-tiny.
WORDS, CODES, HIDDEN = 323, 128, 64
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 320,
    "eos_token_id": 322,
    "pad_token_id": None,
    "initializer_range": 0.1,  # large, so that errors would show
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": HIDDEN,
    "num_image_tokens": 16,
    "initializer_range": 0.1,
}
VQ = {
    "embed_dim": 8,
    "num_embeddings": CODES,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "projection_dim": HIDDEN,
    "image_token_embed_dim": HIDDEN,
    "initializer_range": 0.1,
}
FORMS = ("original", "transformers", "original, pickled")

# From transformers' names to the authors'.
_AUTHORS = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
    (r"^model\.vision_model\.", "vision_model.vision_tower."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.encoder)\.down\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\.decoder)\.up\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*\d)\.block\.", r"\1.res."),
    (r"^(gen_vision_model\.(?:en|de)coder\.mid)\.block_1\.", r"\1.0."),
    (r"^(gen_vision_model\.(?:en|de)coder\.mid)\.attn_1\.", r"\1.1."),
    (r"^(gen_vision_model\.(?:en|de)coder\.mid)\.block_2\.", r"\1.2."),
)


def random_janus(seed: int = 0, *, tied: bool = False, **text):
    """Return transformers' model with random weights; ``text`` replaces sizes of the decoder."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(seed)
    config = JanusConfig(text_config=TEXT | text, vision_config=VISION, vq_config=VQ, tie_word_embeddings=tied)
    model = JanusForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        # Norms start as ones everywhere, biases as zeros; mistaken for one another they would not show.
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    table = model.model.vqmodel.quantize.embedding.weight
    # With vectors of length 1 the nearest is also the nearest by direction, which the authors look for.
    table.data = torch.nn.functional.normalize(torch.randn_like(table), dim=-1)
    return model


def save_janus(
    folder: Path, form: str = "transformers", *, dtype=torch.float32, seed: int = 0, shards: int = 1, tied=False, **text
) -> Path:
    """Save a random model in one of :data:`FORMS`, in ``shards`` files."""
    model = random_janus(seed, tied=tied, **text).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if form == "transformers":
        model.save_pretrained(
            folder, max_shard_size="50GB" if shards == 1 else f"{_bytes(model) // shards // 1000 + 1}KB"
        )
    else:
        # Clones, since tensors of a pickle share what is no copy.
        tensors = {authors_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
        tensors["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
        if tied:
            del tensors["language_model.lm_head.weight"]
        _save(folder, tensors, shards, pickled=form.endswith("pickled"))
        config = authors_config(str(dtype).removeprefix("torch."), **text)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}\n')
    return folder


def authors_name(name: str) -> str:
    """Return the authors' name of a tensor for transformers'."""
    for pattern, replacement in _AUTHORS:
        name = re.sub(pattern, replacement, name)
    return name


def authors_config(dtype: str = "float32", **text) -> dict:
    """Return a configuration as in deepseek-ai/Janus-Pro-1B."""

    def part(kind, cls, **params):
        return {"cls": cls, "model_type": kind, "params": params}

    left_out = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    language = {key: value for key, value in (TEXT | text).items() if key not in left_out}
    hidden = language["hidden_size"]
    projector = {"depth": 2, "n_embed": hidden, "projector_type": "mlp_gelu"}
    return {
        "aligner_config": part("aligner", "MlpProjector", **projector, input_dim=VISION["hidden_size"]),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": part("gen_aligner", "MlpProjector", **projector, input_dim=8),
        "gen_head_config": part(
            "gen_head", "vision_head", image_token_embed=hidden, image_token_size=CODES, n_embed=hidden
        ),
        "gen_vision_config": part("gen_vision", "VQ-16", image_token_size=CODES, n_embed=8),
        "language_config": {**language, "model_type": "llama", "torch_dtype": dtype},
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "transformers_version": "4.33.1",
        "vision_config": part("vision", "CLIPVisionTower", image_size=VISION["image_size"], model_name="tiny"),
    }


def write(form: str, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Save one of :data:`FORMS`."""
    return save_janus(folder, form, seed=seed, dtype=dtype)


def oracle(folder: Path) -> Oracle:
    """Transformers' own model, which is that of the authors' form, too."""
    config = json.loads((folder / "config.json").read_text())
    model = random_janus().double()
    state = tensors_in(folder)
    if config["model_type"] != "janus":
        own = {authors_name(name): name for name in model.state_dict()}
        state = {own[name]: tensor for name, tensor in state.items() if name in own}
    model.load_state_dict(state)
    naming = FAMILIES["janus"].huggingface.namings[1]
    trained = {authors_name(name): value for name, value in model.named_parameters() if naming.mapped(name)}
    return Oracle(lambda ids: code_logits(model, ids), trained)


def code_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits of the codes, ``[B, S, CODES]``; ``ids`` are codes first, then words."""
    body, is_code = model.model, ids < CODES
    words = model.get_input_embeddings()((ids - CODES).clamp(min=0))
    images = model.prepare_embeddings_for_image_generation(ids.clamp(max=CODES - 1))
    inputs = torch.where(is_code[..., None], images, words)
    hidden = body.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return body.generation_head(hidden)


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int, *, pickled: bool) -> None:
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names, places = list(tensors), {}
    for shard in range(shards):
        own = {name: tensors[name] for name in names[shard::shards]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        if pickled:
            torch.save(own, folder / file)
        else:
            save_file(own, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _bytes(model) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
