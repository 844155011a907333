"""Build the parser of a program from its options classes, and an instance of one from a command line."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_cca.errors import UserError
from megatron_cca.io.options import Described, described
from megatron_cca.io.paths import path_option
from megatron_cca.reporting import reported_errors


def whole_number(text: str) -> int:
    """Return the whole number that a text holds. Raise ``argparse.ArgumentTypeError`` for other texts."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}")
    return int(text)


def number(text: str) -> float:
    """Return the number that a text holds. Raise ``argparse.ArgumentTypeError`` for other texts."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None


# By type: the placeholder of a value in help texts, and the conversion from text.
_TYPES: dict[Any, tuple[str, Callable[[str], object]]] = {
    int: ("N", whole_number),
    float: ("X", number),
    Path: ("PATH", path_option),
    str: ("TEXT", str),
}


def parse(
    kinds: type | Mapping[str, type],
    argv: Sequence[str] | None,
    description: str | None,
    epilog: str = "",
    default: str | None = None,
) -> Any:
    """Return an instance of a program's options class. Bad options end the process with one line and status 2.

    Args:
        kinds: the options class, or the options class of each command. Its docstring is the command's help.
        argv: the arguments. None means those of the process.
        description: what the program does.
        epilog: examples, printed after the list of options.
        default: the command to take if the first argument is an option.
    """
    try:
        return parsed(kinds, argv, description, epilog, default)
    except (UserError, OSError) as error:
        # Checks of options look at paths, which may not be there to be looked at.
        with reported_errors():
            raise error


def parsed(
    kinds: type | Mapping[str, type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    epilog: str = "",
    default: str | None = None,
) -> Any:
    """Do what :func:`parse` does, but raise :class:`UserError` for bad options."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(description=description, epilog=epilog, formatter_class=_Formatter)
    if isinstance(kinds, type):
        _add_options(parser, kinds)
        return _filled(kinds, vars(parser.parse_args(argv)))
    commands = parser.add_subparsers(dest="command", metavar="|".join(kinds), required=True)
    for name, kind in kinds.items():
        about = " ".join((kind.__doc__ or "").split())
        more = getattr(kind, "epilog", "")
        # In the list of commands the first sentence says enough.
        short = about.partition(". ")[0].rstrip(".").replace("%", "%%")
        command = commands.add_parser(name, help=short, description=about, epilog=more, formatter_class=_Formatter)
        _add_options(command, kind)
    if default is not None and argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = [default, *argv]
    found = vars(parser.parse_args(argv))
    return _filled(kinds[found["command"]], found)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The formatter of help texts, which wraps a text line by line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in _wrapped(line, width)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Lines that fit into a line of the source were laid out by hand.
        lines = (_wrapped(line, width) if len(line) > 120 else [line] for line in text.splitlines())
        return "\n".join(indent + part for parts in lines for part in parts)


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  " * line.startswith("- ")) or [""]


def _add_options(parser: Any, kind: type) -> None:
    one_of = None
    for one in described(kind):
        if one.nested is not None:
            _add_options(parser.add_argument_group(one.doc) if one.doc else parser, one.nested)
        elif one.option.one_of:
            one_of = one_of or parser.add_mutually_exclusive_group(required=True)
            _add(one_of, one, is_required=False)
        else:
            _add(parser, one, is_required=one.is_required)


def _add(parser: Any, one: Described, *, is_required: bool) -> None:
    # An option that is not given is left out, so that its default stands only in the dataclass.
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": one.help.replace("%", "%%")}
    is_positional = not one.name.startswith("-")
    if not is_positional:
        settings |= {"dest": one.field, "required": is_required}
    if one.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction if one.default else "store_true"
        if one.name.startswith("--no-"):
            settings["action"] = "store_false"
    else:
        settings |= _value(one)
    parser.add_argument(one.field if is_positional else one.name, **settings)


def _value(one: Described) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    choices = get_args(one.kind) if get_origin(one.kind) is Literal else one.option.choices
    if choices:
        settings["choices"] = choices
    else:
        metavar, convert = _TYPES[one.kind]
        settings |= {"metavar": one.option.metavar or metavar, "type": one.option.convert or convert}
    if one.count == 0 and one.option.values == "repeated":
        settings["action"] = "append"
    elif one.count is not None:
        settings["nargs"] = one.count or one.option.values
    return settings


def _filled(kind: type, found: Mapping[str, Any]) -> Any:
    values = {}
    for one in described(kind):
        if one.nested is not None:
            values[one.field] = _filled(one.nested, found)
        elif one.field in found:
            value = found[one.field]
            values[one.field] = tuple(value) if isinstance(value, list) else value
    with spelled_as_options(kind):
        return kind(**values)


@contextmanager
def spelled_as_options(kind: type) -> Iterator[None]:
    """Name the option, instead of the class's field, in a :class:`UserError` that the block raises."""
    try:
        yield
    except UserError as error:
        field, _, problem = str(error).partition(": ")
        names = {name: f"--{name.replace('_', '-')}" for name in kind.__pydantic_fields__}
        names |= {one.field: one.name for one in described(kind)}
        raise UserError(f"{names.get(field, field)}: {problem}") from None
