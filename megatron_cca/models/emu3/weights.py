"""Emu3's tensors under Megatron's names and under transformers' (``modeling_emu3.py``, class ``Emu3ForCausalLM``)."""

from megatron_cca.models.weight_map import GatedMLP, GroupedQueryQKV, OneToOne, WeightMap

_OURS = "decoder.layers."
_THEIRS = "model.layers.{layer}."

EMU3_WEIGHTS = WeightMap(
    rules=[
        OneToOne("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        OneToOne(
            f"{_OURS}self_attention.linear_qkv.layer_norm_weight", f"{_THEIRS}input_layernorm.weight", ("hidden",)
        ),
        GroupedQueryQKV(
            f"{_OURS}self_attention.linear_qkv.weight",
            query=f"{_THEIRS}self_attn.q_proj.weight",
            key=f"{_THEIRS}self_attn.k_proj.weight",
            value=f"{_THEIRS}self_attn.v_proj.weight",
        ),
        OneToOne(f"{_OURS}self_attention.linear_proj.weight", f"{_THEIRS}self_attn.o_proj.weight", ("hidden", "query")),
        OneToOne(f"{_OURS}mlp.linear_fc1.layer_norm_weight", f"{_THEIRS}post_attention_layernorm.weight", ("hidden",)),
        GatedMLP(
            f"{_OURS}mlp.linear_fc1.weight",
            gate=f"{_THEIRS}mlp.gate_proj.weight",
            up=f"{_THEIRS}mlp.up_proj.weight",
        ),
        OneToOne(f"{_OURS}mlp.linear_fc2.weight", f"{_THEIRS}mlp.down_proj.weight", ("hidden", "ffn")),
        OneToOne("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
        OneToOne("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
    ]
)
