"""LlamaGen's tensors under the authors' names as Megatron's; no importer takes part."""

from __future__ import annotations

import torch

from tests.references.in_megatron import filled_up


def whole_tensors(weights, sizes, padded_vocab_size):
    """Under Megatron's names, those of its local layers and of Transformer Engine's fused ones alike."""
    words = torch.cat([weights["tok_embeddings.weight"], weights["cls_embedding.embedding_table.weight"]])
    answer = {
        "embedding.word_embeddings.weight": filled_up(words, padded_vocab_size),
        "output_layer.weight": filled_up(weights["output.weight"], padded_vocab_size),
        "decoder.final_layernorm.weight": weights["norm.weight"],
    }
    for layer in range(sizes.layers):
        own, megatron = f"layers.{layer}.", f"decoder.layers.{layer}."
        norms = weights[f"{own}attention_norm.weight"], weights[f"{own}ffn_norm.weight"]
        gate, up = weights[f"{own}feed_forward.w1.weight"], weights[f"{own}feed_forward.w3.weight"]
        parts = {
            "input_layernorm.weight": norms[0],
            "self_attention.linear_qkv.layer_norm_weight": norms[0],
            "self_attention.linear_qkv.weight": _by_head(weights[f"{own}attention.wqkv.weight"], sizes),
            "self_attention.linear_proj.weight": weights[f"{own}attention.wo.weight"],
            "pre_mlp_layernorm.weight": norms[1],
            "mlp.linear_fc1.layer_norm_weight": norms[1],
            "mlp.linear_fc1.weight": torch.cat([gate, up]),
            "mlp.linear_fc2.weight": weights[f"{own}feed_forward.w2.weight"],
        }
        answer |= {megatron + name: value for name, value in parts.items()}
    return answer


def _by_head(wqkv, sizes):
    """From all queries, all keys, all values to each head's query, key and value."""
    return wqkv.view(3, sizes.heads, -1, sizes.width).transpose(0, 1).reshape(-1, sizes.width)
