"""Report a run to Weights & Biases. Its own variables say where and how, such as WANDB_MODE=offline."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict
from megatron_cca.models import explicit
from megatron_cca.training.run_log import EVENTS_FILE, LOGGER
from megatron_cca.training.trackers import ALERTS, FAILED, STOPPED, keep_id, known_id

_NAME = "wandb"
# Without a network it would wait for ever, also when the process ends.
_SECONDS_TO_FINISH = 45.0


class WandbTracker:
    """A run of Weights & Biases, whose files lie in ``<output_dir>/wandb``. See :class:`trackers.Tracker`.

    Every value is logged over the metric ``step``, and not over their own count of calls: they drop what is logged for
    a step before their last one, and a run that continues takes some steps again.

    Args:
        config: of the run. ``logging.wandb`` is the project, or the entity and the project.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        self._wandb, self._folder = wandb, Path(config.training.output_dir).absolute()
        where = config.logging.wandb
        entity, _, project = where.rpartition("/")
        known = known_id(self._folder, _NAME, where)
        settings = wandb.Settings(
            console="off",
            # Nothing is printed, and nobody is asked for a key on a terminal.
            silent=True,
            finish_timeout=_SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            stop_fn=_refuse_to_stop,
        )
        wandb.setup(settings)
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            id=known or uuid.uuid4().hex[:12],
            resume="allow",
            name=self._folder.name,
            dir=self._folder,
            # Also where a run continues: its part that was recorded offline must stand on its own.
            config=config_to_dict(explicit(config)),
            allow_val_change=True,
            settings=settings,
        )
        keep_id(self._folder, _NAME, where, self._run.id)
        self._run.define_metric("*", step_metric="step")
        self._save_events()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step over ``step``."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, file: Path) -> None:
        """Log a picture, copied as it is."""
        self._run.log({"step": step, name: self._wandb.Image(str(file))})

    def event(self, event: str, line: str, details: Mapping[str, object]) -> None:
        """Send an alert for what is urgent, and see to it that ``events.jsonl`` is there."""
        if event in ALERTS:
            text = line or ", ".join(f"{name}: {value}" for name, value in details.items())
            self._run.alert(event, text, level=self._wandb.AlertLevel.WARN, wait_duration=0)
        self._save_events()

    def close(self, how: str) -> None:
        """Wait until all has been written, or sent."""
        if how == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(how in (FAILED, STOPPED)))
        self._wandb.teardown()

    def _save_events(self) -> None:
        path = self._folder / EVENTS_FILE
        if path.exists():
            # A link to the file, which is sent again whenever it grows.
            self._run.save(str(path), base_path=str(self._folder), policy="live")


def _refuse_to_stop() -> None:
    LOGGER.info("logging.wandb: was asked to stop this run, which goes on; send SIGTERM to save it and stop")
