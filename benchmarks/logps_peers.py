"""The peers that logps.py compares; each takes a shape and hidden, weight, targets, mask.

A peer returns log-probabilities summed over all tokens or over rows. Some peers have only one weight for all tokens. A
finer comparison is therefore not possible. The load of a peer raises ImportError if its package is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from megatron_cca import platform

Function = Callable[..., Tensor]
BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Peer:
    """A way to compute log-probabilities.

    Attributes:
        load: returns the function; raises ImportError if the package is missing.
        package: the distribution of the package.
        devices: the devices that it runs on.
    """

    load: Callable[[], Function]
    package: str = "torch"
    devices: tuple[str, ...] = BOTH

    def version(self) -> str:
        """Return the package's name and version."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            # The package is on the path but not installed. Without a network this package is used so, too.
            return self.package


def _ours() -> Function:
    from megatron_cca.parallel import sequence_logps

    def function(shape, hidden, weight, targets, mask):
        chunk = {} if shape.chunk_size is None else {"chunk_size": shape.chunk_size}
        return sequence_logps(hidden, weight, targets, mask, vocab_size=shape.vocabulary, **chunk)

    return function


def _dense() -> Function:
    """Return the authors' way.

    No tensor lives longer than autograd needs it.
    """

    def function(_shape, hidden, weight, targets, mask):
        logits = (hidden.transpose(0, 1) @ weight.t()).float()
        logps = torch.log_softmax(logits, dim=-1)
        del logits
        return (logps.gather(-1, targets[..., None]).squeeze(-1) * mask).sum(1)

    return function


def _megatron() -> Function:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def function(_shape, hidden, weight, targets, mask):
        _join_alone()
        logits = (hidden @ weight.t()).float()
        losses = vocab_parallel_cross_entropy(logits, targets.t().contiguous())
        return -(losses.t() * mask).sum(1)

    return function


def _join_alone() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group(**platform.process_group_options())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def _torch_chunked() -> Function:
    """Return torch's way, in chunks of tokens.

    It computes the gradients in its forward pass, for one weight of all tokens.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def function(_shape, hidden, weight, targets, _mask):
        flat = hidden.flatten(0, 1)
        return -torch.nn.functional.linear_cross_entropy(
            flat, weight, targets.flatten(), reduction="sum", options=options
        )

    return function


def _cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def function(_shape, hidden, weight, targets, mask):
        losses = linear_cross_entropy(hidden.transpose(0, 1), weight, targets, reduction="none")
        return -(losses * mask).sum(1)

    return function


def _liger() -> Function:
    """Return Liger's way, in chunks of tokens.

    It computes the gradients in its forward pass, for one weight of all tokens.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda _shape, hidden, weight, targets, _mask: -loss(weight, hidden.flatten(0, 1), targets.flatten())


DENSE = "dense"
# The head's gradient is added to main_grad, as with Megatron's data parallelism.
MAIN_GRAD = "ours, main_grad"
PADDED_PEERS = ("ours", MAIN_GRAD)
GPU = ("cuda",)
PEERS: dict[str, Peer] = {
    DENSE: Peer(_dense),
    "ours": Peer(_ours, "megatron_cca"),
    MAIN_GRAD: Peer(_ours, "megatron_cca"),
    "megatron": Peer(_megatron, "megatron-core"),
    "torch, chunked": Peer(_torch_chunked),
    "cut-cross-entropy": Peer(_cut_cross_entropy, "cut-cross-entropy", GPU),
    "Liger": Peer(_liger, "liger-kernel", GPU),
}
