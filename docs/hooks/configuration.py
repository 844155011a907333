"""Write the configuration reference from the dataclasses; ``make docs`` calls it."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from megatron_cca.config import Config
from megatron_cca.keys import Effect, effects
from megatron_cca.models import FAMILIES
from megatron_cca.objectives import OBJECTIVES, Objective, PairObjective
from megatron_cca.objectives.base import keys_of, known_names

_INTRODUCTION = """# Configuration reference

<!-- Written by docs/hooks/configuration.py from megatron_cca/config/schema.py and, for objective, from the classes in
     megatron_cca/objectives/; change it there, then `make docs`. -->

A run is one YAML file with these sections, each key of which but `data.path` may be left out, and overrides on the
command line:

    torchrun examples/pretrain_cca_emu3.sh --config my.yaml --set optimizer.lr=2.0e-5 --set training.train_iters=500

The value of an override is YAML. Of a key that holds text it is taken as typed, whatever characters it has: quotes are
part of it, `007` and `yes` are text. Where the key may be null, `null` and nothing at all are null; where it may be a
mapping, `{{...}}` is YAML. Unquoted text in the file is text in the same way.

One rule holds for paths in the file, in overrides and in the options of all programs: `~` and `~name` at the start are
a home folder, and everything else is taken as typed. A shell variable such as `$HOME` is not replaced; it is refused
unless something of that very name exists. (An unquoted `~` alone is null in a YAML file; write `~/`.)

Names are Megatron-Core's own where Megatron has the thing; keys without a note mean what their name says. A mistyped
key, a wrong type or an impossible combination is refused in one line, before any process group is made. `config.yaml`
in the run's folder has every key with the value that it had, sizes of the preset included.

The column *affects* says what changes with the value of a key:

- *numbers*: losses and weights;
- *last bits*: their rounding alone, since the same numbers are summed in another order;
- *speed*: memory and time alone;
- *output*: what is written and said, and when a run is ended.

A † marks a key on which the log-probabilities of the reference depend. A reference cache serves only runs with the same
values of these *numbers*. Where the values of these *last bits* differ, the gate on step 0 allows a small log-ratio
(`reference.allow_bias`).

The column *on a resume* says what happens to a new value when a run continues:

- it *takes effect* with the next step;
- it takes effect and leaves the *same numbers*;
- it is *refused*, since the key says which run this is.

The sections: {sections}.
"""
_TYPES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "path": "path",
    "boolean": "true or false",
    "null": "null",
}
_COMMON = [field.name for field in dataclasses.fields(Objective)]
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main(output: str) -> None:
    """Write the page, where it differs."""
    path, text = Path(output), page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def page() -> str:
    """The whole page as Markdown."""
    schema = TypeAdapter(Config).json_schema()
    objective = TypeAdapter(Objective).json_schema()
    objective["properties"]["name"]["enum"] = known_names()
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    links = ", ".join(f"[`{name}`](#{name})" for name in sections)
    parts, declared = [_INTRODUCTION.format(sections=links)], effects(Config())
    for name, section in sections.items():
        reference = schema["properties"][name].get("$ref", "").rpartition("/")[2]
        parts.append(_section(name, schema["$defs"][reference] if reference else objective, section(), declared))
        if not reference:
            parts += map(_objective, known_names())
    return "\n".join([*parts, _presets()])


def _presets() -> str:
    presets = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
    rows = [f"| `model.name` | {' | '.join(f'`{name}`' for name in presets)} |", "|---|" + "---|" * len(presets)]
    sizes = [field.name for field in dataclasses.fields(next(iter(presets.values()))) if field.name != "vocabulary"]
    for size in sizes:
        values = (getattr(one, size) for one in presets.values())
        rows.append(f"| `{size}` | {' | '.join(map(_written, values))} |")
    rows.append(f"| `vocab_size` | {' | '.join(f'{one.vocabulary.size:,}' for one in presets.values())} |")
    return "## Presets\n\n" + "\n".join(rows) + "\n"


def _written(size: str | float | tuple[int, ...]) -> str:
    if isinstance(size, tuple):
        return ", ".join(map(str, size)) or "none"
    return size if isinstance(size, str) else f"{size:,}"


def _objective(name: str) -> str:
    kind = OBJECTIVES[name]
    # A class has no docstrings of the keys that it inherits.
    own, inherited = (TypeAdapter(one).json_schema()["properties"] for one in (kind, PairObjective))
    about = sys.modules[kind.__module__].__doc__.partition("\n")[0]
    declared = effects(dataclasses.replace(Config(), objective=kind()))
    own_keys = {key: inherited.get(key, own[key]) for key in keys_of(name) if key not in _COMMON}
    rows = _table("objective", own_keys, kind(), declared)
    return f"### {name}\n\n{about}" + (f"\n\n{rows}" if rows else " It has no key of its own.\n")


def _section(name: str, schema: dict[str, Any], defaults: Any, declared: dict[str, Effect]) -> str:
    about = _prose(schema.get("description", "")).removeprefix(f"Section `{name}`").strip(" :.")
    about = f"{about[:1].upper()}{about[1:]}.\n\n" if about else ""
    return f"## {name}\n\n{about}" + _table(name, schema["properties"], defaults, declared)


def _table(section: str, properties: dict[str, Any], defaults: Any, declared: dict[str, Effect]) -> str:
    rows = ["| key | type | default | affects | on a resume | |", "|---|---|---|---|---|---|"]
    for key, one in properties.items():
        default = yaml.safe_dump(getattr(defaults, key), default_flow_style=True, width=200)
        shown = default.replace("\n...", "").strip()
        effect = declared[f"{section}.{key}"]
        affects = f"{effect.affects.value} †" if effect.reference else effect.affects.value
        cells = [f"`{key}`", _type(one), f"`{shown}`", affects, effect.resume.value, _prose(one.get("description", ""))]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n" if properties else ""


def _prose(docstring: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(docstring.split()))


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    match schema.get("format", schema["type"]):
        case "array":
            size = f"{schema['minItems']} x " if schema.get("minItems") == schema.get("maxItems", -1) else ""
            return f"list of {size}{_type(schema['items'])}"
        case "object":
            return f"path: {_type(schema['additionalProperties'])}"
        case kind:
            return f"{_TYPES[kind]} {bounds}".strip()


if __name__ == "__main__":
    main(sys.argv[1])
