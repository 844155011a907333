"""Command-line options, each defined once: a field of a dataclass, with its type, default, checks and docstring.

``programs/parsing.py`` makes the parser of such a class and ``docs/hooks/programs.py`` its page. Nothing here imports
torch or Megatron, so that ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from megatron_cca.errors import UserError
from megatron_cca.io.paths import name_option


@dataclass(frozen=True)
class Option:
    """What the field's name and type do not say of an option; written into its ``Annotated``.

    Attributes:
        metavar: what stands for the value in help texts; a name for each of several values.
        name: the spelling, if it is not the field's name; without dashes the option is a positional argument.
        values: how the values of a ``tuple[X, ...]`` are typed: the option repeated, or once before all of them, of
            which there is at least one (``+``) or may be none (``*``).
        convert: makes the value of a text; raises ``argparse.ArgumentTypeError``.
        choices: texts to choose from, where the type is no ``Literal``.
        one_of: exactly one of the options of its class that say so is to be given.
        hidden: no option: a value that only programs set.
    """

    metavar: str | tuple[str, ...] | None = None
    name: str | None = None
    values: Literal["repeated", "+", "*"] = "repeated"
    convert: Callable[[str], object] | None = None
    choices: tuple[str, ...] = ()
    one_of: bool = False
    hidden: bool = False


File = Annotated[Path, Option(metavar="FILE")]
Folder = Annotated[Path, Option(metavar="DIR")]
# A path, or a word that stands for data.
PathOrWord = Annotated[str, Option(metavar="PATH", convert=name_option)]
Overrides = Annotated[tuple[str, ...], Option(metavar="SECTION.KEY=VALUE", name="--set")]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Described:
    """A field as its option: ``kind`` is the type of one value, ``count`` is None for one, 0 for any number of values.

    ``nested`` is the options class of a field that holds further options; ``doc`` is their heading then.
    """

    field: str
    kind: Any
    count: int | None
    option: Option
    doc: str
    default: Any
    nested: type | None

    @property
    def name(self) -> str:
        """The option as a person types it."""
        return self.option.name or f"--{self.field.replace('_', '-')}"

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def help(self) -> str:
        """The docstring, and the default unless it means that the option is left out, or the docstring says it."""
        says = isinstance(self.default, (int, float, str)) and not isinstance(self.default, bool) and self.default != ""
        return f"{self.doc} (default {self.default})" if says and "(default" not in self.doc else self.doc


@dataclass_transform(frozen_default=True)
def options[T](kind: type[T]) -> type[T]:
    """Make a class a frozen dataclass of options; its values are checked as their annotations say.

    Constructing one raises :class:`UserError` for a value that its annotation forbids; the message begins with the
    option.
    """
    config = ConfigDict(use_attribute_docstrings=True, arbitrary_types_allowed=True)
    made = checked_dataclass(config=config, frozen=True)(kind)
    construct = made.__init__

    @functools.wraps(construct)
    def checked(self, *values, **named) -> None:
        try:
            construct(self, *values, **named)
        except ValidationError as error:
            raise _refusal(made, error) from None

    made.__init__ = checked
    made.has_options = True
    return made


def described(kind: type) -> Iterator[Described]:
    """Yield each option of an options class, in the order of its fields."""
    for field in dataclasses.fields(kind):
        info = kind.__pydantic_fields__[field.name]
        base, found = _unwrapped(info.annotation)
        found += (one for one in info.metadata if isinstance(one, Option))
        count, inner = None, base
        if get_origin(base) is tuple:
            count = 0 if get_args(base)[-1] is Ellipsis else len(get_args(base))
            inner, of_values = _unwrapped(get_args(base)[0])
            found = [*of_values, *found]
        option = _merged(found)
        if not option.hidden:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            nested = base if getattr(base, "has_options", False) else None
            yield Described(field.name, inner, count, option, _docstring(kind, field.name), default, nested)


def _unwrapped(hint: Any) -> tuple[Any, list[Option]]:
    """Return a type without ``Annotated`` and ``None``, and the options that were written there."""
    if get_origin(hint) is Annotated:
        base, found = _unwrapped(hint.__origin__)
        return base, [*found, *(one for one in hint.__metadata__ if isinstance(one, Option))]
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(hint) if one is not type(None))
        return _unwrapped(kind)
    return hint, []


def _merged(found: list[Option]) -> Option:
    """Return one option out of several, of which a later one counts more."""
    said = [{name: value for name, value in vars(one).items() if value != getattr(Option, name)} for one in found]
    return Option(**{name: value for one in said for name, value in one.items()})


def _docstring(kind: type, field: str) -> str:
    """Return a field's docstring with its lines joined; a line of a list, which begins with ``- ``, stays one."""
    classes = [one for one in kind.__mro__ if field in getattr(one, "__pydantic_fields__", ())]
    text = next(filter(None, (one.__pydantic_fields__[field].description for one in classes)), "")
    return re.sub(r"\n(?!- )", " ", inspect.cleandoc(text)).strip()


# By the type of pydantic's error: what would be right.
_WANTED = {
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "string_type": "must be text",
    "list_type": "must be a list",
    "too_short": "must be a list of {min_length} or more",
    "too_long": "must be a list of {max_length} or fewer",
}


def wanted(error: Mapping[str, Any]) -> str:
    """Return what would be right in place of a refused value, as a message says it.

    Args:
        error: one of pydantic's errors.
    """
    text = _WANTED.get(error["type"], error["msg"][:1].lower() + error["msg"][1:])
    about = {name: f"{one:g}" if isinstance(one, float) else one for name, one in error.get("ctx", {}).items()}
    return text.format(**about).replace("'", "")


def _refusal(kind: type, error: ValidationError) -> UserError:
    first = error.errors()[0]
    about = first.get("ctx", {})
    if isinstance(about.get("error"), UserError):
        return about["error"]
    field = str(first["loc"][0])
    name = next((one.name for one in described(kind) if one.field == field), field)
    limits = kind.__pydantic_fields__[field].metadata if field in kind.__pydantic_fields__ else ()
    bounds = {side: getattr(one, side) for one in limits for side in ("ge", "le") if hasattr(one, side)}
    right = wanted(first)
    if len(bounds) == 2 and first["type"] in _WANTED:
        right = f"must be {bounds['ge']:,} to {bounds['le']:,}"
    return UserError(f"{name}: {right}, found {first['input']!r}")
