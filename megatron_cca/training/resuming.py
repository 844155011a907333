"""What each key of the configuration may do when a run continues; no torch, no Megatron."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import recorded_fingerprint, saved_config
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import explicit
from megatron_cca.training.reference_settings import has_own_weights

PRETRAINED = "training.pretrained_checkpoint"
REFERENCE = "reference.checkpoint"
OUTPUT = "training.output_dir"
# What a checkpoint's summary calls the fingerprints of the weights that its run began with.
STARTED_FROM = "started_from"


class OnResume(Enum):
    """What becomes of a key whose value is another one when a run continues.

    Attributes:
        TAKES_EFFECT: the new value counts from the next step on.
        SAME_NUMBERS: likewise, and the losses stay what they would have been: it says how, where, or how far ahead.
        REFUSED: it says what run this is; the run is not continued, and the key is named.
    """

    TAKES_EFFECT = "takes effect"
    SAME_NUMBERS = "same numbers"
    REFUSED = "refused"


# Sections of one kind; a new key of theirs is of that kind, too.
_SECTIONS = {
    "model": OnResume.REFUSED,
    "parallel": OnResume.SAME_NUMBERS,
    "lora": OnResume.REFUSED,
    "objective": OnResume.REFUSED,
    "kernels": OnResume.SAME_NUMBERS,
    "faults": OnResume.TAKES_EFFECT,
    "logging": OnResume.TAKES_EFFECT,
}
# Every key of the others; a test finds the one that is missing.
_KEYS = {
    "reference": {
        OnResume.SAME_NUMBERS: ("strategy", "cache", "allow_bias"),
        OnResume.REFUSED: ("checkpoint", "precision", "fp8_recipe", "fp8_param"),
    },
    "data": {
        OnResume.SAME_NUMBERS: ("pad_to_multiple_of", "prefetch", "loader"),
        OnResume.REFUSED: ("path", "condition_dropout", "length_bucketing"),
    },
    "validation": {
        OnResume.TAKES_EFFECT: ("interval", "path", "iters"),
        OnResume.REFUSED: ("fraction", "seed"),
    },
    "optimizer": {
        OnResume.TAKES_EFFECT: (
            *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay"),
            *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
            *("grad_reduce_in_fp32", "use_precision_aware_optimizer"),
            *("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
        ),
        OnResume.SAME_NUMBERS: (
            *("num_distributed_optimizer_instances", "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size"),
            *("average_in_collective", "pad_buckets_for_high_nccl_busbw"),
            *("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"),
        ),
        # Megatron stores the two kinds of state under other names.
        OnResume.REFUSED: ("use_distributed_optimizer",),
    },
    "training": {
        OnResume.TAKES_EFFECT: (
            *("train_iters", "save_interval", "async_save", "keep_last", "keep_every"),
            "distributed_timeout_minutes",
        ),
        OnResume.SAME_NUMBERS: (
            *("micro_batch_size", "logps_chunk_size"),
            *("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers"),
            # It names the run itself: with another one there is nothing to continue.
            "output_dir",
        ),
        OnResume.REFUSED: (
            *("seed", "global_batch_size", "precision", "fp8_format", "fp8_recipe"),
            *("fp8_amax_history_len", "fp8_amax_compute_algo"),
            # By its weights, not by its path; see check_started_from.
            "pretrained_checkpoint",
        ),
    },
}


def on_resume(section: str, key: str) -> OnResume:
    """What becomes of a key that has changed.

    Raises:
        KeyError: nobody has declared it.
    """
    if section in _SECTIONS:
        return _SECTIONS[section]
    kinds = {name: kind for kind, names in _KEYS[section].items() for name in names}
    return kinds[key]


def check_resume(config: Config, *, start_exists: bool = True) -> None:
    """Refuse to continue a run as another one; a folder without checkpoints is none to continue.

    Args:
        config: of the run.
        start_exists: whether the weights that it names are there already.

    Raises:
        UserError: a key that must not have changed, or other weights to begin with; names it.
    """
    root = Path(config.training.output_dir) / layout.FOLDER
    newest = layout.newest_complete(root)
    if newest is None:
        # If there are damaged ones only, newest_whole says so, having tried them all.
        return
    folder = layout.iteration_folder(root, newest)
    saved = saved_config(folder, OUTPUT)
    for key, ours, theirs in _changed(config, saved):
        if key != PRETRAINED:
            raise UserError(
                f"{key}: {ours!r}, but the run in {config.training.output_dir} was started with {theirs!r}; set it so, "
                "or choose another training.output_dir"
            )
    if start_exists:
        _check_started_from(config, saved, folder)


def _changed(config: Config, saved: Config) -> Iterator[tuple[str, object, object]]:
    ours, theirs = asdict(explicit(config)), asdict(saved)
    for section, values in ours.items():
        for name, value in values.items():
            # Another objective has other keys; its name comes first.
            if value != theirs[section].get(name) and on_resume(section, name) is OnResume.REFUSED:
                yield f"{section}.{name}", value, theirs[section].get(name)


def started_from(config: Config) -> dict[str, str | None]:
    """For a checkpoint's summary: a fingerprint of each checkpoint that the run begins with; None where it has none.

    Raises:
        UserError: no whole checkpoint where one is named.
    """
    named = {PRETRAINED: config.training.pretrained_checkpoint, REFERENCE: config.reference.checkpoint}
    return {key: None if path is None else _fingerprint(path, key) for key, path in named.items()}


def _fingerprint(path: str, key: str) -> str:
    return recorded_fingerprint(layout.resolve(path, key), key)


def _check_started_from(config: Config, saved: Config, folder: Path) -> None:
    """Refuse other weights to begin with: the reference would be another one from here on.

    A folder may have moved, and a path may lead to newer weights than it did: the fingerprints count. Checkpoints of
    earlier versions have none; their run's own paths then lead to the weights, as long as they are there.
    """
    recorded = layout.read_summary(folder, OUTPUT).get(STARTED_FROM)
    if not isinstance(recorded, dict):
        recorded = _still_there(saved)
    ours, theirs = config.training.pretrained_checkpoint, saved.training.pretrained_checkpoint
    uses_own = config.objective.needs_reference and has_own_weights(config)
    keys = [PRETRAINED] if ours != theirs or (uses_own and config.reference.checkpoint is None) else []
    keys += [REFERENCE] if uses_own and config.reference.checkpoint is not None else []
    found = started_from(config)
    for key in keys:
        if key in recorded and recorded[key] != found[key]:
            path = ours if key == PRETRAINED else config.reference.checkpoint
            raise UserError(
                f"{key}: {path!r} has other weights than the checkpoint that the run in {config.training.output_dir} "
                f"was started with ({theirs if key == PRETRAINED else saved.reference.checkpoint!r}); name that one, "
                "or choose another training.output_dir"
            )


def _still_there(saved: Config) -> dict[str, str | None]:
    found = {}
    for key, path in ((PRETRAINED, saved.training.pretrained_checkpoint), (REFERENCE, saved.reference.checkpoint)):
        try:
            found[key] = None if path is None else _fingerprint(path, key)
        except UserError:
            continue
    return found
