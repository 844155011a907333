"""What a key of the configuration is: its type, its range, and what it affects.

    micro_batch_size: PositiveInt = key(32, LAST_BITS, reference=True, study=False)

Each key declares this in ``config/schema.py``. Resumes, studies, reference caches, the gate on step 0 and
``docs/configuration.md`` read it here. This module imports nothing of the configuration, so that the class of a
section can stand anywhere. It imports no torch and no Megatron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]

strict = dataclass(config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True), frozen=True)

_EFFECT = "effect"


class Affects(Enum):
    """What changes with the value of a key.

    Attributes:
        NUMBERS: losses and weights.
        LAST_BITS: only their rounding. The same numbers are summed in another order.
        SPEED: only memory and time.
        OUTPUT: what is written and printed, and when a run ends. The numbers stay the same.
    """

    NUMBERS = "numbers"
    LAST_BITS = "last bits"
    SPEED = "speed"
    OUTPUT = "output"


class OnResume(Enum):
    """What happens to a new value of a key when a run continues.

    Attributes:
        TAKES_EFFECT: the new value counts from the next step on.
        SAME_NUMBERS: the new value counts from the next step on, and the losses stay what they would have been.
        REFUSED: the run does not continue, since the key identifies the run. The message names the key.
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
    """The declaration of a key.

    Attributes:
        affects: what changes with the value of the key.
        resume: what happens to a new value when a run continues.
        reference: whether the log-probabilities of a frozen reference depend on the key. A key of ``NUMBERS`` then
            belongs to the identity of a reference cache. A key of ``LAST_BITS`` then belongs to the numeric path that
            the gate on step 0 compares. A string names the entry of the identity that replaces the key's value.
        study: whether a study treats runs with different values as different runs.
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
        default: the value of the key if a configuration leaves it out. Each configuration gets its own copy of a list.
        affects, resume, more: see :class:`Effect`. The default of ``resume`` follows from ``affects``. A new value is
            refused if it affects the numbers. It takes effect if it affects the output. Otherwise it leaves the
            numbers as they are.
    """
    metadata = {_EFFECT: _effect(affects, resume, **more)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: Callable[[], Any], affects: Affects | None = None, **more: Any) -> Any:
    """Return the dataclass field of a section.

    Args:
        kind: returns the section with its defaults.
        affects, more: the declaration of each key of the section that has none of its own, as in :func:`key`. Without
            it every key must declare its own.
    """
    metadata = {} if affects is None else {_EFFECT: _effect(affects, **more)}
    return dataclasses.field(default_factory=kind, metadata=metadata)


def effects(config: Any) -> dict[str, Effect]:
    """Return what each key of a configuration affects, by ``section.key``.

    Args:
        config: a ``Config``. Only the classes of its sections count, not its values.

    Raises:
        TypeError: a key declares nothing. The message names it.
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
    """Return, by ``section.key``, the values on which a reference's log-probabilities or their last bits depend.

    Args:
        config: a ``Config``.
        affects: ``NUMBERS`` or ``LAST_BITS``.
        filled: values that replace the configuration's own, such as what a null stands for.
    """
    found = values(config) | filled
    return {
        name: found[name] for name, one in effects(config).items() if one.affects is affects and one.reference is True
    }
