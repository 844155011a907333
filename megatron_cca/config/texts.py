"""Which keys hold text; what is typed there stays what was typed, and is no number, date or truth value.

The types of the dataclasses say it. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_cca.errors import UserError

_TEXT = "tag:yaml.org,2002:str"
# What YAML takes unquoted text for, null excepted.
_TAKEN_FOR = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "merge", "timestamp", "value")}
_NONE = ("", "null")


@dataclasses.dataclass(frozen=True)
class KeysOf:
    """Marks a dict whose keys are ``section.key`` of a configuration, and whose values are one or a list of such."""

    kind: type


def key_kind(kind: type, dotted: str) -> Any:
    """The type of ``section.key`` in a dataclass of dataclasses; None where there is no such key."""
    section, _, name = dotted.partition(".")
    section_kind = next(_members(_hints(kind).get(section)), None)
    return _hints(section_kind).get(name) if dataclasses.is_dataclass(section_kind) else None


def override_value(text: str, kind: Any, parse: Callable[[], Any]) -> Any:
    """The value that the text behind ``section.key=`` stands for.

    Args:
        text: of a key that holds text it is the value as it stands, whatever characters are in it. "null" and nothing
            at all are none where the key may be none; ``{...}`` is YAML where the key may be a mapping.
        kind: the key's type.
        parse: reads the text as YAML, for all other keys.

    Raises:
        UserError: text that is no UTF-8, which no YAML file can hold; what ``parse`` raises.
    """
    members = list(_members(kind))
    is_mapping = text.strip().startswith("{") and text.strip().endswith("}")
    if str not in members or (is_mapping and any(get_origin(one) is dict for one in members)):
        return parse()
    if NoneType in members and text in _NONE:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--set: {text!r} is not valid UTF-8, which a configuration must be; rename it") from None
    return text


def texts_as_typed(node: yaml.Node | None, kind: Any) -> yaml.Node | None:
    """A YAML tree in which unquoted scalars are text wherever a type wants text; null stays null.

    Args:
        node: what the file holds; it is changed.
        kind: a dataclass or a type of one of its fields; None where nothing is known.
    """
    members = list(_members(kind))
    if isinstance(node, yaml.ScalarNode) and str in members and node.style is None and node.tag in _TAKEN_FOR:
        # Another one, since an alias may stand at a key that holds a number.
        return yaml.ScalarNode(_TEXT, node.value, node.start_mark, node.end_mark)
    for member in members:
        if isinstance(node, yaml.MappingNode):
            node.value = [_pair_as_typed(key, value, member) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode) and get_origin(member) is list:
            node.value = [texts_as_typed(one, get_args(member)[0]) for one in node.value]
    return node


def _pair_as_typed(key: yaml.Node, value: yaml.Node, kind: Any) -> tuple[yaml.Node, yaml.Node]:
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return texts_as_typed(key, keys), texts_as_typed(value, values)
    name = key.value if isinstance(key, yaml.ScalarNode) else ""
    if isinstance(kind, KeysOf):
        found = key_kind(kind.kind, name)
        return key, texts_as_typed(value, list[found] if isinstance(value, yaml.SequenceNode) and found else found)
    return key, texts_as_typed(value, _hints(kind).get(name)) if dataclasses.is_dataclass(kind) else value


def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields; of a section whose class one of its keys chooses, those of all classes."""
    found: dict[str, Any] = {}
    for one in (*kind.__subclasses__(), kind):
        found |= _own_hints(one)
    return found


@functools.cache
def _own_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _members(kind: Any) -> Iterator[Any]:
    """The types that a union is of, one for any other; without what is annotated, but for :class:`KeysOf`."""
    if get_origin(kind) is Annotated:
        marks = [mark for mark in kind.__metadata__ if isinstance(mark, KeysOf)]
        yield from marks or _members(kind.__origin__)
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _members(one)
    elif kind is not None:
        yield kind
