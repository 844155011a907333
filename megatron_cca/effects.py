"""What a key of the configuration affects: each key declares it in ``config/schema.py``, whoever must know asks here.

    micro_batch_size: PositiveInt = key(32, LAST_BITS, reference=True, study=False)

Resumes, studies, reference caches, the gate on step 0 and ``docs/configuration.md`` do. It stands beside the
configuration and imports nothing of it, so that a section can have its class anywhere. No torch, no Megatron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

_EFFECT = "effect"


class Affects(Enum):
    """What changes with the value of a key.

    Attributes:
        NUMBERS: losses and weights.
        LAST_BITS: their rounding alone: the same numbers are summed in another order.
        SPEED: memory and time alone.
        OUTPUT: what is written and said, and when a run is ended; not the numbers.
    """

    NUMBERS = "numbers"
    LAST_BITS = "last bits"
    SPEED = "speed"
    OUTPUT = "output"


class OnResume(Enum):
    """What happens to a new value of a key when a run continues.

    Attributes:
        TAKES_EFFECT: it counts from the next step on.
        SAME_NUMBERS: likewise, and the losses stay what they would have been.
        REFUSED: the key says which run this is; the run is not continued, and the key is named.
    """

    TAKES_EFFECT = "takes effect"
    SAME_NUMBERS = "same numbers"
    REFUSED = "refused"


_USUAL = {
    Affects.NUMBERS: OnResume.REFUSED,
    Affects.LAST_BITS: OnResume.SAME_NUMBERS,
    Affects.SPEED: OnResume.SAME_NUMBERS,
    Affects.OUTPUT: OnResume.TAKES_EFFECT,
}


@dataclasses.dataclass(frozen=True)
class Effect:
    """What is declared of a key.

    Attributes:
        affects: what changes with its value.
        resume: what happens to a new value when a run continues.
        reference: whether the log-probabilities of a frozen reference depend on it. Of ``NUMBERS`` it then belongs to
            the identity of a reference cache, of ``LAST_BITS`` to the numeric path that the gate on step 0 compares. A
            text is the name under which the identity holds what the key leads to, in place of its value.
        study: whether a study takes a run with another value for another run.
    """

    affects: Affects
    resume: OnResume
    reference: bool | str
    study: bool


def _effect(
    affects: Affects, resume: OnResume | None = None, *, reference: bool | str = False, study: bool = True
) -> Effect:
    assert not reference or affects in (Affects.NUMBERS, Affects.LAST_BITS)
    return Effect(affects, resume or _USUAL[affects], reference, study)


def key(default: Any, affects: Affects, resume: OnResume | None = None, **more: Any) -> Any:
    """Return the dataclass field of a key.

    Args:
        default: its value where nothing is said; every configuration gets its own copy of a list.
        affects, resume, more: see :class:`Effect`. ``resume`` left out is what is usual for what the key affects: a new
            value is refused where it affects the numbers, takes effect where it affects the output, and leaves the
            numbers as they are elsewhere.
    """
    metadata = {_EFFECT: _effect(affects, resume, **more)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: Callable[[], Any], affects: Affects | None = None, **more: Any) -> Any:
    """Return the dataclass field of a section.

    Args:
        kind: makes the section with its defaults.
        affects, more: of each of its keys that declares nothing itself, as in :func:`key`; without it every key must
            declare its own.
    """
    metadata = {} if affects is None else {_EFFECT: _effect(affects, **more)}
    return dataclasses.field(default_factory=kind, metadata=metadata)


def effects(config: Any) -> dict[str, Effect]:
    """Return what each key of a configuration affects, by ``section.key``.

    Args:
        config: a ``Config``; the classes of its sections are looked at, not its values.

    Raises:
        TypeError: a key that declares nothing, by its name.
    """
    return {
        f"{part.name}.{one.name}": _declared(f"{part.name}.{one.name}", one, part)
        for part in dataclasses.fields(config)
        for one in dataclasses.fields(getattr(config, part.name))
    }


def _declared(name: str, one: dataclasses.Field, part: dataclasses.Field) -> Effect:
    found = one.metadata.get(_EFFECT) or part.metadata.get(_EFFECT)
    if found is None:
        kinds = ", ".join(kind.name for kind in Affects)
        raise TypeError(f"{name}: does not say what it affects; declare it by key(default, ...), one of {kinds}")
    return found


def values(config: Any) -> dict[str, Any]:
    """Return the value of each key of a configuration, by ``section.key``."""
    return {
        f"{part}.{name}": value for part, keys in dataclasses.asdict(config).items() for name, value in keys.items()
    }


def values_of_reference(config: Any, affects: Affects, filled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a reference's log-probabilities, or their last bits, depend on, by ``section.key``.

    Args:
        config: a ``Config``.
        affects: ``NUMBERS`` or ``LAST_BITS``.
        filled: values to take in place of the configuration's own, such as what a null stands for.
    """
    found = values(config) | filled
    return {
        name: found[name] for name, one in effects(config).items() if one.affects is affects and one.reference is True
    }
