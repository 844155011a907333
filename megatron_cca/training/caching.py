"""Compute a reference's log-probabilities once, for runs that read them back, and record what they depend on."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.fingerprint import weights_fingerprint
from megatron_cca.config import Config
from megatron_cca.data.loader import BatchLoader
from megatron_cca.data.reference_cache import (
    BLOCK,
    ReferenceCache,
    ReferenceCacheWriter,
    Split,
    finished_blocks,
)
from megatron_cca.io.output_folders import claimed
from megatron_cca.keys import Affects, values, values_of_reference
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import ATTENTION_OPTIONS
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training import checks, pairs_of, reference_settings
from megatron_cca.training.batches import RunData, loader, training_batches, validation_batches
from megatron_cca.training.engine import initialize_user_buffers
from megatron_cca.training.log_ratio_gate import numeric_path
from megatron_cca.training.reference import LogpsPass, Reference, gathered_rows, head_options, own_reference
from megatron_cca.training.setup import frozen_chunks


def check_cache(config: Config, data: RunData) -> None:
    """Refuse a cache of another reference than this run's, or one that lacks some of its steps. Only rank 0 reads.

    Raises:
        UserError: the message names what differs or is missing.
    """
    if not config.objective.needs_reference or config.reference.strategy != "cached":
        return
    if os.environ.get("RANK", "0") != "0":
        return
    cache = ReferenceCache(Path(config.reference.cache))
    cache.check(cache_identity(config, data))
    done = layout.newest_complete(Path(config.training.output_dir) / layout.FOLDER) or 0
    cache.check_steps("training", done, config.training.train_iters)
    validation = validation_batches(config, data, with_pairs=True)
    if validation is not None:
        cache.check_steps("validation", 0, validation.iters)


def cache_identity(config: Config, data: RunData) -> dict[str, Any]:
    """Return what a reference's log-probabilities depend on, except for their last bits. This reads all its weights."""
    own, key = config.reference.checkpoint, checks.REFERENCE
    if own is None:
        own, key = config.training.pretrained_checkpoint, checks.PRETRAINED
    settings = reference_settings(config)
    resolved = resolve_architecture(config.model)
    architecture = {f"model.{name}": value for name, value in asdict(resolved).items()}
    # Caches of other models do not have these. JSON has no tuples.
    scales, channels = list(architecture.pop("model.scales")), architecture.pop("model.feature_channels")
    architecture |= {"model.scales": scales, "model.feature_channels": channels} if scales else {}
    vocabulary = architecture.pop("model.vocabulary")["size"]
    # None stands for what versions without these keys did.
    plain = {f"model.{key}": None for key in ATTENTION_OPTIONS if key not in resolved.attention_options}
    filled = {
        **architecture,
        **plain,
        "model.vocab_size": vocabulary,
        # None also stands for what versions without the key did.
        "data.pairs": "images" if pairs_of(config) == "images" else None,
        "reference.precision": settings.precision,
        "reference.fp8_recipe": settings.fp8_recipe if settings.precision == "fp8" else None,
    }
    led_to = {
        **{name: value for name, value in architecture.items() if name not in values(config)},
        "weights": weights_fingerprint(layout.resolve(own, key), key) if own is not None else _drawn(config),
        "data": data.training.fingerprint(),
        "validation data": data.validation.fingerprint() if data.validation is not None else None,
        "partner data": data.training.partners_fingerprint(),
        "partner validation data": data.validation.partners_fingerprint() if data.validation is not None else None,
    }
    # Only if there are some: former versions took another caption of the same image as a negative.
    repeated = data.training.num_repeated_images()
    led_to |= {"repeated images": repeated} if repeated else {}
    return values_of_reference(config, Affects.NUMBERS, filled) | led_to


def cache_reference(config: Config, data: RunData, output: Path, first: int, last: int) -> None:
    """Write the log-probabilities of training steps ``first .. last - 1``, and of every validation batch.

    Collective over all ranks of the job. Blocks that a former attempt finished are kept.

    Args:
        config: of the run that will use them. A ``reference.strategy`` other than offload counts as resident.
        data: of that run.
        output: a new folder, or a cache of the same run.
        first, last: the steps. Whole blocks of steps are computed.

    Raises:
        UserError: the output folder holds something else, the disk is full, or data is damaged.
    """
    initialize_distributed(config)
    initialize_user_buffers(config)
    batches = training_batches(config, data, with_pairs=True)
    vocabulary = resolve_architecture(config.model).vocabulary
    forward = LogpsPass(batches.rows_per_microbatch, head_options(config, vocabulary))
    with ExitStack() as stack:
        writer = None
        if _writes():
            stack.enter_context(claimed(output))
            writer = ReferenceCacheWriter(output, cache_identity(config, data), numeric_path(config))
        reference = own_reference(config, forward, frozen_chunks(config, resolve_architecture(config.model)))
        validation = validation_batches(config, data, with_pairs=True)
        splits = [("training", batches, first, last)]
        if validation is not None:
            splits.append(("validation", validation.batches, 0, validation.iters))
        bar = stack.enter_context(_progress(sum(end - begin // BLOCK * BLOCK for _, _, begin, end in splits), writer))
        for split, source, begin, end in splits:
            with loader(config, source) as reader:
                for start in range(begin // BLOCK * BLOCK, end, BLOCK):
                    stop = min(start + BLOCK, end)
                    if _is_done(output, split, start, stop):
                        bar.update(stop - start)
                        continue
                    block = _block(reader, reference, split, range(start, stop), bar)
                    if writer is not None:
                        writer.write(split, start, block)


def _drawn(config: Config) -> str:
    return f"drawn from seed {config.training.seed} with std {config.model.init_method_std}"


def _writes() -> bool:
    place = (parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_and_context_parallel_group().rank())
    return parallel_state.is_pipeline_last_stage() and place == (0, 0)


def _is_done(output: Path, split: Split, start: int, stop: int) -> bool:
    """Return whether a former attempt finished the block. Rank 0 decides, so that all ranks agree."""
    block = finished_blocks(output, split).get(start // BLOCK)
    answer = [block is not None and block[1] >= stop]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _block(reader: BatchLoader, reference: Reference, split: Split, steps: range, bar: tqdm) -> np.ndarray | None:
    """Return float32 ``[steps, B, 2]`` on the last stage, None elsewhere."""
    found = []
    for step in steps:
        batch = reader.get(step)
        logps = reference.logps(batch, step, split)
        if logps:
            found.append(_global_rows(logps))
        bar.update()
    return np.stack(found) if found else None


def _global_rows(logps: dict[int, Tensor]) -> np.ndarray:
    """Return float32 ``[B, 2]`` of the global batch from the microbatches of each rank."""
    mine = torch.cat([torch.stack(logps[index].chunk(2)) for index in sorted(logps)], dim=1)
    return gathered_rows(mine).t().float().cpu().numpy()


def _progress(steps: int, writer: ReferenceCacheWriter | None) -> tqdm:
    # The rank that writes the cache shows it. torchrun forwards standard error.
    return tqdm(total=steps, desc="caching", unit="step", disable=None if writer else True, file=sys.stderr)
