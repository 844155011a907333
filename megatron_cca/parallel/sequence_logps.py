"""Log-probabilities of target tokens, computed from hidden states without a full tensor of logits.

The LM head is applied tile by tile. A tile is a chunk of tokens times a block of ids. Each token keeps three numbers:
the largest logit, the sum of exponentials and the target's logit. They are reduced over the tensor-parallel group once
at the end. Backward recomputes the tiles.

Ids at or past ``vocab_size`` are padding. They never count, whatever their rows hold. So the result does not depend
on how a layout pads the vocabulary. Ids outside of the ``support`` do not count either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cca.parallel import tiles
from megatron_cca.parallel.tiles import blocks, chunk_size_of, own_part, tile_sizes
from megatron_cca.platform.operations import MainGradPlaceholder, current_operations


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    constant: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
    support: range | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the sum of log p(target | prefix) over the positions in the mask: float32 ``[B]``, in nats.

    Differentiable in ``hidden``, ``weight`` and ``bias``. If ``weight`` has a ``main_grad`` (Megatron's data
    parallelism), its gradient is added there, in that dtype, as Megatron's fused layers do. ``weight.grad`` then gets a
    placeholder without numbers or memory. Otherwise the gradient is summed in fp32 and cast to the weight's dtype once.

    Args:
        hidden: ``[S, B, H]``, fp32, bf16 or fp16, the full sequence on every tensor-parallel rank. Its gradient is
            complete on every rank (summed over the group).
        weight: ``[V_local, H]``, this rank's rows of the LM head, in the dtype of ``hidden``. Every rank has the same
            number of rows.
        targets: int64 ``[B, S]``. ``hidden[s, b]`` predicts ``targets[b, s]``. Ignored where the mask is false.
        mask: bool ``[B, S]``. Only true positions are computed.
        bias: ``[V_local]``, added to the logits of this rank's ids. None for a head without bias.
        constant: ``[S, B, H]``, added to ``hidden`` where logits are computed. It has no gradient, and the gradient of
            ``weight`` is that of the product with ``hidden`` alone. None adds nothing.
        tp_group: the tensor-parallel group. None if this rank has the whole head.
        vocab_size: the true size of the vocabulary, without padding.
        support: consecutive ids, whose probabilities sum to 1. None means the whole vocabulary. Other
            ids have no probability, and the gradient of their rows of ``weight`` is exactly 0.
        chunk_size: tokens in a tile. Memory beyond inputs and gradients grows with it. None means 1,024 on a CPU and
            4,096 on a GPU (:mod:`megatron_cca.parallel.tiles`).

    Raises:
        ValueError: a target in the mask is outside of the support (names position and id), the support is not part of
            the vocabulary, shapes or dtypes do not fit, the chunk size is below 1, or the shards do not add up to the
            vocabulary.
    """
    options = {
        "constant": constant,
        "tp_group": tp_group,
        "vocab_size": vocab_size,
        "support": support,
        "chunk_size": chunk_size,
    }
    # The sum has thousands of terms. In fp64 its rounding does not limit the precision of the log-ratio.
    return token_logps(hidden, weight, targets, mask, bias=bias, **options).double().sum(dim=1).float()


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    constant: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
    support: range | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return log p(target | prefix) of each token, see :func:`sequence_logps`: float32 ``[B, S]``, 0 off the mask."""
    _check_shapes(hidden, weight, bias, targets, mask, chunk_size)
    assert constant is None or (constant.shape, constant.dtype) == (hidden.shape, hidden.dtype)
    positions = mask.t().reshape(-1).nonzero().squeeze(1)
    ids = targets.t().reshape(-1).index_select(0, positions)
    support = range(vocab_size) if support is None else support
    _check_support(support, vocab_size)
    _check_targets(ids, positions, mask.size(0), support)
    flat_hidden, added = hidden.reshape(-1, hidden.size(-1)), None
    if constant is not None:
        added = constant.detach().reshape(flat_hidden.shape).index_select(0, positions)
    settings = (tp_group, vocab_size, support, chunk_size)
    logps = _SelectedLogps.apply(flat_hidden, weight, bias, positions, ids, settings, added)
    flat = torch.zeros(mask.numel(), dtype=torch.float32, device=hidden.device)
    return flat.index_copy(0, positions, logps).view(hidden.size(0), hidden.size(1)).t()


def _check_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, chunk_size: int | None
) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}, must be 1 or more")
    if hidden.dim() != 3:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, must be [S, B, H]")
    length, batch, width = hidden.shape
    if weight.dim() != 2 or weight.size(1) != width:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, must be [V_local, {width}] to fit hidden")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: {weight.dtype}, must be hidden's {hidden.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, must be [V_local] = ({weight.size(0)},) to fit weight")
    for name, tensor, dtype in (("targets", targets, torch.int64), ("mask", mask, torch.bool)):
        if tuple(tensor.shape) != (batch, length):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, must be [B, S] = ({batch}, {length}) to fit hidden")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: {tensor.dtype}, must be {dtype}")


def _check_support(support: range, vocab_size: int) -> None:
    if support.step != 1 or not 0 <= support.start < support.stop <= vocab_size:
        raise ValueError(f"support: {support}, must be consecutive ids of 0 to {vocab_size - 1}, at least one")


def _check_targets(ids: Tensor, positions: Tensor, batch: int, support: range) -> None:
    outside = (ids < support.start) | (ids >= support.stop)
    if outside.any():
        first = int(outside.nonzero()[0])
        token, row = divmod(int(positions[first]), batch)
        raise ValueError(
            f"targets: id {int(ids[first])} at row {row}, position {token}, must be {support[0]} to {support[-1]} "
            "where the mask is on"
        )


class _SelectedLogps(torch.autograd.Function):
    """Log-probabilities of N selected tokens: hidden ``[T, H]``, positions and ids ``[N]`` -> fp32 ``[N]``.

    ``added`` is None, or ``[N, H]``: a constant part of the selected hidden states.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, positions, ids, settings, added):
        head = _HeadShard(weight, bias, ids, *settings)
        selected = hidden.index_select(0, positions)
        selected = selected if added is None else selected + added
        peak = selected.new_full((ids.numel(),), -torch.inf, dtype=head.sum_dtype)
        sum_exp, target_logits = torch.zeros_like(peak), torch.zeros_like(peak)
        for block in head.blocks():
            columns = head.operand(weight[block])
            for rows in head.chunks():
                head.operations.absorb(
                    head.logits(head.operand(selected[rows]), columns, block),
                    head.local_targets(rows, block),
                    *(peak[rows], sum_exp[rows], target_logits[rows]),
                )
        peak, sum_exp, target_logits = head.reduce_statistics(peak, sum_exp, target_logits)
        ctx.save_for_backward(hidden, weight, bias, positions, ids, peak, sum_exp, added)
        ctx.settings = settings
        # Keep this order: the logits can be huge and nearly equal.
        return (target_logits - peak).sub_(sum_exp.log()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        hidden, weight, bias, positions, ids, peak, sum_exp, added = ctx.saved_tensors
        head = _HeadShard(weight, bias, ids, *ctx.settings)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        selected = hidden.index_select(0, positions)
        tokens = (selected if added is None else selected + added, selected)
        statistics = (peak, sum_exp, grad_logps.to(head.sum_dtype).contiguous())
        grad_selected = torch.zeros_like(selected, dtype=head.sum_dtype) if wants_hidden else None
        head_gradient = _HeadGradient(weight, head.sum_dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.sum_dtype) if wants_bias else None
        for block in head.blocks():
            columns = head.true_columns(block)
            for rows in head.chunks():
                gradient = head.backward_tile(block, rows, tokens, columns, statistics, grad_selected, head_gradient)
                if wants_bias:
                    grad_bias[block] += gradient.sum(dim=0, dtype=head.sum_dtype)
            if wants_weight:
                head_gradient.finish(block)
        grad_hidden = None
        if wants_hidden:
            # All ranks have the same hidden states. The rows of each rank give a part of their gradient.
            grad_selected = head.all_reduce(grad_selected, dist.ReduceOp.SUM)
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, positions, grad_selected.to(hidden.dtype))
        grad_weight = head_gradient.result() if wants_weight else None
        return grad_hidden, grad_weight, grad_bias.to(bias.dtype) if wants_bias else None, *[None] * 4


class _HeadShard:
    """This rank's rows of the LM head: applies them to N tokens in tiles, and reduces over the other ranks."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tp_group: dist.ProcessGroup | None,
        vocab_size: int,
        support: range,
        chunk_size: int | None,
    ) -> None:
        self.weight, self.bias, self.ids, self.vocab_size = weight, bias, ids, vocab_size
        self.on_gpu = current_operations().is_on_gpu(weight)
        self.sizes = tile_sizes(on_gpu=self.on_gpu)
        self.chunk_size = chunk_size_of(chunk_size, on_gpu=self.on_gpu)
        self.tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.first_id = weight.size(0) * (self.tp_group.rank() if self.tp_group is not None else 0)
        self.own_ids = own_part(support, self.first_id, weight.size(0))
        self.sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.operations = tiles.operations_for(weight.device)
        self._workspace: Tensor | None = None

    def blocks(self) -> Iterator[slice]:
        """Yield slices of this rank's ids of the support, each one tile wide. The last can contain padding rows."""
        first, rows = self.own_ids.start, self.weight.size(0)
        for block in blocks(len(self.own_ids), rows - first, self.sizes):
            yield slice(first + block.start, first + block.stop)

    def chunks(self) -> Iterator[slice]:
        """Return slices of the tokens, each one tile high."""
        total, size = self.ids.numel(), self.chunk_size
        return (slice(start, min(start + size, total)) for start in range(0, total, size))

    def local_targets(self, rows: slice, block: slice) -> Tensor:
        """Return the targets as columns of a block. Other blocks' or ranks' targets give columns outside of it."""
        return self.ids[rows] - (self.first_id + block.start)

    def operand(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a factor of a product, cast on a CPU: there, sums of half precision are not in fp32."""
        return tensor if self.on_gpu else tensor.to(self.sum_dtype)

    def true_columns(self, block: slice) -> Tensor:
        """Return a block's rows of the weight as a factor of a product. Rows that do not count are set to 0."""
        rows = self.weight[block]
        true = self.own_ids.stop - block.start
        if true < rows.size(0):
            # The gradient of their logits is 0. Times infinity in the weight, it would be NaN.
            rows = rows.clone()
            rows[true:] = 0
        return self.operand(rows)

    def logits(self, tokens: Tensor, columns: Tensor, block: slice) -> Tensor:
        """Compute the tile ``[n, width]`` in fp32 or better. The next call overwrites it.

        Words that do not count get minus infinity.
        """
        rows, width = tokens.size(0), columns.size(0)
        if tokens.dtype != self.sum_dtype:
            tile = torch.mm(tokens, columns.t(), out_dtype=self.sum_dtype)
        else:
            if self._workspace is None:
                # Reuse the memory: on a CPU, new pages cost as much time as the arithmetic.
                self._workspace = tokens.new_empty(rows * width)
            tile = torch.mm(tokens, columns.t(), out=self._workspace[: rows * width].view(rows, width))
        if self.bias is not None:
            tile += self.bias[block]
        true = self.own_ids.stop - block.start
        if true < width:
            tile[:, true:] = -torch.inf
        return tile

    def backward_tile(
        self,
        block: slice,
        rows: slice,
        tokens: tuple[Tensor, Tensor],
        columns: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        grad_selected: Tensor | None,
        head_gradient: _HeadGradient | None,
    ) -> Tensor:
        """Add the part of one tile to the gradients that are not None, and return the gradient of its logits.

        Args:
            block: the ids of the tile.
            rows: the tokens of the tile.
            tokens: hidden states of all tokens, ``[N, H]``, for the logits and for the gradient of the weight. They are
                one tensor unless a constant is added.
            columns: rows of the weight for the block, from :meth:`true_columns`.
            statistics: largest logit, sum of exponentials and upstream gradient of each token, ``[N]`` each.
            grad_selected: gradient of the hidden states, or None.
            head_gradient: gradient of the weight, or None.
        """
        for_logits, for_weight = tokens
        own = self.operand(for_logits[rows])
        gradient = self.operations.logits_gradient(
            self.logits(own, columns, block),
            self.local_targets(rows, block),
            *(statistic[rows] for statistic in statistics),
            columns.dtype,
        )
        if grad_selected is not None:
            current_operations().add_product(grad_selected[rows], gradient, columns)
        if head_gradient is not None:
            own = own if for_weight is for_logits else self.operand(for_weight[rows])
            head_gradient.add(block, gradient, own)
        return gradient

    def reduce_statistics(self, peak: Tensor, sum_exp: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the three numbers of each token over the whole vocabulary. Refuse shards that do not add up to it."""
        # The size of the shard is sent with them, so that its check needs no further collective.
        own_rows = peak.new_tensor([self.weight.size(0), -self.weight.size(0)])
        joined = self.all_reduce(torch.cat([peak, own_rows]), dist.ReduceOp.MAX)
        self._check_shards(own_rows, joined[-2:])
        sums = torch.stack([sum_exp * (peak - joined[:-2]).exp(), target_logits])
        return joined[:-2].clone(), *self.all_reduce(sums, dist.ReduceOp.SUM)

    def _check_shards(self, own_rows: Tensor, all_rows: Tensor) -> None:
        """Compare this rank's (rows, -rows) with the maximum over all ranks. All ranks raise the same error."""
        ranks, rows = self.tp_group.size() if self.tp_group is not None else 1, self.weight.size(0)
        if not torch.equal(own_rows, all_rows):
            smallest, largest = -int(all_rows[1]), int(all_rows[0])
            raise ValueError(f"weight: shards of {smallest} to {largest} rows, must be equal on all {ranks} ranks")
        if rows * ranks < self.vocab_size:
            raise ValueError(
                f"weight: {rows} rows on each of {ranks} rank(s) are {rows * ranks} ids, must be at least "
                f"vocab_size {self.vocab_size}"
            )

    def all_reduce(self, tensor: Tensor, op) -> Tensor:
        """Reduce the tensor in place over the tensor-parallel group, if there is one, and return it."""
        if self.tp_group is not None:
            dist.all_reduce(tensor, op=op, group=self.tp_group)
        return tensor


class _HeadGradient:
    """Sum of the gradient of the head's rows, block by block, in fp32 or directly in Megatron's ``main_grad``."""

    def __init__(self, weight: Tensor, sum_dtype: torch.dtype) -> None:
        self._weight, self._sum_dtype = weight, sum_dtype
        main_grad = getattr(weight, "main_grad", None)
        self._is_main = main_grad is not None
        self._whole = main_grad if self._is_main else torch.zeros_like(weight)
        self._block: Tensor | None = None

    def add(self, block: slice, gradient: Tensor, tokens: Tensor) -> None:
        """Add one tile's part, ``gradient.t() @ tokens``, to the block."""
        if self._block is None:
            whole = self._whole[block]
            self._block = whole if whole.dtype == self._sum_dtype else torch.zeros_like(whole, dtype=self._sum_dtype)
        current_operations().add_product(self._block, gradient.t(), tokens)

    def finish(self, block: slice) -> None:
        """Add the sum of the block to the whole gradient. Call it after the last tile of the block."""
        if self._block is not None and self._block.dtype != self._whole.dtype:
            self._whole[block] += self._block
        self._block = None

    def result(self) -> Tensor:
        """Return the gradient of the weight for autograd."""
        if not self._is_main:
            return self._whole
        # Megatron's hook must find a gradient but must not add it. Its fused linear layers do the same.
        self._weight.grad_added_to_main_grad = True
        return MainGradPlaceholder(self._weight)
