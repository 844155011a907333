"""Small random Emu3s on disk, saved by transformers itself, in every form that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from megatron_cca.errors import UserError

# The digits' vocabulary, so that such a model can be trained on them too.
SIZES = {
    "vocab_size": 456,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 320,
    "bos_token_id": 323,
    "eos_token_id": 324,
    "initializer_range": 0.1,  # large, so that errors would show
}
_VQ = {
    "base_channels": 32,
    "embed_dim": 4,
    "codebook_size": 128,
    "latent_channels": 4,
    "ch_mult": [1],
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}
UP_PROJ = "model.layers.2.mlp.up_proj.weight"
FORMS = ("original repository", "Emu3ForCausalLM", "transformers", "transformers, names in memory")


def save_emu3(folder: Path, form: str, *, dtype=torch.float32, seed: int = 0, shard: str = "50GB", **sizes) -> Path:
    """Save a random model in one of :data:`FORMS`; ``shard`` is the largest file ("100KB" gives several)."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    torch.manual_seed(seed)
    if form.startswith("transformers"):
        _composite({**SIZES, **sizes}).to(dtype).save_pretrained(
            folder, max_shard_size=shard, save_original_format=form == "transformers"
        )
        _processor().save_pretrained(folder)
    else:
        text = Emu3TextConfig(**{**SIZES, **sizes})
        _perturbed(Emu3ForCausalLM(text)).to(dtype).save_pretrained(folder, max_shard_size=shard)
        if form == "original repository":
            _as_in_the_repository(folder, str(dtype).removeprefix("torch."))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Emu3Tokenizer"}\n')
    (folder / "emu3.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    return folder


def _composite(sizes):
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    words = {f"word {index}": index for index in range(sizes["vocab_size"] - 1)} | {"<image>": sizes["vocab_size"] - 1}
    return _perturbed(Emu3ForConditionalGeneration(Emu3Config(text_config=sizes, vq_config=_VQ, vocabulary_map=words)))


def _processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Emu3ImageProcessor, Emu3Processor, PreTrainedTokenizerFast

    unknown = "<unk>"
    special = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_200|>",
    }
    words = {word: index for index, word in enumerate([unknown, "a", "handwritten", "seven", *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, extra_special_tokens=special)
    return Emu3Processor(Emu3ImageProcessor(), fast, chat_template="{{ messages }}")


def _perturbed(model):
    """Norms start as ones everywhere; mistaken for one another they would not show."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def _as_in_the_repository(folder: Path, dtype: str) -> None:
    """The configuration's spelling in baaivision/Emu3, with a remote code file beside it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("dtype")
    config |= {
        "model_type": "Emu3",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": dtype,
        "auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"},
    }
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "modeling_emu3.py").write_text("# remote code\n")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits, also where they are not numbers."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours[name], tensor))), name


def convert(hf: Path, folder: Path, **options) -> Path:
    """There and back again, below ``folder``."""
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return export_checkpoint(folder / "megatron", folder / "back", progress_bar=False, **options)


def refused(hf: Path, folder: Path, **options) -> str:
    """What an import says when it refuses ``hf``: one line, and nothing left in ``folder``."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        import_checkpoint(hf, folder / "megatron", progress_bar=False, **options)
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def edit_tensors(hf: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``change`` alter the tensors of a folder with one file."""
    file = hf / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def edit_config(hf: Path, **values) -> None:
    """Set keys of ``config.json``."""
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
