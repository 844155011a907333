"""What to say of clusters that cannot run a model, and what could."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.lab.planner.candidates import layouts
from megatron_cca.lab.planner.hardware import GPUS, Cluster
from megatron_cca.lab.planner.memory import GIB
from megatron_cca.lab.planner.trials import Candidate, Wishes, candidates, fitting

_MOST_NODES = 64


def check_cluster(config: Config, wishes: Wishes) -> None:
    """Refuse a number of GPUs that no layout suits.

    Raises:
        UserError: names the number, and the nearest that are possible.
    """
    cluster = wishes.cluster
    node, gpus = cluster.gpus_per_node, cluster.num_gpus
    if gpus > node and gpus % node:
        lower = gpus // node * node
        raise UserError(
            f"--gpus: {gpus} is no whole number of nodes of {node}; the nearest are {lower} and {lower + node}, "
            "or give another --nodes-of"
        )
    if _has_layout(config, wishes, gpus):
        return
    advice = [f"{n} GPUs" for n in _nearest(config, wishes)]
    batch = _nearest_batch(config, wishes)
    advice += [f"training.global_batch_size {batch}"] if batch else []
    raise UserError(
        f"--gpus: {gpus} cannot be divided into tensor, pipeline, context and data parallelism for this model and "
        f"training.global_batch_size {config.training.global_batch_size}; possible: {' or '.join(advice)}"
    )


def _has_layout(config: Config, wishes: Wishes, gpus: int) -> bool:
    cluster = replace(wishes.cluster, num_gpus=gpus)
    return any(True for _ in layouts(config, cluster, vary_micro_batch="micro_batch" in wishes.vary))


def _nearest(config: Config, wishes: Wishes) -> list[int]:
    """The largest possible number below, and the smallest above."""
    gpus, node = wishes.cluster.num_gpus, wishes.cluster.gpus_per_node
    step = node if gpus > node else 1
    below = next((n for n in range(gpus - step, 0, -step) if _has_layout(config, wishes, n)), None)
    above = range(gpus + step, 2 * gpus + 1, step) if gpus > node else [*range(gpus + 1, node + 1), 2 * node]
    return [n for n in (below, next((n for n in above if _has_layout(config, wishes, n)), None)) if n]


def _nearest_batch(config: Config, wishes: Wishes) -> int | None:
    """The next larger global batch that the GPUs can share."""
    gpus, batch = wishes.cluster.num_gpus, config.training.global_batch_size
    for size in range(batch + 1, batch + gpus + 1):
        if _has_layout(replace(config, training=replace(config.training, global_batch_size=size)), wishes, gpus):
            return size
    return None


def refuse_too_small(config: Config, wishes: Wishes, found: Sequence[Candidate]) -> NoReturn:
    """Say how much memory is missing at least, and what would do.

    Raises:
        UserError: always.
    """
    least = min((one.memory.total for one in found), default=0)
    cluster = wishes.cluster
    where = f"{cluster.num_gpus} x {cluster.gpu.name}"
    problem = f"--gpus: {where} are too little for this model: the best layout needs {least / GIB:.1f} GiB on a GPU"
    raise UserError(f"{problem}, of which {wishes.memory_limit / GIB:.1f} may be filled; {_advice(config, wishes)}")


def _advice(config: Config, wishes: Wishes) -> str:
    would_do = [text for text in (_more_gpus(config, wishes), _other_gpus(config, wishes)) if text]
    if config.lora.dim is None and _fits(replace(config, lora=replace(config.lora, dim=16)), wishes):
        would_do.append("lora.dim=16 on these")
    return f"would do: {', or '.join(would_do)}" if would_do else "nothing known here would do"


def _more_gpus(config: Config, wishes: Wishes) -> str | None:
    cluster = wishes.cluster
    sizes = [n for n in range(cluster.num_gpus + 1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0]
    nodes = max(1, cluster.num_gpus // cluster.gpus_per_node)
    while nodes < _MOST_NODES:
        nodes *= 2
        sizes.append(nodes * cluster.gpus_per_node)
    for size in sizes:
        if _fits(config, replace(wishes, cluster=replace(cluster, num_gpus=size))):
            return f"{size} of them"
    return None


def _other_gpus(config: Config, wishes: Wishes) -> str | None:
    cluster = wishes.cluster
    larger = sorted(
        (gpu for gpu in GPUS.values() if gpu.memory_bytes > cluster.gpu.memory_bytes), key=lambda gpu: gpu.memory_bytes
    )
    for gpu in larger:
        # Its own data sheet: a calibration is of one GPU.
        elsewhere = Wishes(Cluster(gpu, cluster.num_gpus, cluster.gpus_per_node), wishes.images, wishes.vary)
        if config.training.precision in gpu.flops and _fits(config, elsewhere):
            return f"{cluster.num_gpus} x {gpu.name}"
    return None


def _fits(config: Config, wishes: Wishes) -> bool:
    try:
        found = sorted(candidates(config, wishes), key=lambda one: -one.step.recompute)
    except UserError:
        return False
    return bool(fitting(found, wishes, 1))
