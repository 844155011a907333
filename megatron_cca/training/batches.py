"""Open the data of a run: its training batches, its validation batches, and the loader of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state

from megatron_cca import platform
from megatron_cca.config import Config
from megatron_cca.data import DIGITS
from megatron_cca.data.loader import BatchLoader, RankShare
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.pairing import Pairing
from megatron_cca.data.sample_order import SampleOrder, held_out_order, training_order
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.token_data import TokenData
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import Architecture, grid_misfit, longest_row, only_grid, sequence_multiple

DATA, VALIDATION = "data.path", "validation.path"


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
        UserError: see :class:`TokenShards`, and :func:`training_order` for the held-out samples.
    """
    path = config.validation.path
    data = RunData(_open(config, config.data.path, DATA), None if path is None else _open(config, path, VALIDATION))
    # Check the held-out samples now, before any process group is made.
    training_order(data.training, 0, config.validation.fraction, config.validation.seed)
    return data


def _open(config: Config, path: str | dict[str, float], key: str) -> TokenData:
    blend = {path: 1.0} if isinstance(path, str) else path
    architecture = resolve_architecture(config.model)
    folders = [_digits(config) if name == DIGITS else Path(name) for name in blend]
    shards = [TokenShards(folder, architecture.vocabulary, key) for folder in folders]
    for one in shards:
        _check_grids(one, architecture, key)
    return TokenData(shards, list(blend.values()))


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


def training_batches(config: Config, data: RunData, with_pairs: bool) -> BatchBuilder:
    """Return the batches that a run trains on."""
    held_out = config.validation.fraction, config.validation.seed
    seed = config.training.seed
    order = training_order(data.training, seed, *held_out)
    return _builder(config, data.training, order, seed, with_pairs, config.data.length_bucketing)


def validation_batches(config: Config, data: RunData, with_pairs: bool) -> Validation | None:
    """Return the batches that a run validates on. Return None if it does not validate."""
    validation = config.validation
    if not validation.interval:
        return None
    if data.validation is None:
        tokens, order = data.training, held_out_order(data.training, validation.fraction, validation.seed)
    else:
        tokens, order = data.validation, training_order(data.validation, validation.seed, 0.0, validation.seed)
    one_pass = sum(len(pool) for pool in order.pools) // config.training.global_batch_size
    builder = _builder(config, tokens, order, validation.seed, with_pairs, length_bucketing=1)
    return Validation(builder, validation.iters or max(1, one_pass))


def _builder(
    config: Config, data: TokenData, order: SampleOrder, seed: int, with_pairs: bool, length_bucketing: int
) -> BatchBuilder:
    multiple = sequence_multiple(config.parallel, config.data.pad_to_multiple_of)
    return BatchBuilder(
        data=data,
        pairing=Pairing(
            order=order,
            rows=data.rows,
            global_batch_size=config.training.global_batch_size,
            condition_dropout=config.data.condition_dropout,
            length_bucketing=length_bucketing,
            seed=seed,
            num_variants=data.num_variants,
        ),
        with_pairs=with_pairs,
        micro_batch_size=config.training.micro_batch_size,
        sequence_multiple=multiple,
        max_sequence_length=longest_row(resolve_architecture(config.model), multiple),
    )


def loader(config: Config, batches: BatchBuilder) -> BatchLoader:
    """Return the loader of this rank's batches. Megatron's groups must be initialised."""
    return BatchLoader(batches, _this_share(), platform.device(), config.data.prefetch, config.data.loader)


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
