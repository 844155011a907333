"""Training objectives: log-probabilities in, a scalar loss and scalar metrics out. No Megatron here.

``OBJECTIVES[name](**settings)`` is callable on :class:`PairLogps` (objectives that contrast matched with mismatched
pairs) or on :class:`SequenceLogps` (plain likelihood), as its ``batch_type`` says. A new objective is one file and one
line below.
"""

from megatron_cca.objectives.batches import ObjectiveResult, PairLogps, SequenceLogps
from megatron_cca.objectives.cca import CCA
from megatron_cca.objectives.dpo import DPO
from megatron_cca.objectives.next_token import NextToken
from megatron_cca.objectives.unlearning import Unlearning

OBJECTIVES = {
    "cca": CCA,
    "dpo": DPO,
    "unlearning": Unlearning,
    "next_token": NextToken,
}

__all__ = ["OBJECTIVES", "ObjectiveResult", "PairLogps", "SequenceLogps"]
