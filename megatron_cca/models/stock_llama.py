"""Decoders as plain Llamas, or Qwen3s, which stock engines serve without code of ours.

The tensors of Emu3 and Emu3.5 have Llama's names already. Only the configuration says another class. The grammar of
images, which no stock engine knows, goes beside it as a file.
"""

from __future__ import annotations

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.models.architecture import Architecture
from megatron_cca.models.formats import Json
from megatron_cca.models.image_vocabulary import ImageVocabulary
from megatron_cca.models.llama_files import size_keys

# The form's name on the command line, and the file of the grammar.
LLAMA = "llama"
GRAMMAR = "image_grammar.json"
# Ids that stand for a caption and the words of a grid while a prompt is taken apart.
_CAPTION, _GRID = -1, -2


def stock_config(architecture: Architecture, dtype: str) -> Json:
    """Return the configuration of transformers' ``LlamaForCausalLM``, or ``Qwen3ForCausalLM`` with norms of heads.

    Nothing is left to the class's defaults.

    Args:
        architecture: of the decoder.
        dtype: of the weights, as torch spells it.

    Raises:
        UserError: the meaning of the ids is not known, so that no engine could draw.
    """
    vocabulary = architecture.vocabulary
    if not isinstance(vocabulary, ImageVocabulary):
        raise UserError(f"the meaning of its {vocabulary.size} token ids is not known here; no engine could draw")
    kind, cls = ("qwen3", "Qwen3ForCausalLM") if architecture.qk_layernorm else ("llama", "LlamaForCausalLM")
    base = architecture.rotary_base
    sizes = {
        theirs: architecture.num_words if ours == "vocab_size" else getattr(architecture, ours)
        for ours, theirs in size_keys({"kv_channels": architecture.kv_channels}).items()
    }
    return {
        **sizes,
        "architectures": [cls],
        "model_type": kind,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "attention_bias": False,
        "mlp_bias": False,
        # The older spelling, and that of transformers 5.
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def image_grammar(vocabulary: ImageVocabulary) -> Json:
    """Return how a prompt and an image are written in ids, for engines that know no images.

    Returns:
        ``visual_start`` and ``codebook_size``; ``row_end``, the id behind a row; ``row_end_is_last``, whether it is
        behind the last row, too; ``tail``, the ids behind all rows. ``prompt`` has the ids ``before`` a caption,
        ``between`` it and the words of the grid, and ``after``, the words of the ``grid``, and those ``words_before``
        and ``words_after`` a caption, which are encoded with it.
    """
    height, width = 2, 3
    forced = vocabulary.forced_tokens(height, width).tolist()
    row_end = forced[width]
    is_last = len(forced) > 2 * width + 1 and forced[2 * width + 1] == row_end
    meta = vocabulary.meta_text(1, height, width) or ""
    ids = vocabulary.prompt(np.array([_CAPTION]), np.array([_GRID] if meta else [])).tolist()
    caption, grid = ids.index(_CAPTION), ids.index(_GRID) if meta else len(ids)
    template = vocabulary.template
    return {
        "visual_start": vocabulary.visual_start,
        "codebook_size": vocabulary.codebook_size,
        "row_end": row_end,
        "row_end_is_last": is_last,
        "tail": forced[2 * width + 1 + is_last :],
        "prompt": {
            "before": ids[:caption],
            "between": ids[caption + 1 : grid],
            "after": ids[grid + 1 :],
            "grid": meta.replace(str(height), "{height}").replace(str(width), "{width}"),
            "words_before": template.before if template else "",
            "words_after": template.after if template else "",
        },
    }
