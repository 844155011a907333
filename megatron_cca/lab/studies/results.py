"""The results of a study: means and spreads over seeds, failures, and collapses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from megatron_cca.lab.studies.plan import Outcomes, Plan, Row
from megatron_cca.lab.studies.settings import Keys
from megatron_cca.lab.studies.study import BASE, Study, run_units
from megatron_cca.lab.studies.tasks import FINISHED, Sampling

_DIAGNOSTIC = "positive_log_ratio"


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation (n - 1) over the seeds that finished.

    A single seed has no standard deviation.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Result:
    """A row of the results with its numbers.

    Attributes:
        row: the row of the plan.
        seeds: metrics of each seed that finished; ``positive_log_ratio`` is the mean over a run's last ten steps.
        statistics: mean and standard deviation of each metric over those seeds.
        failed: seed -> reason, for the seeds that did not finish.
        collapsed: seeds whose FID is more than ``collapse`` times their base's.
        units: cost of its training in passes.
    """

    row: Row
    seeds: dict[int, dict[str, float]]
    statistics: dict[str, Statistic]
    failed: dict[int, str]
    collapsed: list[int]
    units: int

    @property
    def lost(self) -> int:
        """Number of seeds that collapsed or failed."""
        return len(self.collapsed) + len(self.failed)

    @property
    def is_lost(self) -> bool:
        """Whether most seeds collapsed or failed."""
        return 2 * self.lost > len(self.row.samplings)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried on the tuning seed.

    It has their metrics, or the reason of their failure.
    """

    values: Keys
    metrics: dict[str, float]
    failed: str | None
    is_chosen: bool


@dataclass(frozen=True)
class Results:
    """All results of a study; ``trials`` by method."""

    study: Study
    rows: list[Result]
    trials: dict[str, list[Trial]]

    @property
    def base(self) -> Result:
        """The base without guidance."""
        return self.rows[0]

    def of(self, method: str) -> list[Result]:
        """Return a method's rows: the chosen settings, then its sweep.

        There are none if all of its trials failed.
        """
        return [result for result in self.rows if result.row.method.name == method]


def collect(study: Study, plan: Plan, outcomes: Outcomes) -> Results:
    """Collect the results of a finished study.

    Args:
        study: the study.
        plan: the plan with all settings chosen.
        outcomes: the outcome of each task.
    """
    base = next(row for row in plan.rows if row.method.name == BASE)
    base_fid = {one.seed: _metrics(outcomes, one).get("fid") for one in base.samplings}
    rows = [_result(study, row, outcomes, base_fid) for row in plan.rows]
    trials = {
        name: [_trial(outcomes, values, sampling, plan.chosen.get(name)) for values, sampling in tried]
        for name, tried in plan.trials.items()
    }
    return Results(study, rows, trials)


def _metrics(outcomes: Outcomes, sampling: Sampling) -> dict[str, float]:
    outcome = outcomes(sampling)
    if outcome["status"] != FINISHED:
        return {}
    numbers = {key: value for key, value in outcome.items() if isinstance(value, float) and key != "seconds"}
    logged = outcomes(sampling.after).get(f"last_{_DIAGNOSTIC}") if sampling.after is not None else None
    return numbers if logged is None else {**numbers, _DIAGNOSTIC: logged}


def _result(study: Study, row: Row, outcomes: Outcomes, base_fid: Mapping[int, float | None]) -> Result:
    seeds = {one.seed: _metrics(outcomes, one) for one in row.samplings}
    finished = {seed: metrics for seed, metrics in seeds.items() if metrics}
    limit = study.settings.collapse
    return Result(
        row=row,
        seeds=finished,
        statistics=over_seeds(list(finished.values())),
        failed={one.seed: outcomes(one)["reason"] for one in row.samplings if not seeds[one.seed]},
        collapsed=[seed for seed, one in finished.items() if one["fid"] > limit * (base_fid[seed] or float("inf"))],
        units=run_units(row.point.config),
    )


def over_seeds(metrics: Sequence[Mapping[str, float]]) -> dict[str, Statistic]:
    """Return mean and standard deviation of each metric over the seeds.

    Without seeds the result is empty.
    """
    if not metrics:
        return {}
    columns = {name: [one[name] for one in metrics] for name in metrics[0]}
    return {
        name: Statistic(fmean(values), stdev(values) if len(values) > 1 else None) for name, values in columns.items()
    }


def _trial(outcomes: Outcomes, values: Keys, sampling: Sampling, chosen: Keys | None) -> Trial:
    return Trial(values, _metrics(outcomes, sampling), outcomes(sampling).get("reason"), values == chosen)


def as_json(results: Results) -> dict[str, Any]:
    """Return all inputs of the table and the plots as plain data."""
    settings = results.study.settings
    return {
        "study": settings.name,
        "seeds": settings.seeds,
        "tuning_seed": settings.tuning_seed,
        "samples": settings.samples,
        "rows": [_row_json(result) for result in results.rows],
        "trials": {
            name: [
                {"settings": one.values, "chosen": one.is_chosen, "failed": one.failed, "metrics": one.metrics}
                for one in trials
            ]
            for name, trials in results.trials.items()
        },
    }


def _row_json(result: Result) -> dict[str, Any]:
    return {
        "method": result.row.method.name,
        "settings": result.row.values,
        "chosen": result.row.is_chosen,
        "forwards_per_token": result.row.point.sampling.forwards_per_token,
        "training_passes": result.units,
        "seeds": result.seeds,
        "mean": {name: one.mean for name, one in result.statistics.items()},
        "std": {name: one.std for name, one in result.statistics.items()},
        "failed": result.failed,
        "collapsed": result.collapsed,
    }
