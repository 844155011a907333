"""Report a run to MLflow. Its own variables say where and how, such as MLFLOW_TRACKING_URI."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from itertools import batched
from pathlib import Path

from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict
from megatron_cca.errors import shortened
from megatron_cca.models import explicit
from megatron_cca.training.run_log import EVENTS_FILE
from megatron_cca.training.trackers import ALERTS, FAILED, FINISHED, STOPPED, keep_id, known_id

_NAME = "mlflow"
_STATUS = {FINISHED: "FINISHED", FAILED: "FAILED", STOPPED: "KILLED"}
# MLflow's limits: parameters of a call, and letters of a parameter's and of a tag's value.
_PARAMS, _PARAM_LENGTH, _TAG_LENGTH = 100, 6000, 5000
# They report each attempt and its traceback, before the one line that says what has failed.
_CHATTY = {"mlflow": logging.CRITICAL, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}


class MlflowTracker:
    """A run of MLflow. See :class:`trackers.Tracker`.

    Args:
        config: of the run. ``logging.mlflow`` is the experiment, which is made if there is none.
    """

    def __init__(self, config: Config) -> None:
        self._folder, where = Path(config.training.output_dir).absolute(), config.logging.mlflow
        known = known_id(self._folder, _NAME, where)
        import mlflow.entities
        from mlflow.tracking import MlflowClient

        for name, level in _CHATTY.items():
            logging.getLogger(name).setLevel(level)
        self._entities, self._client = mlflow.entities, MlflowClient()
        self._run_id = self._continued(known) or self._begun(where, config)
        keep_id(self._folder, _NAME, where, self._run_id)

    def _continued(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            # The server may be another one by now, and somebody may have removed the run.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run_id

    def _begun(self, experiment: str, config: Config) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run_id = self._client.create_run(number, run_name=self._folder.name).info.run_id
        params = [
            self._entities.Param(name, shortened(text, _PARAM_LENGTH))
            for name, text in _flat(config_to_dict(explicit(config)))
        ]
        for some in batched(params, _PARAMS):
            self._client.log_batch(run_id, params=list(some))
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        now = time.time_ns() // 10**6
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def picture(self, step: int, name: str, file: Path) -> None:
        """Log a picture as an artifact, in a folder of its name."""
        self._client.log_artifact(self._run_id, str(file), name)

    def event(self, event: str, line: str, details: Mapping[str, object]) -> None:
        """Set a tag to the newest event of its kind. What is urgent also sends ``events.jsonl``."""
        text = shortened(line or json.dumps(details), _TAG_LENGTH)
        self._client.set_tag(self._run_id, f"event.{event}", text)
        if event in ALERTS:
            self._send_events()

    def close(self, how: str) -> None:
        """Send ``events.jsonl``, and set how the run ended."""
        self._send_events()
        self._client.set_terminated(self._run_id, _STATUS[how])

    def _send_events(self) -> None:
        path = self._folder / EVENTS_FILE
        if path.exists():
            self._client.log_artifact(self._run_id, str(path))


def _flat(tree: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, str]]:
    """Yield ``section.key`` and the value as text. A text stays as it is; the rest is JSON."""
    for section, keys in tree.items():
        for name, value in keys.items():
            yield f"{section}.{name}", value if isinstance(value, str) else json.dumps(value)
