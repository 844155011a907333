"""Keep the value of a key that holds text as typed, so that it becomes no number, date or boolean.

The types of the dataclasses say which keys hold text. Nothing here imports torch or Megatron.
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
# The types that YAML may give to unquoted text, except null.
_TAKEN_FOR = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "merge", "timestamp", "value")}
_NONE = ("", "null")


@dataclasses.dataclass(frozen=True)
class KeysOf:
    """The mark of a dict from ``section.key`` of a configuration to a value of that key, or to a list of values."""

    kind: type


def key_kind(kind: type, dotted: str) -> Any:
    """Return the type of ``section.key`` in a dataclass of dataclasses. Return None if there is no such key."""
    section, _, name = dotted.partition(".")
    section_kind = next(_members(_hints(kind).get(section)), None)
    return _hints(section_kind).get(name) if dataclasses.is_dataclass(section_kind) else None


def override_value(text: str, kind: Any, parse: Callable[[], Any]) -> Any:
    """Return the value that the text after ``section.key=`` stands for.

    Args:
        text: for a key that holds text, the value with all its characters. But "null" and the empty text are None if
            the key may be None, and ``{...}`` is YAML if the key may be a mapping.
        kind: the key's type.
        parse: reads the text as YAML, for all other keys.

    Raises:
        UserError: the text is not UTF-8, as a YAML file must be, or ``parse`` refuses it.
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
    """Return a YAML tree in which unquoted scalars are text wherever a type wants text. null stays null.

    Args:
        node: the tree of the file. It is changed in place.
        kind: a dataclass, or the type of one of its fields. None means that the type is unknown.
    """
    members = list(_members(kind))
    if isinstance(node, yaml.ScalarNode) and str in members and node.style is None and node.tag in _TAKEN_FOR:
        # A new node, since an alias of the old one may be the value of a key that holds a number.
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
    """Return the types of a dataclass's fields. If a key chooses the class of a section, include all its classes."""
    found: dict[str, Any] = {}
    for one in (*kind.__subclasses__(), kind):
        found |= _own_hints(one)
    return found


@functools.cache
def _own_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _members(kind: Any) -> Iterator[Any]:
    """Yield the members of a union, or the type itself. Annotations are dropped, except for :class:`KeysOf`."""
    if get_origin(kind) is Annotated:
        marks = [mark for mark in kind.__metadata__ if isinstance(mark, KeysOf)]
        yield from marks or _members(kind.__origin__)
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _members(one)
    elif kind is not None:
        yield kind
