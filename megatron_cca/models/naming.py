"""The names of tensors on disk, and those of a family's weight map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Naming:
    """The names of tensors in one form of a checkpoint.

    Attributes:
        form: the name of the form on the command line.
        prefixes: from the prefix of a name on disk to its prefix in the weight map.
        companions: from the prefix of companion tensors on disk, which are copied unchanged, to their prefix beside an
            imported checkpoint.
    """

    form: str
    prefixes: Mapping[str, str]
    companions: Mapping[str, str] = field(default_factory=dict)

    def mapped(self, name: str) -> str | None:
        """Return the weight map's name for a name on disk. None if it is not one of the decoder's."""
        return _with_prefix(name, self.prefixes.items())

    def on_disk(self, name: str) -> str:
        """Return the name on disk for a name of the weight map, the inverse of :meth:`mapped`."""
        return _inverse(name, self.prefixes)

    def companion(self, name: str) -> str | None:
        """Return the name beside an imported checkpoint if it is a companion tensor's, else None."""
        return _with_prefix(name, self.companions.items())

    def companion_on_disk(self, name: str) -> str:
        """Return the name on disk of a companion tensor, the inverse of :meth:`companion`."""
        return _inverse(name, self.companions)


def _with_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    for prefix, replacement in prefixes:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return None


def _inverse(name: str, prefixes: Mapping[str, str]) -> str:
    found = _with_prefix(name, ((replacement, prefix) for prefix, replacement in prefixes.items()))
    assert found is not None, f"no prefix for {name}"
    return found


def recognise_naming(namings: Sequence[Naming], names: Iterable[str]) -> Naming:
    """Return the naming that knows most of these names."""
    names = list(names)

    def known(naming: Naming) -> int:
        return sum(naming.mapped(name) is not None or naming.companion(name) is not None for name in names)

    return max(namings, key=known)
