"""Check the log-ratio at step 0. Policy and reference are the same model then, so that any log-ratio is an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cca import platform
from megatron_cca.config import Config, TrainingConfig
from megatron_cca.errors import UserError
from megatron_cca.keys import Affects, values_of_reference
from megatron_cca.models.layers import forward_kernels
from megatron_cca.objectives import PairLogps
from megatron_cca.parallel.tiles import chunk_size_of
from megatron_cca.training import dropout_key, reference_settings, same_weights

# This error in CCA's reward (beta x log-ratio) changes a row's weight in the gradient, a sigmoid, by about 2.5 %.
DEFAULT_ALLOWED = 0.05


@dataclass(frozen=True)
class LogRatioSpread:
    """Statistics of policy minus reference over all rows of a global batch, positives and negatives, in nats."""

    mean: float
    std: float
    worst: float
    rows: int

    @property
    def root_mean_square(self) -> float:
        """The root mean square in nats. Both a bias and a scatter raise it."""
        return math.hypot(self.mean, self.std)


def log_ratio_spread(pairs: PairLogps) -> LogRatioSpread:
    """Measure the log-ratios of all rows of ``pairs``."""
    ratios = torch.cat(pairs.log_ratios()).double()
    return LogRatioSpread(
        ratios.mean().item(), ratios.std(unbiased=False).item(), ratios.abs().max().item(), len(ratios)
    )


def same_path(config: Config) -> bool:
    """Return whether the two forward passes are the same to the last bit as long as the weights are."""
    if dropout_key(config) is not None or config.reference.fp8_param:
        return False
    if _arithmetic(reference_settings(config)) != _arithmetic(config.training):
        return False
    if config.reference.strategy != "cached":
        return True
    from megatron_cca.data.reference_cache import ReferenceCache

    return ReferenceCache(Path(config.reference.cache)).path == numeric_path(config)


def numeric_path(config: Config) -> dict[str, Any]:
    """Return, with nulls filled in, what log-probabilities' last bits depend on besides weights, data and precision."""
    on_gpu = platform.current().is_cuda
    filled = {"training.logps_chunk_size": chunk_size_of(config.training.logps_chunk_size, on_gpu=on_gpu)}
    filled |= {f"kernels.{name}": value for name, value in forward_kernels(config.kernels).items()}
    machine = {"device": platform.device_name(), "torch": torch.__version__}
    return values_of_reference(config, Affects.LAST_BITS, filled) | machine


def check_log_ratio(config: Config, spread: LogRatioSpread) -> str:
    """Return the line that reports the log-ratio at step 0.

    Args:
        config: of the run. Its objective's ``reward_scale`` is the key that multiplies log-ratios.
        spread: of the rows of step 0.

    Raises:
        UserError: the log-ratio is larger than ``reference.allow_bias`` although the weights are the same.
    """
    if spread.worst == 0.0:
        return f"step-0 log-ratio: exactly 0 (policy - reference, {spread.rows} rows, nats)"
    measured = (
        f"step-0 log-ratio: mean {spread.mean:.3g}, sd {spread.std:.3g}, worst {spread.worst:.3g} nats over "
        f"{spread.rows} rows"
    )
    key = config.objective.reward_scale
    if not same_weights(config) or key is None:
        return measured
    scale = getattr(config.objective, key)
    bias = scale * spread.root_mean_square
    effect = f"{measured}; {key} x mean {scale * spread.mean:.3g}, {key} x root mean square {bias:.3g}"
    is_same_path = same_path(config)
    allowed = config.reference.allow_bias
    if allowed is None:
        allowed = 0.0 if is_same_path else DEFAULT_ALLOWED
    if bias <= allowed:
        return f"{effect}, {allowed:g} allowed"
    way_on = f"to go on all the same: --set reference.allow_bias={_rounded_up(bias)}"
    if is_same_path:
        raise UserError(
            f"{effect}: must be exactly 0, since policy and reference have the same weights and precision; the layers "
            f"are not deterministic here: try model.transformer_impl=local, or, {way_on}"
        )
    raise UserError(
        f"{effect}, only {allowed:g} allowed: {_differs(config)}, which bends the objective; {_remedy(config)}, lower "
        f"objective.{key}, or, {way_on}"
    )


def _arithmetic(settings: TrainingConfig) -> tuple:
    return (settings.precision, settings.fp8_recipe if settings.precision == "fp8" else None)


def _differs(config: Config) -> str:
    if dropout_key(config) is not None:
        return "dropout draws other masks for the reference than for the policy"
    policy, reference = _described(config.training), _described(reference_settings(config))
    if config.reference.fp8_param:
        reference += " with weights in FP8"
    where = " from a cache of another layout or machine" if config.reference.strategy == "cached" else ""
    return f"the policy computes in {policy}, the reference in {reference}{where}"


def _remedy(config: Config) -> str:
    key = dropout_key(config)
    return "bring their precisions closer" if key is None else f"lower model.{key}"


def _described(settings: TrainingConfig) -> str:
    return f"fp8 ({settings.fp8_recipe})" if settings.precision == "fp8" else settings.precision


def _rounded_up(value: float) -> str:
    """Round up to two digits with a margin, so that the next run passes with the threshold that a user copies."""
    scale = 10 ** (1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale * 1.05) / scale:g}"
