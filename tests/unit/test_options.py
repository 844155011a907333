"""Options that are defined once: what parser, help text and refusals come from a class, and how programs are found."""

import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from megatron_cca import __version__
from megatron_cca.__main__ import main, programs
from megatron_cca.config import config_option, example, example_names
from megatron_cca.errors import UserError
from megatron_cca.io.options import Count, File, Folder, Option, Overrides, PathOrWord, options
from megatron_cca.programs.parsing import parse, parsed
from tests.distributed.launch import ROOT


@options
class Inner:
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """of all"""
    one: Annotated[str, Option(one_of=True)] | None = None
    other: Annotated[tuple[int, ...], Option(values="+", one_of=True)] = ()

    def __post_init__(self):
        if self.share == 0.25:
            raise UserError("share: is a quarter")


@options
class Some:
    """Do something. At length: 100 %."""

    place: Annotated[Path, Option(name="PLACE", metavar="PLACE")]
    """where;
    - a: list
    - of: two"""
    inner: Inner
    """a heading"""
    overrides: Overrides = ()
    """keys"""
    grid: Annotated[tuple[Count, Count], Option(metavar=("H", "W"))] | None = None
    steps: Annotated[Count, Option(name="--steps-of")] = 3
    """taken in a row"""
    files: tuple[File, ...] | None = None
    word: Annotated[PathOrWord, Option(metavar="WORD")] = "digits"
    names: Annotated[tuple[str, ...], Option(values="*")] | None = None
    kind: Literal["a", "b"] = "a"
    npz: Annotated[bool, Option(name="--no-npz")] = True
    resume: bool = True
    loud: bool = False
    sizes: Annotated[dict | None, Option(hidden=True)] = None


@options
class More(Some):
    """Do more."""

    output: Folder = field(kw_only=True)
    """a folder"""


NEEDED = ["here", "--one", "x"]


def test_what_is_not_given_is_the_class_own_default():
    assert parsed(Some, NEEDED) == Some(Path("here"), Inner(one="x"))


def test_every_way_to_type_an_option():
    words = "here --other 1 2 --share 1 --set a=1 --set b=2 --grid 3 4 --steps-of 7 --files a --files ~/b --word digits"
    found = parsed(Some, [*words.split(), "--names", "--kind", "b", "--no-npz", "--no-resume", "--loud"])
    inner = Inner(1.0, other=(1, 2))
    files, flags = (Path("a"), Path.home() / "b"), {"npz": False, "resume": False, "loud": True}
    assert found == Some(Path("here"), inner, ("a=1", "b=2"), (3, 4), 7, files, names=(), kind="b", **flags)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("here", "one of the arguments --one --other is required"),
        ("here --one x --other 1", "--other: not allowed with argument --one"),
        ("--one x", "the following arguments are required: PLACE"),
        ("here --one x --steps-of 0", "--steps-of: must be 1 or more, found 0"),
        ("here --one x --steps-of 2147483648", "--steps-of: must be less than 2147483648, found 2147483648"),
        ("here --one x --steps-of 1_0", "--steps-of: must be a whole number, found '1_0'"),
        ("here --one x --share 2", "--share: must be 0 to 1, found 2.0"),
        ("here --one x --share x", "--share: must be a number, found 'x'"),
        ("here --one x --share 0.25", "--share: is a quarter"),
        ("here --one x --grid 0 4", "--grid: must be 1 or more, found 0"),
        ("here --one x --grid 4", "--grid: expected 2 arguments"),
        ("here --one x --kind c", "--kind: invalid choice: 'c' (choose from 'a', 'b')"),
        ("here --one x --files $HOME/x", "--files: '$HOME/x': $HOME is not replaced here; write ~ for the home folder"),
        ("here --one x --sizes 3", "unrecognized arguments: --sizes 3"),
    ],
)
def test_what_cannot_be_is_one_line_that_begins_with_the_option(words, message, capsys, monkeypatch):
    with pytest.raises(UserError) as error:
        parsed(Some, words.split())
    assert str(error.value).startswith(message)
    monkeypatch.setattr("megatron_cca.reporting.end_process", sys.exit)
    with pytest.raises(SystemExit) as ended:
        parse(Some, words.split(), "")
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"megatron_cca: error: {error.value}\n")


def test_a_class_is_checked_whoever_makes_it():
    made = Some("here", Inner(), steps=2)
    with pytest.raises(UserError, match=r"^--steps-of: must be 1 or more, found 0$"):
        replace(made, steps=0)
    with pytest.raises(UserError, match=r"^--kind: must be a or b, found 'c'$"):
        replace(made, kind="c")


def test_help_has_the_docstrings_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed({"some": Some, "more": More}, ["more", "--help"], "About.")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for part in (
        "a heading:",
        "--steps-of N          taken in a row (default 3)",
        "--share X             of all (default 0.5)",
        "--grid H W",
        "--output DIR          a folder\n",
        "  PLACE                 where;\n                        - a: list\n                        - of: two\n",
    ):
        assert part in told, told
    with pytest.raises(SystemExit):
        parsed({"some": Some, "more": More}, ["--help"], "About.")
    assert "    some      Do something\n" in capsys.readouterr().out


def test_a_command_is_meant_where_the_first_word_is_an_option():
    @options
    class Plain:
        loud: bool = False

    assert parsed({"a": Plain, "b": Some}, ["--loud"], default="a") == Plain(loud=True)


def test_a_configuration_is_a_file_or_the_name_of_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert example_names() == sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
    assert config_option("emu3_tiny_cca") == example("emu3_tiny_cca")
    assert example("emu3_tiny_cca").read_text() == (ROOT / "examples" / "emu3_tiny_cca.yaml").read_text()
    for text in ("none.yaml", "a/emu3_tiny_cca"):
        assert config_option(text) == Path(text)
    (tmp_path / "emu3_tiny_cca").write_text("{}")
    assert config_option("emu3_tiny_cca") == Path("emu3_tiny_cca")
    with pytest.raises(
        ArgumentTypeError, match="'tiny' is neither a file nor an example; the examples are emu3_5_34b_512x_h100, "
    ):
        config_option("tiny")


def test_programs_are_found_by_name(capsys, monkeypatch):
    names = "cache-reference convert evaluate generate measure-reference-bias plan report study tokenize train"
    assert list(programs()) == names.split()
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for name, file in programs().items():
        assert f"\n  {name:24}" in told and file.read_text().startswith('"""')
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"megatron-cca {__version__}\n"
    monkeypatch.setattr("megatron_cca.reporting.end_process", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main(["generates"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "megatron_cca: error: generates: is no program; did you mean generate?\n"


def test_help_imports_neither_torch_nor_megatron():
    code = (
        "import sys\nfrom megatron_cca.__main__ import main, programs\nfor name in programs():\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit as ended:\n        assert ended.code == 0\n"
        "sys.exit(' '.join({'torch', 'megatron', 'transformers', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: megatron-cca tokenize" in done.stdout
