"""The table.md of a study: chosen settings, sweeps, all trials, costs; and the names of keys and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cca.lab.studies.results import Result, Results, Statistic, Trial
from megatron_cca.lab.studies.study import BASE, Study, units_per_sample
from megatron_cca.lab.tables import markdown_table

_KEYS = {
    "objective.beta": "β",
    "objective.negative_weight": "λ",
    "sampling.guidance_scale": "s",
    "sampling.temperature": "T",
}
_AXES = {
    "objective.beta": "β",
    "objective.negative_weight": "λ (negative_weight)",
    "sampling.guidance_scale": "guidance scale s",
    "sampling.temperature": "temperature",
    "optimizer.lr": "learning rate",
}
# name -> (heading, decimals), in the order of the tables.
METRICS = {
    "accuracy": ("accuracy", 3),
    "inception_score": ("IS", 2),
    "fid": ("FID", 2),
    "sfid": ("sFID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "positive_log_ratio": ("log-ratio", 2),
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
    runs = "; ".join(
        f"{method.label}: {method.config.training.train_iters} x {method.config.training.global_batch_size} x "
        f"{units_per_sample(method.config)}"
        for method in trained
    )
    return f"Training costs the same for all, in steps x samples x passes (forward 1, forward and backward 3): {runs}."


def _table(results: Results, rows: Sequence[Result]) -> str:
    names = [name for name in METRICS if any(name in result.statistics for result in results.rows)]
    head = ["method", "settings", "forwards/token", "training", *(METRICS[name][0] for name in names), "lost seeds"]
    unit = _unit(results)
    lines = [
        [
            "base, guidance-free" if result.row.method.name == BASE else result.row.method.label,
            settings_name(result.row.values),
            str(result.row.point.sampling.forwards_per_token),
            f"{result.units / unit:.2f}",
            *(_cell(result.statistics.get(name), METRICS[name][1]) for name in names),
            _lost(result),
        ]
        for result in rows
    ]
    return markdown_table(head, lines)


def _unit(results: Results) -> int:
    """Return the passes that count as 1 in the table.

    They are those of the first training with a contrast, or else of the first training.
    """
    trained = [result for result in results.rows if result.units]
    contrasting = [result for result in trained if result.row.point.config.objective.contrasts is not None]
    return (contrasting or trained)[0].units if trained else 1


def _cell(statistic: Statistic | None, decimals: int) -> str:
    if statistic is None:
        return ""
    spread = "" if statistic.std is None else f" ({statistic.std:.{decimals}f})"
    return f"{statistic.mean:.{decimals}f}{spread}"


def _lost(result: Result) -> str:
    counts = {"collapsed": len(result.collapsed), "failed": len(result.failed)}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "0"


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
