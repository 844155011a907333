"""Emu3's sizes: the released 8B model, and a tiny one of the same structure for laptops and tests."""

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.emu3.vocabulary import EMU3_VOCABULARY, tiny_vocabulary

PRESETS = {
    "emu3-8b": Architecture(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        max_position_embeddings=9216,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=EMU3_VOCABULARY,
    ),
    "emu3-tiny": Architecture(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        max_position_embeddings=128,
        layernorm_epsilon=1e-5,
        rotary_base=1_000_000,
        vocabulary=tiny_vocabulary(),
    ),
}
