"""Hide packages that Megatron-Core 0.19.2 uses if they are installed, but must not use here.

Call these functions before Megatron-Core is imported.
"""

from __future__ import annotations

import sys

_ENGINE = "megatron.core.extensions.transformer_engine"
_GPU_ONLY = ("transformer_engine", "apex")
_OTHER_WRITER = "nvidia_resiliency_ext.checkpointing.async_ckpt.core"


def hide_gpu_only_packages() -> None:
    """Let Megatron-Core use plain torch on a CPU. Kernels of Transformer Engine and apex do not accept CPU tensors.

    Raises:
        RuntimeError: Megatron-Core was imported before, and already uses Transformer Engine's kernels.
    """
    if getattr(sys.modules.get(_ENGINE), "HAVE_TE", False):
        raise RuntimeError("call megatron_cca.platform.install('cpu') before importing megatron.core")
    for name in _GPU_ONLY:
        if name not in sys.modules:
            sys.modules[name] = None


def hide_other_writer() -> None:
    """Let Megatron-Core use its own checkpoint writer. It fails if it finds the other writer in an old version."""
    sys.modules.setdefault(_OTHER_WRITER, None)
