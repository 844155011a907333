"""Open the data of a run: its training batches, its validation batches, and the loader of this rank.

A run whose data contrasts nothing is reported here. A row without a negative only raises the likelihood of its
image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from megatron.core import parallel_state

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data import DIGITS
from megatron_cca.data.loader import BatchLoader, RankShare
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.pairing import Pairing, SampleOrder, held_out_order, training_order
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, grid_misfit, longest_row, only_grid, sequence_multiple
from megatron_cca.training import pairs_of
from megatron_cca.training.run_log import RunLog

DATA, VALIDATION, PARTNERS = "data.path", "validation.path", "data.partner_path"
NOTHING, LITTLE = "nothing_to_contrast", "little_to_contrast"
SHARE = "positive_as_negative"
# At this share of rows without a negative, as few rows have one as lack one at the paper's condition dropout of 0.1.
NEARLY_ALL = 0.9
# Steps to average over, as in faults.py: one batch alone says little.
_SMOOTHED = 10
_ROWS_AT_A_TIME = 1 << 16
_LEFT_OUT = "accuracy, margin and negative log-ratio are undefined and left out"


@dataclass(frozen=True)
class RunData:
    """The token shards of a run, opened and checked.

    Attributes:
        training: the data of ``data.path``.
        validation: the data of ``validation.path``, or None.
    """

    training: TokenData
    validation: TokenData | None


@dataclass(frozen=True)
class Validation:
    """The validation batches, which are not trained on: always steps 0 to ``iters - 1`` of ``batches``."""

    batches: BatchBuilder
    iters: int


def open_data(config: Config) -> RunData:
    """Open the token shards of a run. Tokenise the bundled digits if the run uses them.

    Raises:
        UserError: see :class:`TokenShards`, :func:`training_order` for the held-out samples, and
            :mod:`megatron_cca.training.drawn_partners` for partners of other weights.
    """
    path, partners = config.validation.path, (config.data.partner_path, PARTNERS)
    own = config.validation.partner_path
    others = partners if own is None else (own, "validation.partner_path")
    validation = None if path is None else _open(config, path, VALIDATION, *others)
    data = RunData(_open(config, config.data.path, DATA, *partners), validation)
    _check_codes([*data.training.folders, *(data.validation.folders if data.validation is not None else ())])
    # Check the held-out samples and the partners now, before any process group is made.
    _order(config, data.training, 0, config.validation.fraction, config.validation.seed)
    if validation is not None:
        _counts(config, validation)
    if config.objective.reference_draws_partners:
        from megatron_cca.training.drawn_partners import check_drawn

        check_drawn(config, [data.training] if validation is None else [data.training, validation])
    return data


def training_batches(config: Config, data: RunData, with_pairs: bool) -> BatchBuilder:
    """Return the batches that a run trains on."""
    held_out = config.validation.fraction, config.validation.seed
    seed = config.training.seed
    order = _order(config, data.training, seed, *held_out)
    return _builder(config, data.training, order, seed, with_pairs, config.data.length_bucketing)


def validation_batches(config: Config, data: RunData, with_pairs: bool) -> Validation | None:
    """Return the batches that a run validates on. Return None if it does not validate."""
    validation = config.validation
    if not validation.interval:
        return None
    if data.validation is None:
        tokens = data.training
        order = held_out_order(tokens, validation.fraction, validation.seed, _counts(config, tokens))
    else:
        tokens, order = data.validation, _order(config, data.validation, validation.seed, 0.0, validation.seed)
    one_pass = sum(len(pool) for pool in order.pools) // config.training.global_batch_size
    builder = _builder(config, tokens, order, validation.seed, with_pairs, length_bucketing=1)
    return Validation(builder, validation.iters or max(1, one_pass))


def loader(config: Config, batches: BatchBuilder) -> BatchLoader:
    """Return the loader of this rank's batches. Megatron's groups must be initialised."""
    return BatchLoader(batches, _this_share(), platform.device(), config.data.prefetch, config.data.loader)


class ContrastWatch:
    """The watch for batches in which no row, or nearly no row, has a negative. It reports each case once per process.

    Args:
        config: of a run whose objective contrasts something.
        data: the training data.
    """

    def __init__(self, config: Config, data: TokenData) -> None:
        self._config, self._data = config, data
        self._shares: deque[float] = deque(maxlen=_SMOOTHED)
        self._said: set[str] = set()

    def begin(self, log: RunLog) -> None:
        """Report, before the first step, if the data or the size of the batch leave nothing to contrast."""
        reason = self._why_nothing()
        if reason is not None:
            self._said |= {NOTHING, LITTLE}
            line = f"{reason}: nothing to contrast; {self._consequence()}; {_LEFT_OUT}"
            log.event(NOTHING, line, reason=reason)

    def after(self, step: int, row: Mapping[str, float], log: RunLog) -> None:
        """Check the metrics of a step, and report if rows have no negative.

        Args:
            step: counts from 0.
            row: its metrics. Those of a validation are called ``validation_...``.
            log: where to report.
        """
        for where, share in (("this batch", row[SHARE]), ("the validation", row.get(f"validation_{SHARE}"))):
            if share == 1.0 and self._is_new(NOTHING if where == "this batch" else where):
                line = f"nothing to contrast: no row of {where} has a negative; "
                line += f"{self._consequence()}; {_LEFT_OUT}" if where == "this batch" else _LEFT_OUT
                log.event(NOTHING, f"step {step}: {line}", step=step, reason=line)
        self._shares.append(row[SHARE])
        share = fmean(self._shares)
        if len(self._shares) == _SMOOTHED and share >= NEARLY_ALL and self._is_new(LITTLE):
            line = (
                f"{share:.1%} of the rows of the last {_SMOOTHED} steps have no negative (data.condition_dropout alone "
                f"makes it {self._config.data.condition_dropout:.0%}): {self._consequence()} in these rows; give the "
                "samples conditions that differ, lower data.condition_dropout, or raise the global batch"
            )
            log.event(LITTLE, f"step {step}: {line}", step=step, share=round(share, 4), reason=line)

    def _is_new(self, what: str) -> bool:
        is_new = what not in self._said
        self._said.add(what)
        return is_new

    def _why_nothing(self) -> str | None:
        if pairs_of(self._config) == "images":
            return None
        if self._config.training.global_batch_size == 1:
            return "training.global_batch_size: 1 has no other row whose condition could be the negative"
        if has_one_condition(self._data):
            return f"data.path: all {len(self._data)} samples have the same condition"
        return None

    def _consequence(self) -> str:
        return f"{self._config.objective.name} {self._config.objective.without_contrast}"


def has_one_condition(data: TokenData) -> bool:
    """Return whether all samples have the same caption, or all have the same condition.

    The whole table is read only if they have.
    """
    return any(_is_constant(_column(data, name)) for name in ("caption", "condition"))


def _open(config: Config, path: str | dict[str, float], key: str, partners: str | None, partners_key: str) -> TokenData:
    blend = {path: 1.0} if isinstance(path, str) else path
    shards = [_shards(config, name, key) for name in blend]
    others = [] if partners is None else [_shards(config, partners, partners_key)]
    return TokenData(shards, list(blend.values()), others)


def _shards(config: Config, name: str, key: str) -> TokenShards:
    architecture = resolve_architecture(config.model)
    shards = TokenShards(_digits(config) if name == DIGITS else Path(name), architecture.vocabulary, key)
    _check_grids(shards, architecture, key)
    return shards


def _check_codes(folders: Sequence[TokenShards]) -> None:
    """Refuse folders whose codes mean different things. A folder need not name its image tokenizer."""
    known = [shards for shards in folders if shards.tokenizer("image") is not None]
    for shards in known[1:]:
        theirs, first = shards.tokenizer("image"), known[0].tokenizer("image")
        if theirs != first:
            raise UserError(
                f"{shards.key}: {shards.folder} has codes of another image tokenizer ({theirs}) than {known[0].folder} "
                f"({first}); tokenize both with the same one"
            )


def _order(config: Config, data: TokenData, seed: int, fraction: float, split_seed: int) -> SampleOrder:
    return training_order(data, seed, fraction, split_seed, _counts(config, data))


def _counts(config: Config, data: TokenData) -> np.ndarray | None:
    """Return the number of partners of each sample, int64 ``[N]``. Return None without pairs of images."""
    return data.image_partners.count if pairs_of(config) == "images" else None


def _digits(config: Config) -> Path:
    from megatron_cca.data.digits import digit_shards

    return digit_shards(config.model)


def _check_grids(shards: TokenShards, architecture: Architecture, key: str) -> None:
    own = only_grid(architecture)
    if own is None:
        return
    others = (shards.table["grid"] != (1, *own)).any(axis=1)
    if others.any():
        sample = int(others.argmax())
        misfit = grid_misfit(architecture, *shards.table["grid"][sample].tolist())
        raise UserError(f"{key}: sample {sample} of {shards.folder} has {misfit}")


def _builder(
    config: Config, data: TokenData, order: SampleOrder, seed: int, with_pairs: bool, length_bucketing: int
) -> BatchBuilder:
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    rule = {
        "order": order,
        "rows": data.rows,
        "global_batch_size": config.training.global_batch_size,
        "condition_dropout": config.data.condition_dropout,
        "length_bucketing": length_bucketing,
        "seed": seed,
        "num_variants": data.num_variants,
    }
    return BatchBuilder(
        data=data,
        pairing=_pairing(config, data, rule) if with_pairs else Pairing(**rule),
        with_pairs=with_pairs,
        micro_batch_size=config.training.micro_batch_size,
        sequence_multiple=multiple,
        max_sequence_length=longest_row(resolve_architecture(config.model), multiple),
    )


def _pairing(config: Config, data: TokenData, rule: dict[str, Any]) -> Pairing:
    if config.objective.conditional_share is not None:
        from megatron_cca.data.null_pairs import NullPairing

        return NullPairing(**rule)
    if pairs_of(config) == "images":
        from megatron_cca.data.partners import ImagePairing

        return ImagePairing(**rule, partners=data.image_partners)
    return Pairing(**rule)


def _this_share() -> RankShare:
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return RankShare(
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        needs_tokens=stage in (0, stages - 1),
        group=parallel_state.get_tensor_and_context_parallel_group(),
    )


def _column(data: TokenData, name: str) -> Iterator[np.ndarray]:
    for shards in data.shards:
        for first in range(0, len(shards.table), _ROWS_AT_A_TIME):
            yield shards.table[first : first + _ROWS_AT_A_TIME][name]


def _is_constant(parts: Iterator[np.ndarray]) -> bool:
    values = set()
    for part in parts:
        values.add(part[0].item())
        if len(values) > 1 or (part != part[0]).any():
            return False
    return True
