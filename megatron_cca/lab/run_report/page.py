"""Fill the page of a run's report. What it shows is inside the file: no script, no font, nothing to load."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from megatron_cca import __version__
from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import reason_of
from megatron_cca.lab.planner.report import as_yaml
from megatron_cca.lab.run_report import ReportOptions
from megatron_cca.lab.run_report.curves import Drawn, draw_curves, last_value
from megatron_cca.lab.run_report.judged import Judged, Table, read_judged
from megatron_cca.lab.run_report.prediction import predict
from megatron_cca.lab.run_report.run_folder import RunFolder, read_run

_TEMPLATE = Path(__file__).with_name("page.html")
# Pictures of a longer run are thinned out evenly.
_MOST_PICTURES = 12
# Larger pictures are kept as JPEG of at most this width, so that the page can be sent by mail.
_MOST_BYTES, _MOST_WIDTH = 400_000, 1_600
_MOST_EVENTS = 400
# Events that a reader should see first.
_BAD = {"alarm", "failed", "hang", "logs_lost", "output_lost", "save_failed", "skipped_step", "forks", "stopped"}
_MARKED = {"resumed", "alarm", "skipped_step"}


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page, and what it is."""

    value: str
    about: str


@dataclass(frozen=True)
class Picture:
    """A picture: its title, and its file as a data URI."""

    title: str
    uri: str


@dataclass(frozen=True)
class EventRow:
    """An event as the page shows it."""

    time: str
    rank: str
    event: str
    details: str
    is_bad: bool


def page(options: ReportOptions) -> str:
    """Read a run and what was said about it, and return the page.

    Raises:
        UserError: what cannot be read; names the file, folder or option.
    """
    run = read_run(options.run)
    judged = read_judged(options.evaluation, options.run)
    marks = sorted({int(one["step"]) for one in run.events if one["event"] in _MARKED and "step" in one})
    curves, constant = draw_curves(run.metrics, marks)
    state, is_good = run.state()
    events = _events(run.events)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.folder.resolve().name,
        folder=str(run.folder),
        state=state,
        is_good=is_good,
        about=_about(run),
        tiles=_tiles(run),
        curves=[Picture(one.title, _svg_uri(one)) for one in curves],
        has_marks=bool(marks),
        constant={name: f"{value:.6g}" for name, value in constant.items()},
        pictures=_pictures(run),
        num_pictures=len(run.pictures),
        judged=[(one, _judged_pictures(one)) for one in judged],
        is_table=lambda part: isinstance(part, Table),
        prediction=predict(run, options),
        bad_events=[one for one in events if one.is_bad][:_MOST_EVENTS],
        events=events[:_MOST_EVENTS],
        num_events=len(events),
        changed=_changed(run.config),
        config_problem=run.config_problem,
        config_text=run.config_text,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _about(run: RunFolder) -> list[str]:
    began, wall = run.beginning, run.wall_time()
    found = []
    if run.config is not None:
        found.append(f"{run.config.objective.name} on {run.config.model.name}, {run.config.training.precision}")
    if "world_size" in began:
        found.append(f"{began['world_size']} process(es) on {began.get('device', began.get('host', '?'))}")
    if "time" in began:
        found.append(f"begun {str(run.events[0].get('time', ''))[:16].replace('T', ' ')} UTC")
    if wall is not None:
        found.append(f"{str(wall).partition('.')[0]} from the first event to the last")
    if "code" in began:
        found.append(f"megatron_cca {began['code']}")
    return found


def _tiles(run: RunFolder) -> list[Tile]:
    planned = "" if run.config is None else f" of {run.config.training.train_iters:,}"
    tiles = [Tile(f"{run.steps:,}{planned}", "steps")]
    for name, about, form in (
        ("loss", "loss", "{:.4g}"),
        ("validation_loss", "loss, held out", "{:.4g}"),
        ("positive_log_ratio", "log-ratio, matched", "{:+.3g}"),
        ("negative_log_ratio", "log-ratio, mismatched", "{:+.3g}"),
        ("accuracy", "pairs told apart", "{:.1%}"),
    ):
        value = last_value(run.metrics, name)
        if value is not None:
            tiles.append(Tile(form.format(value), f"{about}, last 10"))
    if run.seconds_a_step is not None:
        speed = run.config.training.global_batch_size / run.seconds_a_step
        tiles.append(Tile(f"{speed:,.3g}", "samples a second (median)"))
    if run.peak_memory_gib is not None:
        tiles.append(Tile(f"{run.peak_memory_gib:.2f} GiB", "peak memory, rank 0"))
    return tiles


def _changed(config: Config | None) -> str:
    return "" if config is None else as_yaml(config, config, [])


def _events(events: Sequence[dict[str, Any]]) -> list[EventRow]:
    usual = ("time", "event", "rank", "restart")
    return [
        EventRow(
            str(one.get("time", ""))[:19].replace("T", " "),
            str(one.get("rank", "")),
            one["event"],
            ", ".join(f"{name} {value}" for name, value in one.items() if name not in usual),
            one["event"] in _BAD,
        )
        for one in events
    ]


def _pictures(run: RunFolder) -> list[Picture]:
    steps = list(run.pictures)
    if len(steps) > _MOST_PICTURES:
        last = len(steps) - 1
        steps = [steps[round(place * last / (_MOST_PICTURES - 1))] for place in range(_MOST_PICTURES)]
    return [Picture(f"after {step:,} steps", _picture_uri(run.pictures[step])) for step in steps]


def _judged_pictures(judged: Judged) -> list[Picture]:
    return [Picture(path.stem, _picture_uri(path)) for path in judged.pictures]


def _svg_uri(drawn: Drawn) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.svg).decode()}"


def _picture_uri(path: Path) -> str:
    """Return a PNG file as a data URI; a large one as JPEG.

    Raises:
        UserError: no picture; names the file.
    """
    content, kind = path.read_bytes(), "png"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) > _MOST_BYTES:
                image.thumbnail((_MOST_WIDTH, 20 * _MOST_WIDTH))
                target = io.BytesIO()
                image.convert("RGB").save(target, "JPEG", quality=88)
                content, kind = target.getvalue(), "jpeg"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: is no picture ({reason_of(error)}); remove it") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
