"""Short hashes of settings; nothing here imports torch or Megatron."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_cca import __version__


def digest(contents: Mapping[str, Any]) -> str:
    """Of plain data and this package's version, 12 hexadecimal digits."""
    text = json.dumps({"version": __version__, **contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
