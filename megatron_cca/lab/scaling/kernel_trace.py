"""NCCL's kernels in a trace of torch.profiler: which of their time no other kernel hid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile

from megatron_cca.errors import UserError
from megatron_cca.lab.scaling.spans import Interval, Span, exposed_parts, union

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# NCCL's kernels, and those of Transformer Engine's user buffers.
_COMMUNICATES = re.compile(r"nccl|userbuffers", re.IGNORECASE)
_MESSAGE = re.compile(r"sendrecv", re.IGNORECASE)
_SECONDS = 1e-6

StageOf = Callable[[int], int]


class KernelTrace:
    """Holds the spans once the block of :func:`traced_kernels` has ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []


@contextmanager
def traced_kernels(stage_of: StageOf) -> Iterator[KernelTrace]:
    """Trace the device's kernels inside the block; its work must be over at the block's end.

    Raises:
        UserError: there is no trace of any kernel.
    """
    trace = KernelTrace()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield trace
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    if not any(event.get("cat") == "kernel" for event in events):
        raise UserError("torch.profiler saw no kernels on this GPU: CUPTI is missing, or another profiler has it")
    trace.spans = spans_of(events, stage_of)


def spans_of(events: Sequence[dict[str, Any]], stage_of: StageOf) -> list[Span]:
    """The communication in a trace.

    Args:
        events: of a Chrome trace, times in microseconds.
        stage_of: the pipeline stage of a rank of the job.
    """
    work = [event for event in events if event.get("cat") in _WORK and "dur" in event]
    ours = [event for event in work if _COMMUNICATES.search(event["name"])]
    others = union(_interval(event) for event in work if not _COMMUNICATES.search(event["name"]))
    exposed = exposed_parts([_interval(event) for event in ours], others)
    return [
        Span(_kind(event), _crosses_stages(event, stage_of), event["dur"] * _SECONDS, seconds)
        for event, seconds in zip(ours, exposed, strict=True)
    ]


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"] * _SECONDS, (event["ts"] + event["dur"]) * _SECONDS


def _kind(event: dict[str, Any]) -> str:
    details = event.get("args", {})
    sizes = [str(details.get(name, "")) for name in ("Collective name", "In msg nelems", "Out msg nelems", "dtype")]
    return " ".join([event["name"].partition("(")[0], *sizes]).strip()


def _crosses_stages(event: dict[str, Any], stage_of: StageOf) -> bool:
    """From what PyTorch notes of a kernel's ranks; where it noted nothing, messages are those between stages."""
    details = event.get("args", {})
    ranks = str(details.get("Process Group Ranks", ""))
    if "..." in ranks:
        # A long list is cut short, but not these: a stage's ranks are neighbours, so that first and last tell.
        start, stride, size = (details.get(name) for name in ("Global rank start", "Global rank stride", "Group size"))
        ranks = "" if None in (start, stride, size) else f"{start} {start + stride * (size - 1)}"
    found = {stage_of(int(rank)) for rank in re.findall(r"\d+", ranks)}
    return len(found) > 1 if found else bool(_MESSAGE.search(event["name"]))
