"""Bytes of one layer of a decoder on one rank: what it keeps for backward, and what it needs while it runs.

Each term names tensors of Megatron's layers. Attention scores are kept only where Transformer Engine's attention is not
fused (``models/architecture.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cca.config import Config

FP32 = 4


@dataclass(frozen=True)
class LayerShape:
    """The sizes that any layer has on one rank. Subclasses say what such a layer keeps and needs.

    Attributes:
        size: bytes of one element in the precision of the computation.
        tokens: tokens of a microbatch on this rank.
        shared: tokens of norms and residuals, which sequence parallelism divides.
        hidden: hidden size of the model.
        channels: this rank's channels of the queries.
        ffn: this rank's channels between fc1 and fc2.
        heads: attention heads on this rank.
    """

    size: int
    tokens: float
    shared: float
    hidden: int
    channels: float
    ffn: float
    heads: float

    @property
    def stream(self) -> float:
        """Bytes of the hidden states between layers."""
        return self.size * self.shared * self.hidden

    @property
    def whole(self) -> float:
        """Bytes of the hidden states of all tokens, as sequence parallelism gathers them."""
        return self.size * self.tokens * self.hidden

    @property
    def inner(self) -> float:
        """Bytes of one tensor between fc1 and fc2."""
        return self.size * self.tokens * self.ffn

    def inputs_kept(self) -> float:
        """Return the bytes that the embedding keeps besides its output."""
        return 0

    def norm_kept(self) -> float:
        """Return the bytes that a norm keeps besides its input."""
        raise NotImplementedError

    def softmax_kept(self) -> float:
        """Return the bytes that the core attention keeps, and does not keep if it is recomputed."""
        raise NotImplementedError

    def mlp_kept(self) -> float:
        """Return the bytes that the MLP keeps, and does not keep if it is recomputed."""
        raise NotImplementedError

    def kept(self) -> float:
        """Return the bytes that the layer keeps for backward without recomputation: its output, but not its input."""
        raise NotImplementedError

    def backward(self, config: Config) -> float:
        """Return the bytes alive in the backward of the layer, besides what it kept."""
        raise NotImplementedError

    def forward(self, config: Config) -> float:
        """Return the bytes alive in a forward pass that keeps nothing."""
        raise NotImplementedError

    def gathered(self, config: Config) -> float:
        """Return the bytes of the whole hidden states, if sequence parallelism must gather them."""
        return self.whole if config.parallel.sequence_parallel else 0

    def fc2_gradient(self, config: Config) -> float:
        """Return the bytes of the gradient of fc2's weight before it is added to Megatron's buffer."""
        return self.size * self.hidden * self.ffn if config.lora.dim is None else 0


@dataclass(frozen=True)
class DecoderLayer(LayerShape):
    """A layer with RMSNorms, rotary positions and SwiGLU.

    Attributes:
        keys: this rank's channels of the keys and values together.
        groups: heads of the keys on this rank.
        norms_heads: whether queries and keys have norms.
        rotary: number of elements in a table of rotary positions.
        context: context-parallel size.
        scores: bytes of a layer's attention scores if they are kept for backward; otherwise 0.
        fuses_norms, fuses_swiglu: whether a fused kernel computes it, which keeps no intermediate results.
    """

    keys: float
    groups: float
    norms_heads: bool
    rotary: float
    context: int
    scores: float
    fuses_norms: bool
    fuses_swiglu: bool

    def norm_kept(self) -> float:
        """Return the bytes of the output and either a number for each token or, unfused, its intermediate results."""
        if self.fuses_norms:
            return self.stream + FP32 * self.shared
        return (1 + self._inner_of_norms) * self.stream + FP32 * self.shared

    def softmax_kept(self) -> float:
        """Return the bytes of the scores or, with a fused kernel, of one logarithm for each head and token."""
        return self.scores or FP32 * self.heads * self.tokens

    def attention_kept(self) -> float:
        """Return the bytes that the attention keeps.

        These are the output of linear_qkv (the values are a view of it), the rotated queries and keys, the context, and
        the logarithms of the softmax.
        """
        channels = (self.channels + self.keys) + (self.channels + self.keys / 2) + self.channels
        gathered = self.keys * self.context if self.context > 1 else 0
        tables = 4 * self.size * self.rotary
        kept = self.size * self.tokens * (channels + gathered) + self.softmax_kept() + tables
        return kept + (self._head_norms_kept() if self.norms_heads else 0)

    def _head_norms_kept(self) -> float:
        """Return the bytes that the norms of queries and keys keep.

        These are the queries in order (the keys are a view of linear_qkv's output), a number for each head and token
        and, unfused, the intermediate results. Their outputs are rotated and not kept.
        """
        numbers = FP32 * self.tokens * (self.heads + self.groups)
        inner = 0 if self.fuses_norms else self._inner_of_norms
        return numbers + self.size * self.tokens * (self.channels + inner * (self.channels + self.keys / 2))

    @property
    def _inner_of_norms(self) -> int:
        """Tensors like its input that an unfused norm keeps.

        In fp32: the normalised input. In bf16: the normalised input in fp32, and again in bf16.
        """
        return 1 if self.size == FP32 else 3

    def mlp_kept(self) -> float:
        """Return the bytes of both halves of fc1's output and of the output of SwiGLU.

        Without a fused kernel, the activated half and the other half plus 0 are kept as well.
        """
        return self.inner * (3 if self.fuses_swiglu else 5)

    def kept(self) -> float:
        """Return the bytes of both norms, the attention, the MLP, and the residual stream after each half."""
        return 2 * self.stream + 2 * self.norm_kept() + self.attention_kept() + self.mlp_kept()

    def backward(self, config: Config) -> float:
        """Return the largest of three moments: fc2, SwiGLU, and attention without a fused kernel."""
        at_fc2 = self.stream + self.gathered(config) + self.inner + self.fc2_gradient(config)
        # The gradient from fc2 and the two gradients that SwiGLU computes from it. The input of fc2 is free by now.
        at_swiglu = self.stream + 2 * self.inner
        # The gradients of the probabilities and of the scores.
        at_scores = self.stream + 2 * self.scores
        return max(at_fc2, at_swiglu, at_scores)

    def forward(self, config: Config) -> float:
        """Return the larger of two moments: fc1 with SwiGLU, and attention without a fused kernel."""
        at_mlp = max(self.gathered(config) + 2 * self.inner, (3 if self.fuses_swiglu else 5) * self.inner)
        # The scores and the probabilities.
        return 2 * self.stream + max(at_mlp, 2 * self.scores)
