"""The results of a study, means and spreads over seeds, failures, collapses, and their table.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from megatron_cca.lab import markdown_table
from megatron_cca.lab.studies import Keys
from megatron_cca.lab.studies.schedule import Outcomes, Schedule, TableRow
from megatron_cca.lab.studies.study import BASE, Method, Study, cost_of_run, passes_of_run
from megatron_cca.lab.studies.tasks import FINISHED, Sampling

_DIAGNOSTIC = "positive_log_ratio"
_KEYS = {
    "objective.beta": "β",
    "objective.negative_weight": "λ",
    "objective.alpha": "α",
    "objective.sft_weight": "sft",
    "sampling.guidance_scale": "s",
    "drawing.guidance_scale": "s of drawing",
    "sampling.temperature": "T",
}
_AXES = {
    "objective.beta": "β",
    "objective.negative_weight": "λ (negative_weight)",
    "objective.alpha": "α",
    "objective.sft_weight": "weight of the likelihood term",
    "sampling.guidance_scale": "guidance scale s",
    "drawing.guidance_scale": "guidance scale s of drawing",
    "sampling.temperature": "temperature",
    "optimizer.lr": "learning rate",
}
_LOWER_IS_BETTER = {"fid", "sfid", "kid"}
# name -> (heading, decimals), in the order of the tables.
METRICS = {
    "accuracy": ("accuracy", 3),
    "inception_score": ("IS", 2),
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "reward": ("reward", 4),
    "positive_log_ratio": ("log-ratio", 2),
}


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
        row: the row of the schedule.
        seeds: metrics of each seed that finished; ``positive_log_ratio`` is the mean over a run's last ten steps.
        statistics: mean and standard deviation of each metric over those seeds.
        failed: seed -> reason, for the seeds that did not finish.
        collapsed: seeds whose FID is more than ``collapse`` times their base's.
        passes: cost of its training.
    """

    row: TableRow
    seeds: dict[int, dict[str, float]]
    statistics: dict[str, Statistic]
    failed: dict[int, str]
    collapsed: list[int]
    passes: int

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


def collect(study: Study, schedule: Schedule, outcomes: Outcomes) -> Results:
    """Collect the results of a finished study.

    Args:
        study: the study.
        schedule: the schedule with all settings chosen.
        outcomes: the outcome of each task.
    """
    base = next(row for row in schedule.rows if row.method.name == BASE)
    base_fid = {one.seed: _metrics(outcomes, one).get("fid") for one in base.samplings}
    rows = [_result(study, row, outcomes, base_fid) for row in schedule.rows]
    trials = {
        name: [_trial(outcomes, values, sampling, schedule.chosen.get(name)) for values, sampling in tried]
        for name, tried in schedule.trials.items()
    }
    return Results(study, rows, trials)


def _metrics(outcomes: Outcomes, sampling: Sampling) -> dict[str, float]:
    outcome = outcomes(sampling)
    if outcome["status"] != FINISHED:
        return {}
    numbers = {key: value for key, value in outcome.items() if isinstance(value, float) and key != "seconds"}
    logged = outcomes(sampling.after).get(f"last_{_DIAGNOSTIC}") if sampling.after is not None else None
    return numbers if logged is None else {**numbers, _DIAGNOSTIC: logged}


def _result(study: Study, row: TableRow, outcomes: Outcomes, base_fid: Mapping[int, float | None]) -> Result:
    seeds = {one.seed: _metrics(outcomes, one) for one in row.samplings}
    finished = {seed: metrics for seed, metrics in seeds.items() if metrics}
    limit = study.settings.collapse
    return Result(
        row=row,
        seeds=finished,
        statistics=over_seeds(list(finished.values())),
        failed={one.seed: outcomes(one)["reason"] for one in row.samplings if not seeds[one.seed]},
        collapsed=[seed for seed, one in finished.items() if one["fid"] > limit * (base_fid[seed] or float("inf"))],
        passes=passes_of_run(row.run),
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
        "forwards_per_token": result.row.run.sampling.forwards_per_token,
        "training_passes": result.passes,
        "seeds": result.seeds,
        "mean": {name: one.mean for name, one in result.statistics.items()},
        "std": {name: one.std for name, one in result.statistics.items()},
        "failed": result.failed,
        "collapsed": result.collapsed,
    }


def key_name(key: str) -> str:
    """Return the short name of a key: ``objective.beta`` is β, ``optimizer.lr`` is lr."""
    return _KEYS.get(key, key.rpartition(".")[2])


def axis_name(key: str) -> str:
    """Return the label of a key's axis."""
    return _AXES.get(key, key.rpartition(".")[2])


def value_name(value: Any) -> str:
    """Format a value, numbers as short as possible."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_name(values: Mapping[str, Any]) -> str:
    """Format settings, such as "β 0.15, lr 0.002"."""
    return ", ".join(f"{key_name(key)} {value_name(value)}" for key, value in values.items())


def table(results: Results) -> str:
    """Return the text of ``table.md``."""
    settings = results.study.settings
    parts = [f"# {settings.title or settings.name}", _about(results.study)]
    parts.append(f"## Chosen on seed {settings.tuning_seed}, reported on seeds {_listed(settings.seeds)}")
    parts.append(_table(results, [result for result in results.rows if result.row.is_chosen]))
    swept = [result for result in results.rows if not result.row.is_chosen]
    if swept:
        parts += ["## Sweeps, the other settings as chosen", _table(results, swept)]
    if settings.compare is not None:
        parts += _verdicts(results, settings.compare)
    parts += [_losses(results), f"## All {settings.trials} trials of each method, seed {settings.tuning_seed}"]
    parts.append(_trials(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _about(study: Study) -> str:
    settings = study.settings
    tuning = settings.tuning_samples or settings.samples
    return (
        f"Mean (standard deviation) of {len(settings.seeds)} seeds, {settings.samples} images each. Every method was "
        f"tried at {settings.trials} settings on seed {settings.tuning_seed} ({tuning} images each); the best by "
        f"{METRICS[settings.tune_by][0]} is reported. {_costs(study)} A run counts as collapsed if its FID is more "
        f"than {settings.collapse:g} x its base's on the same seed. The log-ratio is that of matched pairs, policy - "
        "reference, in nats per image, mean of the last ten steps. Guidance scale s as in (1 + s) cond - s uncond."
    )


def _costs(study: Study) -> str:
    trained = [method for method in study.tuned if method.config is not None]
    runs = "; ".join(f"{method.label}: {cost_of_run(method.configured(method.trials[0]))}" for method in trained)
    return f"Training costs the same for all, in passes of a row through the model (forward 1, backward 2): {runs}."


def _table(results: Results, rows: Sequence[Result]) -> str:
    names = [name for name in METRICS if any(name in result.statistics for result in results.rows)]
    head = ["method", "settings", "forwards/token", "training", *(METRICS[name][0] for name in names), "lost seeds"]
    unit = _unit(results)
    lines = [
        [
            method_name(result.row.method),
            settings_name(result.row.values),
            str(result.row.run.sampling.forwards_per_token),
            f"{result.passes / unit:.2f}",
            *(_cell(result.statistics.get(name), METRICS[name][1]) for name in names),
            _lost(result),
        ]
        for result in rows
    ]
    return markdown_table(head, lines)


def method_name(method: Method) -> str:
    """Return what tables and plots call a method. The base stands there without guidance."""
    return "base, guidance-free" if method.name == BASE else method.label


def _unit(results: Results) -> int:
    """Return the passes that count as 1 in the table.

    They are those of the first training with a contrast, or else of the first training.
    """
    trained = [result for result in results.rows if result.passes]
    contrasting = [result for result in trained if result.row.run.config.objective.contrasts]
    return (contrasting or trained)[0].passes if trained else 1


def _cell(statistic: Statistic | None, decimals: int) -> str:
    if statistic is None:
        return ""
    spread = "" if statistic.std is None else f" ({statistic.std:.{decimals}f})"
    return f"{statistic.mean:.{decimals}f}{spread}"


def _lost(result: Result) -> str:
    counts = {"collapsed": len(result.collapsed), "failed": len(result.failed)}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "0"


def _verdicts(results: Results, name: str) -> list[str]:
    """Return a heading and a table of a method's chosen settings against those of every other."""
    chosen = [result for result in results.rows if result.row.is_chosen and result.statistics]
    own = next((result for result in chosen if result.row.method.name == name), None)
    if own is None:
        return []
    names = [metric for metric in METRICS if metric in own.statistics and metric != _DIAGNOSTIC]
    head = [f"{own.row.method.label} against", *(METRICS[metric][0] for metric in names)]
    lines = [
        [method_name(result.row.method), *(_verdict(metric, own, result) for metric in names)]
        for result in chosen
        if result is not own
    ]
    explanation = (
        "The difference of the means. A verdict wants one that is larger than both standard deviations together; "
        "otherwise these seeds leave it undecided."
    )
    return [f"## {own.row.method.label} against the others", explanation, markdown_table(head, lines)]


def _verdict(metric: str, own: Result, other: Result) -> str:
    ours, theirs = own.statistics[metric], other.statistics[metric]
    difference, spread = ours.mean - theirs.mean, (ours.std or 0.0) + (theirs.std or 0.0)
    is_better = (difference < 0) == (metric in _LOWER_IS_BETTER)
    word = "undecided" if abs(difference) <= spread else "better" if is_better else "worse"
    return f"{difference:+.{METRICS[metric][1]}f} {word}"


def _losses(results: Results) -> str:
    """Return the reasons why seeds are missing from the means."""
    lines = [
        f"- {result.row.method.label} ({settings_name(result.row.values)}), seed {seed}: {reason}"
        for result in results.rows
        for seed, reason in result.failed.items()
    ]
    missing = [method.label for method in results.study.tuned if not results.of(method.name)]
    lines += [f"- {label}: none of its trials finished, so that there is nothing to report" for label in missing]
    return "\n".join(["Not in the means:", "", *lines]) if lines else ""


def _trials(results: Results) -> str:
    metrics = [name for name in METRICS if any(name in one.metrics for part in results.trials.values() for one in part)]
    head = ["method", "settings", *(METRICS[name][0] for name in metrics), ""]
    lines = [
        _trial_line(results.study.methods[name].label, one, metrics)
        for name, trials in results.trials.items()
        for one in trials
    ]
    return markdown_table(head, lines)


def _trial_line(label: str, trial: Trial, metrics: Sequence[str]) -> list[str]:
    single = {name: Statistic(value, None) for name, value in trial.metrics.items()}
    cells = [_cell(single.get(name), METRICS[name][1]) for name in metrics]
    remark = "chosen" if trial.is_chosen else trial.failed or ""
    return [label, settings_name(trial.values), *cells, remark]
