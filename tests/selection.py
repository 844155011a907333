"""Choose which cases of a matrix belong to ``make test``; compute only the answers that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import pytest


def mostly_full(cases: Iterable, kept: Collection | Callable[[object], bool]) -> list:
    """Return parameters for pytest: what is kept is for ``make test``, the rest for ``make test-full``.

    Args:
        cases: the whole matrix.
        kept: what shows one thing each, as a collection or a test of a case.
    """
    keeps = kept if callable(kept) else kept.__contains__
    found = [case if keeps(case) else _marked(case) for case in cases]
    assert 0 < sum(not hasattr(case, "marks") for case in found) < len(found), "neither all nor none is kept"
    return found


def _marked(case: object):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)


class Computed(dict):
    """A dictionary that computes an entry, or several at once, when it is first asked for one of them.

    Args:
        compute: called with a missing key; returns entries, that one among them.
    """

    def __init__(self, compute: Callable[[object], dict]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, key: object) -> object:
        self.update(self._compute(key))
        return self[key]
