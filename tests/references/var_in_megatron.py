"""VAR's tensors under the authors' names as Megatron's; no importer takes part."""

from __future__ import annotations

import torch

from tests.references.in_megatron import filled_up

PHI = "quantize.quant_resi.qresi_ls"


def frozen_tensors(quantizer, sizes):
    """The image tokenizer's part, under the names of Megatron's model for VAR."""
    phis = range(sizes.phis)
    return {
        "embedding.features.codebook": quantizer["quantize.embedding.weight"],
        "embedding.features.convolutions": torch.stack([quantizer[f"{PHI}.{phi}.weight"] for phi in phis]),
        "embedding.features.convolution_biases": torch.stack([quantizer[f"{PHI}.{phi}.bias"] for phi in phis]),
    }


def whole_tensors(weights, quantizer, sizes, padded_vocab_size):
    """Under the names of Megatron's model for VAR."""
    answer = frozen_tensors(quantizer, sizes) | {
        "embedding.classes": weights["class_emb.weight"],
        "embedding.start": weights["pos_start"][0],
        "embedding.positions": weights["pos_1LC"][0],
        "embedding.levels": weights["lvl_embed.weight"],
        "embedding.feature_weight": weights["word_embed.weight"],
        "embedding.feature_bias": weights["word_embed.bias"],
        "final_modulation.linear.weight": weights["head_nm.ada_lin.1.weight"],
        "final_modulation.linear.bias": weights["head_nm.ada_lin.1.bias"],
        "output_layer.weight": filled_up(weights["head.weight"], padded_vocab_size),
        "output_layer.bias": filled_up(weights["head.bias"], padded_vocab_size),
    }
    for layer in range(sizes.layers):
        own, megatron = f"blocks.{layer}.", f"decoder.layers.{layer}."
        bias = [weights[f"{own}attn.q_bias"], torch.zeros(sizes.width), weights[f"{own}attn.v_bias"]]
        parts = {
            "modulation.linear.weight": weights[f"{own}ada_lin.1.weight"],
            "modulation.linear.bias": weights[f"{own}ada_lin.1.bias"],
            "self_attention.q_layernorm.log_sharpness": weights[f"{own}attn.scale_mul_1H11"].view(sizes.heads, 1),
            "self_attention.linear_qkv.weight": by_head(weights[f"{own}attn.mat_qkv.weight"], sizes),
            "self_attention.linear_qkv.bias": by_head(torch.cat(bias), sizes),
            "self_attention.linear_proj.weight": weights[f"{own}attn.proj.weight"],
            "self_attention.linear_proj.bias": weights[f"{own}attn.proj.bias"],
            "mlp.linear_fc1.weight": weights[f"{own}ffn.fc1.weight"],
            "mlp.linear_fc1.bias": weights[f"{own}ffn.fc1.bias"],
            "mlp.linear_fc2.weight": weights[f"{own}ffn.fc2.weight"],
            "mlp.linear_fc2.bias": weights[f"{own}ffn.fc2.bias"],
        }
        answer |= {megatron + name: value for name, value in parts.items()}
    return answer


def by_head(rows, sizes):
    """From all queries, all keys, all values to each head's query, key and value."""
    parts = rows.view(3, sizes.heads, sizes.width // sizes.heads, *rows.shape[1:])
    return parts.transpose(0, 1).reshape(rows.shape)
