"""A configuration as a YAML file that people read: only what differs from the defaults, and who chose it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict

_WIDTH = 118


def as_yaml(config: Config, before: Config, head: Sequence[str]) -> str:
    """The text; :func:`load_config` reads the same configuration from it.

    Args:
        config: the run.
        before: what it was planned from; keys that differ are marked.
        head: lines above it, without the comment sign.
    """
    # A file that does not name its objective has the default one; the other defaults are this objective's own.
    usual = replace(Config(), objective=type(config.objective)())
    defaults, given = config_to_dict(usual), config_to_dict(before)
    defaults["objective"]["name"] = Config().objective.name
    lines = [f"# {line}".rstrip() for text in head for line in textwrap.wrap(text, _WIDTH - 2) or [""]]
    for section, keys in config_to_dict(config).items():
        different = {key: value for key, value in keys.items() if value != defaults[section][key]}
        if not different:
            continue
        comment = "  # sizes written out: weights of another model are refused" if section == "model" else ""
        lines.append(f"{section}:{comment}")
        for key, value in different.items():
            mark = _mark(section, key, value != given[section][key])
            lines.append(f"  {_entry(key, value)}{mark}")
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any) -> str:
    """On one line, whatever it is."""
    in_a_list = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=False)
    return f"{key}: {in_a_list.strip()[1:-1]}"


def _mark(section: str, key: str, is_planned: bool) -> str:
    if not is_planned or section == "model":
        return ""
    if (section, key) == ("reference", "cache"):
        return "  # compute it beforehand: tools/cache_reference.py"
    return "  # planned"
