"""How many cases the fuzz tests have, and that what they hold would be noticed."""

import re
from pathlib import Path

import pytest

from megatron_cca.errors import UserError
from tests.references.fuzzing import CASES, Hangs

FILES = sorted(Path(__file__).parent.glob("test_fuzz_*.py"))


def test_there_are_ten_thousand_cases():
    assert sum(CASES.values()) >= 10_000
    used = [name for file in FILES for name in re.findall(r'^@fuzzed\("(.+)"\)$', file.read_text(), re.MULTILINE)]
    assert sorted(used) == sorted(CASES), "every parser's cases are used by one test"


def raises(error):
    raise error


def asks_for_too_much():
    try:
        bytearray(1 << 45)
    except MemoryError:
        raise UserError("refused, but only by the machine") from None


BREACHES = {
    "another error": (lambda sandbox: raises(KeyError("a")), KeyError),
    "memory": (lambda sandbox: asks_for_too_much(), AssertionError),
    "a hang": (lambda sandbox: [None for _ in iter(int, 1)], (Hangs, MemoryError)),
    "a file beside": (lambda sandbox: (sandbox.beside / "secret.txt").read_bytes(), AssertionError),
    "a file beside, by dots": (lambda sandbox: (sandbox.inside / "../beside/secret.txt").read_bytes(), AssertionError),
    "writing": (lambda sandbox: (sandbox.inside / "new").write_text("a"), AssertionError),
    "removing": (lambda sandbox: (sandbox.beside / "secret.npy").unlink(), AssertionError),
    "a program": (lambda sandbox: __import__("subprocess").run(["true"], check=False), AssertionError),
}


@pytest.mark.parametrize("name", BREACHES)
def test_every_breach_is_noticed(name, sandbox, monkeypatch):
    monkeypatch.setattr("tests.references.fuzzing._MAX_SECONDS", 1)
    call, error = BREACHES[name]
    with pytest.raises(error):
        sandbox.check(lambda: call(sandbox))


def test_a_refusal_is_none(sandbox):
    assert sandbox.check(lambda: raises(UserError("a: is\nwrong \ud800" + "x" * 9999))) is None
    message = str(UserError("a: is\nwrong \ud800" + "x" * 9999))
    assert message.startswith("a: is\\nwrong \\ud800xxx") and message.isprintable() and len(message) <= 2003
