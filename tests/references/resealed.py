"""Make a checkpoint whose files were changed on purpose look whole again, so that a later check meets the change."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_cca.checkpoint import layout


def reseal(folder: Path, change=lambda summary: summary) -> None:
    """Record the files that are there now, apply ``change`` to the summary, and seal it."""
    path = folder / layout.SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    summary.pop("checksum", None)
    path.unlink(missing_ok=True)
    summary["files"] = layout.file_records(folder, {})
    path.write_text(layout.sealed(change(summary)))
