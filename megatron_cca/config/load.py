"""Read a configuration from strict YAML and command-line overrides, and turn it back into plain data.

The types of the dataclasses say which keys hold text. Nothing here imports torch or Megatron, so that a mistyped key is
refused in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_cca.config import former
from megatron_cca.config.schema import TYPED, Config
from megatron_cca.errors import UserError
from megatron_cca.io.options import wanted
from megatron_cca.objectives.base import inherited

NULL = "must be text, found null; an unquoted ~ is null in YAML, the home folder is ~/"
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}

_TEXT = "tag:yaml.org,2002:str"
# The types that YAML may give to unquoted text, except null.
_TAKEN_FOR = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "merge", "timestamp", "value")}
_NONE = ("", "null")
# The most YAML nodes of a file, with all aliases expanded. A configuration has a few hundred.
_MAX_NODES = 10_000


@dataclasses.dataclass(frozen=True)
class KeysOf:
    """The mark of a dict from ``section.key`` of a configuration to a value of that key, or to a list of values."""

    kind: type


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides in order.

    Args:
        path: the file. None means the defaults.
        overrides: strings such as ``training.train_iters=10``. The value is YAML. For a key that holds text, it is
            taken as typed. Paths follow the rule of ``io/paths.py``. If ``objective.name`` is overridden, keys of
            the file that the new objective does not have are dropped.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or a value out of range. The message is one line.
    """
    tree = {}
    if path is not None:
        read = read_yaml(Path(path), "--config", f"sections {', '.join(SECTIONS)}", Config)
        tree = {section: {} if keys is None else keys for section, keys in read.items()}
    changes: dict[str, dict] = {}
    for override in overrides:
        section, name, value = _parsed_override(override)
        changes.setdefault(section, {})[name] = value
    for section, keys in changes.items():
        before = tree.get(section, {})
        if not isinstance(before, dict):
            raise UserError(f"{section}: expected keys below this section, found {before!r}")
        if section == "objective" and "name" in keys:
            before = inherited(before, keys["name"])
        tree[section] = {**before, **keys}
    return config_from_dict(tree, typed=True)


def config_from_dict(tree: Mapping[str, Any], *, typed: bool = False) -> Config:
    """Return the :class:`Config` of nested plain data. A :class:`UserError` names the first bad key.

    Args:
        tree: section -> key -> value.
        typed: whether a person typed it. Paths then follow the rule of ``io/paths.py``. Otherwise a run wrote it,
            and only keys that former versions wrote and that its objective does not have are dropped.
    """
    if not typed:
        tree = former.with_own_objective_keys(tree)
    try:
        # Strict mode accepts plain data for a nested dataclass only as JSON.
        return TypeAdapter(Config).validate_json(as_json(tree), context=TYPED if typed else None)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain data, the inverse of :func:`config_from_dict`."""
    return dataclasses.asdict(config)


def read_yaml(path: Path, option: str, expected: str, kind: type) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds. An empty file gives an empty mapping.

    Args:
        path: the file.
        option: the option that names the file, for messages.
        expected: what the file should hold, for messages.
        kind: the dataclass that the file is for. If a key holds text, its unquoted value is text: ``007`` and ``1e5``
            are not numbers there, and ``yes`` is not a boolean. null stays null.

    Raises:
        UserError: the file cannot be read, is not YAML, gives a key twice, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: not valid YAML: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}; give a YAML file") from None
    tree = _parsed(text, f"{option} {path}: not valid YAML", kind)
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{option} {path}: expected {expected}, found a {type(tree).__name__}")
    return tree or {}


def as_json(tree: Any) -> str:
    """Return plain data as JSON. A date that YAML has read becomes a string again.

    Raises:
        UserError: a key is not text, a number has thousands of digits, or the nesting is too deep.
    """
    try:
        return json.dumps(tree, default=str)
    except RecursionError:
        raise UserError("nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"holds what no configuration has: {error}") from None


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


class _Loader(yaml.SafeLoader):
    """A safe YAML loader. ``1e-5`` is a number, as in YAML 1.2. Keys given twice and aliases that grow are refused."""

    def __init__(self, stream: str, kind: Any) -> None:
        super().__init__(stream)
        self._kind = kind
        self._sizes: dict[int, int] = {}

    def get_single_node(self) -> yaml.Node | None:
        return texts_as_typed(super().get_single_node(), self._kind)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if not is_alias:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        # An alias of a node that contains it finds no size yet.
        if self._sizes.get(id(node), _MAX_NODES + 1) > _MAX_NODES:
            raise yaml.composer.ComposerError(None, None, "it holds too much, or an alias of itself", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {sorted(map(str, twice))[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parsed(text: str, problem: str, kind: Any) -> Any:
    try:
        return yaml.load(text, Loader=functools.partial(_Loader, kind=kind))  # noqa: S506 - _Loader is a SafeLoader
    except RecursionError:
        raise UserError(f"{problem}: nested too deeply") from None
    # PyYAML's conversions of tagged text, such as dates, may raise any exception.
    except Exception as error:
        raise UserError(f"{problem}: {' '.join(str(error).split())}") from None


def _parsed_override(override: str) -> tuple[str, str, Any]:
    """Split ``section.key=value`` and parse the value."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"--set {override}: expected section.key=value, such as training.train_iters=10")
    kind = key_kind(Config, key.strip())
    value = override_value(text, kind, lambda: _parsed(text, f"--set {override}: the value is not valid YAML", kind))
    return section, name, value


def _one_line(error: ValidationError) -> str:
    errors = error.errors()
    # A union such as `str | Blend` reports one error for each branch. The user meant the branch that got farthest.
    of_first_key = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    first = max(of_first_key, key=lambda one: (one["type"] == "value_error", len(one["loc"])))
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "value_error":
        return f"{'.'.join(location[:2])}: {first['ctx']['error']}"
    if first["type"] == "string_type" and first["input"] is None:
        return f"{'.'.join(location[:2])}: {NULL}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: {_unknown(location)}"
    if first["type"] == "no_such_key":
        # By 0.6, the default, keys that only end in _weight are close.
        close = difflib.get_close_matches(location[-1], first["ctx"]["known"], n=1, cutoff=0.65)
        known = f"did you mean {location[0]}.{close[0]}?" if close else f"it has {', '.join(first['ctx']['known'])}"
        return f"{key}: {first['msg']}; {known}"
    if first["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}: expected keys below this section, found {first['input']!r}"
    # A union adds the branch that it tried to the location. The user knows only section, key, and what is below.
    return f"{'.'.join(location[:2] + location[3:])}: {wanted(first)}, found {first['input']!r}"


def _unknown(location: list[str]) -> str:
    key = ".".join(location)
    if key in former.RENAMED:
        return f"is called {former.RENAMED[key]} now; rename it"
    if key in former.DROPPED:
        return f"is no key any more; {former.DROPPED[key]}"
    return f"unknown key; {_suggestion(location)}"


def _suggestion(location: list[str]) -> str:
    section = SECTIONS.get(location[0]) if len(location) > 1 else None
    known = [field.name for field in dataclasses.fields(section)] if section else list(SECTIONS)
    prefix = f"{location[0]}." if section else ""
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known here: {', '.join(known)}"


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
