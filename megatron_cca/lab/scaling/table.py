"""A sweep in words: ``table.md``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_cca.lab.planner import report
from megatron_cca.lab.planner.flops import MFU_MEANS
from megatron_cca.lab.scaling.records import Row
from megatron_cca.lab.scaling.series import efficiency, unit_of, units
from megatron_cca.lab.scaling.sweep import MEASURED, Sweep

_HEADER = (
    "mode",
    "{units}",
    "layout",
    "global batch",
    "s/step",
    "tokens/s/{unit}",
    "of the smallest",
    "MFU",
    "GiB",
    "communication",
    "bubble",
    "even bubble",
)


def table(sweep: Sweep, measured: Sequence[Row], planned: Sequence[Row]) -> str:
    """The whole file: measured points with their machine, planned ones with their model's error, what failed."""
    parts = [f"# Scaling: {sweep.settings.name}\n"]
    if measured:
        parts.append(f"## Measured\n\n{_measured_on(measured)}\n\n{_table(measured)}")
    if planned:
        parts.append(f"## Planned, not run\n\n{_planned_on(planned)}\n\n{_table(planned)}")
    failed = [row for row in (*measured, *planned) if not row.is_finished]
    if failed:
        lines = [f"- {row.task.kind} {row.task.title}: {row.record['reason']}" for row in failed]
        parts.append("## Without numbers\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _measured_on(rows: Sequence[Row]) -> str:
    finished = [row.record for row in rows if row.is_finished]
    if not finished:
        return "No point finished."
    days = sorted({one["date"][:10] for one in finished})
    hosts = sorted({one["host"] for one in finished})
    versions = ", ".join(f"{name} {version}" for name, version in finished[-1]["versions"].items())
    return (
        f"{_device(finished[0])}; host {', '.join(hosts)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}; "
        f"{versions}; megatron_cca {', '.join(sorted({one['code'] for one in finished}))}. Median of "
        f"{len(finished[0]['step_seconds'])} steps, in brackets the slowest and the fastest. Random weights and "
        f"tokens. {MFU_MEANS}"
    )


def _device(record: dict) -> str:
    peak = record["peak_flops"] / 1e9
    if record["device"].startswith("CPU"):
        return f"{record['device']} a process, MFU of {peak:,.0f} GFLOP/s, which a product of one process reached"
    return f"{record['device']}, MFU of {peak / 1e3:,.0f} TFLOP/s"


def _planned_on(rows: Sequence[Row]) -> str:
    return (
        f"{rows[0].task.how['gpu']}, by the planner's model (tools/plan.py); in brackets two standard deviations of "
        f"its error. {MFU_MEANS} Nobody ran these; what a cluster "
        "adds (stragglers, congestion) and its spread are those of published runs, docs/scaling.md."
    )


def _table(rows: Sequence[Row]) -> str:
    finished = [row for row in rows if row.is_finished]
    if not finished:
        return ""
    unit = unit_of(finished[0].record["device"])
    header = [name.format(unit=unit, units=units(unit)) for name in _HEADER]
    return report.table([_line(row, finished) for row in finished], header) + "\n"


def _line(row: Row, rows: Sequence[Row]) -> list[str]:
    record = row.record
    return [
        row.task.mode,
        str(record["num_gpus"]),
        record["layout"],
        f"{record['global_batch_size']:,}",
        f"{statistics.median(record['step_seconds']):.3g}",
        f"{record['tokens_per_second_per_gpu']:,.0f} ({record['low']:,.0f} to {record['high']:,.0f})",
        f"{efficiency(row, rows):.0%}",
        f"{record['mfu']:.1%}",
        f"{record['memory_gib']:.2f}" if row.task.kind == MEASURED else f"{record['memory_gib']:.1f}",
        f"{record['communication']:.1%}",
        f"{record['bubble']:.1%}",
        f"{record['ideal_bubble']:.1%}",
    ]
