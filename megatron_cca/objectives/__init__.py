"""Training objectives: log-probabilities in, a scalar loss and scalar metrics out. No Megatron here.

``OBJECTIVES[name](**keys)`` is callable on :class:`PairLogps` (objectives that contrast matched with mismatched pairs)
or on :class:`SequenceLogps` (plain likelihood), as its ``contrasts`` says. A new objective is one file in this folder.
The loop below finds all files.

Objectives are sections of a configuration. They import torch only when they compute a loss, so that a mistyped key is
refused in a fraction of a second.
"""

import importlib
import pkgutil

from megatron_cca.objectives.base import (
    OBJECTIVES,
    Objective,
    ObjectiveResult,
    PairLogps,
    PairObjective,
    SequenceLogps,
    is_objective,
    objective,
    register,
)

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _value in vars(_module).values():
        if is_objective(_value) and _value.__module__ == _module.__name__:
            register(_value)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveResult",
    "PairLogps",
    "PairObjective",
    "SequenceLogps",
    "objective",
    "register",
]
