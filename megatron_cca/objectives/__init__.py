"""Training objectives: log-probabilities in, a scalar loss and scalar metrics out. No Megatron here.

``OBJECTIVES[name](**keys)`` is callable on :class:`PairLogps` (objectives that contrast matched with mismatched pairs)
or on :class:`SequenceLogps` (plain likelihood), as its ``contrasts`` says. A new objective is one file in this folder.
A run imports that of its objective alone, if the file is called after it.

Objectives are sections of a configuration. They import torch only when they compute a loss, so that a mistyped key is
refused in a fraction of a second.
"""

from megatron_cca.objectives.base import (
    OBJECTIVES,
    Objective,
    ObjectiveResult,
    PairLogps,
    PairObjective,
    SequenceLogps,
    objective,
    register,
)

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
