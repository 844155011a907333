"""What one rank met, told to all, so that they go on or stop together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cca import platform
from megatron_cca.errors import SurroundingsError, UserError, one_line


def attempted_on_rank_0[Answer](action: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
    """Let rank 0 alone do something with files.

    Args:
        action: its answer must be plain data.

    Returns:
        The answer, or what the file system or a check had against it in one line; the same on every rank.
    """
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, SurroundingsError, UserError) as error:
            outcome[1] = described(error)
    dist.broadcast_object_list(outcome)
    return outcome[0], outcome[1]


def largest(value: int) -> int:
    """The largest of what the ranks have; one small all-reduce."""
    answer = torch.tensor([value], dtype=torch.int32, device=platform.device())
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return int(answer)


def any_rank(condition: bool) -> bool:
    """Whether it holds on some rank; one small all-reduce."""
    return largest(int(condition)) == 1


def first_problem(problem: str | None) -> str | None:
    """Of the problems that ranks have, that of the first; None where no rank has one."""
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


def described(error: BaseException) -> str:
    """What an error says, in one line, without a traceback and with its file where it has one."""
    if isinstance(error, OSError):
        return one_line(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    return one_line(" ".join(str(error).split())) or type(error).__name__


def all_finite(values: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; waits for the device.

    One pass and no mask in memory: what is not finite stays so in a sum.
    """
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))
