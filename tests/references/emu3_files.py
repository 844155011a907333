"""Emu3's public files of a random tiny model, and transformers as their oracle."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.references.family import Oracle, tensors_in
from tests.references.huggingface import save_emu3

FORMS = ("original repository", "Emu3ForCausalLM", "transformers")


def write(form: str, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Save one of :data:`FORMS`."""
    return save_emu3(folder, form, seed=seed, dtype=dtype)


def oracle(folder: Path) -> Oracle:
    """Transformers' own model."""
    from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration

    is_composite = any(name.startswith("text_model") for name in tensors_in(folder))
    cls = Emu3ForConditionalGeneration if is_composite else Emu3ForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float64).eval()
    return Oracle(lambda tokens: model(input_ids=tokens).logits, dict(model.named_parameters()))
