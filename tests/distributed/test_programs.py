"""Every program started as a user types it, in a process that has imported nothing yet."""

import re
import sys

import pytest

from tests.distributed.launch import ROOT, SCRIPT, typed
from tests.selection import mostly_full

EXAMPLES = [ROOT / "examples" / folder / "run.py" for folder in ("quickstart", "scaling")]
KEPT = [SCRIPT, ROOT / "tools" / "generate.py"]
PROGRAMS = [*sorted((ROOT / "tools").glob("*.py")), *EXAMPLES, SCRIPT]


@pytest.mark.parametrize("program", mostly_full(PROGRAMS, KEPT), ids=lambda program: str(program.relative_to(ROOT)))
def test_help_comes_from_a_cold_start_and_is_the_programs_own(program, tmp_path):
    done = typed(sys.executable, program, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"usage: {re.escape(program.name)} ", done.stdout)
    assert list(tmp_path.iterdir()) == []
