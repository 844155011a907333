"""What every fuzz test shares: how many cases there are, spoilt files, hostile values, and the property that is held.

The property: a parser of foreign files either works or raises one of the errors that a person is meant to read, in one
line. It neither hangs nor asks for absurd memory; it opens nothing outside the sandbox for writing, none of the files
that lie beside the folder it was given, and starts no process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_cca.errors import UserError

# Cases of each test; test_fuzz_cases.py holds that they are 10,000 or more, and that each is used.
CASES = {
    "config file": 600,
    "latest file": 200,
    "checkpoint summary": 400,
    "metrics": 300,
    "config override": 1200,
    "config tree": 400,
    "study file": 100,
    "checkpoint index": 500,
    "checkpoint data": 150,
    "shard manifest": 400,
    "shard files": 400,
    "reference cache manifest": 300,
    "reference cache block": 300,
    "patch codebook": 400,
    "captions list": 350,
    "preferences list": 250,
    "captions folder": 100,
    "class names": 150,
    "journeydb list": 200,
    "tar": 500,
    "emu3 list": 150,
    "emu3 file": 200,
    "code file": 300,
    "label file": 200,
    "IDX file": 300,
    "dataset folder": 100,
    "image header": 1200,
    "prompts text": 600,
    "prompts jsonl": 600,
    "prompts classes": 400,
    "safetensors file": 400,
    "safetensors index": 250,
    "huggingface config": 150,
    "image tokenizer config": 50,
    "vq file": 300,
    "var's vq file": 150,
    "weights file": 200,
    "tokenizer json": 350,
    "tokenizer tiktoken": 300,
    "image listing": 300,
    "image archive": 300,
    "image folder": 300,
}
# `make test` tries a fifth of them, `make test-full` all. A longer search, MEGATRON_CCA_FUZZ_SCALE=10, has ten times as
# many cases, and other ones in every run.
SCALE = float(os.environ.get("MEGATRON_CCA_FUZZ_SCALE", "0.2"))

_MAX_SECONDS = 10
_MAX_BYTES = 2 << 30
_PAGE = os.sysconf("SC_PAGE_SIZE")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = [
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "shutil.copyfile",
    "shutil.move",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
]


def fuzzed(name: str) -> settings:
    """Hypothesis's settings for a test of :data:`CASES`: the same cases in every run, unless more are asked for."""
    return settings(
        max_examples=max(1, int(CASES[name] * SCALE)),
        derandomize=SCALE <= 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class _Watch:
    """What must not be touched, told by Python's audit events; the hook stays, this switches it."""

    forbidden: Path | None = None
    installed = False
    found: list[str]

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.forbidden is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0
            if path.startswith(f"{self.forbidden}/") or (flags & _WRITING and not path.startswith("/dev/")):
                self.found.append(f"{event} {path}")
        elif event in _CHANGES:
            self.found.append(f"{event} {arguments}"[:200])


_watch = _Watch()


@contextmanager
def _watched(beside: Path) -> Iterator[list[str]]:
    if not _watch.installed:
        sys.addaudithook(_watch)
        _watch.installed = True
    _watch.forbidden, _watch.found = Path(os.path.realpath(beside)), []
    try:
        yield _watch.found
    finally:
        _watch.forbidden = None


@contextmanager
def _limited() -> Iterator[None]:
    """Seconds of this process's own time, and memory beyond what it has mapped already."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MAX_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


class Hangs(BaseException):
    """Not an Exception, so that nothing takes it for damage in a file."""


def _hangs(*_: object) -> None:
    raise Hangs(f"more than {_MAX_SECONDS} seconds")


def _check_causes(error: BaseException | None) -> None:
    """Whatever was asked for too much memory is no refusal, even where a broad ``except`` made one of it."""
    while error is not None:
        assert not isinstance(error, MemoryError) and "allocate memory" not in str(error), f"asked too much: {error!r}"
        error = error.__context__


class Sandbox:
    """A folder to spoil, ``inside``, and files beside it that nothing in it may lead to.

    Attributes:
        inside: the folder that a parser is given, or that its files are in.
        beside: ``secret.txt``, ``secret.npy`` and others, which must never be opened.
    """

    def __init__(self, root: Path) -> None:
        self.inside, self.beside = root / "inside", root / "beside"
        self.inside.mkdir(parents=True)
        self.beside.mkdir()
        for name in ("secret.txt", "secret.npy", "secret.png", "secret.safetensors", "secret.distcp"):
            (self.beside / name).write_bytes(b"secret")

    def check(self, call: Callable[[], Any], *others: type[Exception]) -> Any:
        """Hold the property for a call; its result, or None where it was refused.

        Args:
            call: what parses.
            others: errors in one line besides :class:`UserError`, of single records.
        """
        with _watched(self.beside) as touched, _limited():
            try:
                result = call()
            except (UserError, *others) as error:
                result, said = None, str(error)
                assert said and said.splitlines() == [said], f"not one line: {said!r}"
                _check_causes(error)
        assert not touched, touched
        return result


# What people and attackers put where a name, a number or a text belongs.
NAMES = [
    "../beside/secret.txt",
    "../beside/secret.npy",
    "../beside/secret.png",
    "../beside/secret.safetensors",
    "../beside/secret.distcp",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "..",
    ".",
    "",
    "a/../../b",
    "nul\0name",
    "new\nline",
    "line\u2028separator",
    "\udcff\udc80",
    "x" * 300,
    "a/" * 2500 + "a",
    "~/x",
    "$(touch x)",
    "::",
    "C:\\x",
    "CON",
    "\ufeffbom",
    "file:///etc/passwd",
]
NUMBERS = [0, -1, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12, -(2**63), 10**30, 0.5, 1e308, -0.0, True]
NOT_NUMBERS = [float("nan"), float("inf"), float("-inf")]

names = st.sampled_from(NAMES) | st.text(max_size=20)
scalars = st.sampled_from([*NUMBERS, *NOT_NUMBERS, None, True, False]) | st.integers() | st.floats() | names
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)

# Pieces of text at which parsers of JSON, YAML and line-based formats stumble.
_PIECES = [
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 5000,
    b'{"a":' * 3000,
    b"- " * 1500,
    b"&a [*a]",
    b"<<: *a",
    b"!!python/object/apply:os.system [true]",
    b"!!binary x",
    b"2026-99-99",
    b"? [1]\n: 2\n",
    b"\\ud800",
    b"\\u0000",
    b"../beside/secret.txt",
    b"/etc/passwd",
    b"null",
    b"-1",
    b"1000000000000",
    b'""',
    b"{}",
    b"[]",
    b"'",
    b'"',
    b"\xe2\x80\xa8",
    b"\x85",
    b"\x1b[2J",
]
_places = st.floats(0, 1)
_edits = (
    st.tuples(st.just("cut"), _places, _places)
    | st.tuples(st.just("flip"), _places, st.integers(1, 255))
    | st.tuples(st.just("put"), _places, st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=8))
    | st.tuples(st.just("over"), _places, st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=8))
    | st.tuples(st.just("number"), _places, st.sampled_from([*NUMBERS[:10], 255, 65535]))
    | st.tuples(st.just("copy"), _places, _places)
    | st.tuples(st.just("end"), _places, st.none())
)


def spoilt(*valid: bytes) -> st.SearchStrategy[bytes]:
    """One of the files after a few of: bytes changed, cut out, put in, written over, doubled, the end lost."""
    return st.builds(_edited, st.sampled_from(valid), st.lists(_edits, min_size=1, max_size=4))


def _edited(content: bytes, edits: list[tuple]) -> bytes:
    for kind, where, what in edits:
        at = int(where * len(content))
        if kind == "cut":
            content = content[:at] + content[at + 1 + int(what * 32) :]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]
        elif kind == "put":
            content = content[:at] + what + content[at:]
        elif kind == "over":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "number":
            word = int(what % 2**64).to_bytes(8, "little")[: 4 if where < 0.5 else 8]
            content = content[:at] + word + content[at + len(word) :]
        elif kind == "copy":
            content = content[:at] + content[int(what * len(content)) :][:64] + content[at:]
        elif kind == "end":
            content = content[:at]
    return content


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy = plain) -> Any:
    """Plain data with one or two of its parts replaced, removed or added, at any depth."""
    for _ in range(draw(st.integers(1, 2))):
        tree = _changed_once(draw, tree, values)
    return tree


def _changed_once(draw: st.DrawFn, tree: Any, values: st.SearchStrategy) -> Any:
    if isinstance(tree, dict) and tree:
        key, how = draw(st.sampled_from(sorted(tree, key=str))), draw(st.integers(0, 6))
        if how == 0:
            return {name: value for name, value in tree.items() if name != key}
        if how == 1:
            return tree | {draw(names): draw(values)}
        if how == 2:
            return draw(values)
        return tree | {key: _changed_once(draw, tree[key], values)}
    if isinstance(tree, list) and tree and draw(st.booleans()):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], _changed_once(draw, tree[place], values), *tree[place + 1 :]]
    return draw(values)
