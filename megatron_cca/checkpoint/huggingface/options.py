"""Command-line options by which messages name what a user gave, and how foreign weights are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HF, CHECKPOINT, HF_TEMPLATE, FORMAT = "--hf", "--checkpoint", "--hf-template", "--format"


@dataclass(frozen=True)
class Reading:
    """What weights do not say of themselves.

    Attributes:
        sizes: keys of the ``model`` section, for a file without a configuration.
        assumed: the same, where neither the file nor ``sizes`` say it.
        section: which of several sets of weights to take, as a message lists them.
        dtype: ``fp32`` widens weights of fewer bits, or of several widths; None takes them as they are.
    """

    sizes: Mapping[str, float] = field(default_factory=dict)
    assumed: Mapping[str, float] = field(default_factory=dict)
    section: str | None = None
    dtype: Literal["fp32"] | None = None


AS_IT_IS = Reading()
