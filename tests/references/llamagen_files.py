"""LlamaGen's files of a random model, as its authors' programs write them, and a plain model as their oracle."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.references import llamagen
from tests.references.family import Oracle, leaves, tensors_in

# Some programs save it; it follows from the sizes.
NOT_EXPORTED = frozenset({"freqs_cis"})
FORMS = {
    "training file": lambda state, _: {"model": state, "optimizer": {}, "args": argparse.Namespace(lr=1e-5)},
    "bare": lambda state, _: state,
    "state_dict with freqs_cis": lambda state, sizes: {"state_dict": state | {"freqs_cis": _frequencies(sizes)}},
}
# Enough for attention to have its say, and for few enough roundings.
_STD = 0.1


def write(sizes: llamagen.Sizes, form: str, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Save one of :data:`FORMS`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = llamagen.random_weights(sizes, seed, _STD)
    state = {name: value.to(dtype) for name, value in weights.items()}
    torch.save(FORMS[form](state, sizes), folder / "c2i.pt")
    return folder / "c2i.pt"


def oracle(sizes: llamagen.Sizes, path: Path) -> Oracle:
    """The plain model of the weights in a file."""
    weights = leaves(tensors_in(path, NOT_EXPORTED))

    def logits(tokens):
        return llamagen.logits(weights, tokens[:, 0] - sizes.codebook, tokens[:, 1:], sizes)

    return Oracle(logits, weights)


def _frequencies(sizes: llamagen.Sizes) -> torch.Tensor:
    return torch.zeros(1 + sizes.tokens, sizes.width // sizes.heads // 2, 2)
