"""Turn a prompt into the condition of a model: the ids of its text, or the number of its class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_cca.data.text_tokenizers import TextTokenizer
from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.prompts import Prompt
from megatron_cca.models.image_vocabulary import ImageVocabulary


def check_condition(vocabulary: ImageVocabulary, prompt: Prompt) -> None:
    """Refuse a prompt that is no condition for a model.

    Raises:
        UserError: a text alone for a model of classes, a class alone for a model of texts, a class beyond the model's.
    """
    classes, shown = vocabulary.num_classes, f"prompt {prompt.title[:40]!r}"
    if classes is None:
        if prompt.text is None:
            raise UserError(f"{shown}: this model takes texts, and this is a class alone; give a text with it")
    elif prompt.label is None:
        raise UserError(f"{shown}: this model takes classes, not texts; give the label of one, 0 to {classes - 1}")
    elif prompt.label >= classes:
        raise UserError(f"{shown}: label {prompt.label} is beyond the model's classes, 0 to {classes - 1}")


def check_conditions(vocabulary: ImageVocabulary, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts as :func:`check_condition` refuses one."""
    for prompt in prompts:
        check_condition(vocabulary, prompt)


def caption_ids(vocabulary: ImageVocabulary, text: TextTokenizer | None, prompt: Prompt) -> np.ndarray:
    """Return the caption of a prompt, int64 ``[C]``, as :meth:`ImageVocabulary.prompt` takes it.

    Args:
        vocabulary: the model's.
        text: its text tokenizer. None where captions are classes.
        prompt: what to draw.

    Raises:
        UserError: what :func:`check_condition` refuses, or a text that cannot be encoded.
    """
    check_condition(vocabulary, prompt)
    if vocabulary.num_classes is not None:
        return np.array([prompt.label], dtype=np.int64)
    with error_context(f"prompt {prompt.text[:40]!r}"):
        return np.array(text.encode(prompt.text), dtype=np.int64)


def negative_ids(vocabulary: ImageVocabulary, text: TextTokenizer | None, negative: str) -> np.ndarray:
    """Return the caption of the second stream, int64 ``[C]``. An empty one is the dropped condition.

    Raises:
        UserError: a text for a model of classes.
    """
    if vocabulary.num_classes is None:
        return caption_ids(vocabulary, text, Prompt(negative))
    if negative:
        raise UserError(
            f"negative prompt {negative[:40]!r}: this model takes classes, and its second stream has none; leave it out"
        )
    return np.empty(0, dtype=np.int64)
