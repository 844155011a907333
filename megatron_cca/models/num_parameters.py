"""The number of a model's weights. Needs no torch."""

from megatron_cca.models.architecture import Architecture
from megatron_cca.models.pyramid import num_parameters_of_pyramid


def num_parameters(architecture: Architecture) -> int:
    """Return the number of weights of the whole model.

    Rows that pad the vocabulary do not count, nor rows of the LM head for ids that are never predicted, nor tensors
    that are never trained.
    """
    if architecture.scales:
        return num_parameters_of_pyramid(architecture)
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    attention = 2 * hidden * (architecture.query_projection_size + architecture.kv_projection_size)
    attention += 2 * architecture.kv_channels if architecture.qk_layernorm else 0
    if architecture.add_qkv_bias:
        attention += architecture.query_projection_size + 2 * architecture.kv_projection_size
    layer = attention + 3 * hidden * ffn + 2 * hidden
    rows = architecture.num_words + architecture.vocabulary.output_size
    return architecture.num_layers * layer + rows * hidden + hidden + sum(image_parameters(architecture).values())


def image_parameters(architecture: Architecture) -> dict[str, int]:
    """Return the number of weights of each tensor that models with an embedding and a head for images have besides.

    The names are those in ``image_head.py``. Every tensor-parallel rank has them whole, except for the head's bias.
    """
    channels, hidden = architecture.image_embedding_channels, architecture.hidden_size
    if not channels:
        return {}
    codes = architecture.vocabulary.codebook_size
    return {
        "image_embeddings": codes * channels,
        "image_fc1_weight": hidden * channels,
        "image_fc1_bias": hidden,
        "image_fc2_weight": hidden**2,
        "image_fc2_bias": hidden,
        "fc_weight": hidden**2,
        "fc_bias": hidden,
        "output_layer.bias": codes,
    }
