"""VAR's files of a random tiny model, as its authors' programs write them, and a plain model as their oracle."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.references import var
from tests.references.family import Oracle, leaves, tensors_in

FORMS = {
    "bare": lambda state, _: state,
    "CCA's program": lambda state, _: {"epoch": 1, "iter": 0, "trainer": state, "args": {"tlr": 1e-5}},
    # Its file also holds the image tokenizer.
    "VAR's program": lambda state, quantizer: {
        "trainer": {
            "config": {"prog_it": 0},
            "var_wo_ddp": state,
            "vae_local": quantizer,
            "var_opt": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}},
        }
    },
}
_TOKENIZER = "vae_ch160v4096z32.pth"
# Enough for attention to have its say, and for few enough roundings.
_STD = 0.1


def write(form: str, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Save one of :data:`FORMS`, with the image tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: value.to(dtype) for name, value in var.random_weights(var.TINY, seed, _STD).items()}
    held = var.buffers(var.TINY)
    held |= {name: value.to(dtype) for name, value in held.items() if name.endswith("zero_k_bias")}
    torch.save(var.random_quantizer(var.TINY), folder / _TOKENIZER)
    torch.save(FORMS[form](trained | held, var.random_quantizer(var.TINY)), folder / "var.pth")
    return folder / "var.pth"


def oracle(path: Path) -> Oracle:
    """The plain model of the weights in a file."""
    weights = leaves({name: value for name, value in tensors_in(path).items() if name in var.shapes(var.TINY)})
    quantizer = {name: value.double() for name, value in torch.load(path.parent / _TOKENIZER).items()}

    def logits(tokens):
        # The last code is predicted, and not looked at.
        codes = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        return var.logits(weights, quantizer, tokens[:, 0] - var.TINY.codebook, codes, var.TINY)

    return Oracle(logits, weights)
