"""Bytes of one layer of next-scale prediction on one rank, and what its element-wise operations move.

Each term names tensors of ``models/next_scale.py``. No kernel fuses its operations: a GPU keeps what a CPU keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Config
from megatron_cca.lab.planner.layers import FP32, LayerShape


@dataclass(frozen=True)
class ModulatedLayer(LayerShape):
    """A layer with norms that the class modulates, attention scale by scale, and a GELU.

    Attributes:
        rows: rows of a microbatch.
        features: channels of the pyramid's features.
        trains_weights: whether the weights have gradients; otherwise only adapters have.
    """

    rows: int
    features: int
    trains_weights: bool

    def inputs_kept(self) -> float:
        """Return the bytes of the features, and of the classes' vectors."""
        return self.size * (self.tokens * self.features + self.rows * self.hidden)

    def norm_kept(self) -> float:
        """Return the bytes of the norm and of its modulated output, with two numbers for each token."""
        return (1 + self.trains_weights) * self.stream + 2 * FP32 * self.shared

    def modulation_kept(self) -> float:
        """Return the bytes of the six vectors of each row, and of the class's vector after SiLU."""
        return self.size * self.rows * 7 * self.hidden

    def softmax_kept(self) -> float:
        """Return the bytes of the outputs of all scales, and of one logarithm for each head and token."""
        return self.size * self.tokens * self.channels + FP32 * self.heads * self.tokens

    def attention_kept(self) -> float:
        """Return the bytes that the attention keeps.

        These are the output of linear_qkv (the values are a view of it), the queries and keys of unit length with their
        lengths before and after a bound, the queries times their sharpness, and the joined outputs.
        """
        channels = 3 + 1 + self.trains_weights + 1 + 1
        lengths = 2 * 2 * self.heads
        return self.size * self.tokens * (channels * self.channels + lengths) + self.softmax_kept()

    def mlp_kept(self) -> float:
        """Return the bytes of fc1's output with its bias, and of the output of the GELU."""
        return 2 * self.inner

    def kept(self) -> float:
        """Return the bytes of both norms, the attention, the MLP, and two tensors of each half of the layer.

        These are the residual stream and, for the gradient of its weight, the half's result.
        """
        halves = 2 * (1 + self.trains_weights) * self.stream + 2 * self.norm_kept() + self.modulation_kept()
        return halves + self.attention_kept() + self.mlp_kept()

    def backward(self, config: Config) -> float:
        """Return the larger of two moments: fc2, and the GELU."""
        # The gradient of the stream, and the same times gamma.
        at_fc2 = 2 * self.stream + self.gathered(config) + self.inner + self.fc2_gradient(config)
        at_gelu = self.stream + 2 * self.inner
        return max(at_fc2, at_gelu)

    def forward(self, config: Config) -> float:
        """Return the bytes in the MLP: the stream before and between the halves, what enters each, and two tensors."""
        return 4 * self.stream + max(self.gathered(config) + self.inner, 2 * self.inner)


def moved_by_layer(hidden: int, tensor: int, sharing: int) -> float:
    """Return how many numbers a layer's element-wise operations read and write for each token, without the MLP's.

    Args:
        hidden: size of the model.
        tensor: tensor-parallel size.
        sharing: ranks that share the tokens of norms and residuals.
    """
    # Each half: the norm, its scale and its shift; the bias of the result, its weight and the residual sum.
    moved = 2 * (2 + 2 + 2 + 2 + 2 + 3) * hidden / sharing
    # The bias of all three, the length and the division of queries and keys, the sharpness, and two copies of outputs.
    return moved + (2 * 3 + 2 * 3 + 2 + 2 * 2) * hidden / tensor
