"""Packages that Megatron-Core 0.19.2 takes where it finds them, and must not take here.

To be called before Megatron-Core is imported.
"""

from __future__ import annotations

import sys

_ENGINE = "megatron.core.extensions.transformer_engine"
_GPU_ONLY = ("transformer_engine", "apex")
_OTHER_WRITER = "nvidia_resiliency_ext.checkpointing.async_ckpt.core"


def hide_gpu_only_packages() -> None:
    """Let Megatron-Core take its plain torch fallbacks: kernels of Transformer Engine and apex take no CPU tensors.

    Raises:
        RuntimeError: Megatron-Core was imported before and has already bound Transformer Engine's kernels.
    """
    if getattr(sys.modules.get(_ENGINE), "HAVE_TE", False):
        raise RuntimeError("call megatron_cca.platform.install('cpu') before importing megatron.core")
    for name in _GPU_ONLY:
        if name not in sys.modules:
            sys.modules[name] = None


def hide_other_writer() -> None:
    """Let Megatron-Core write checkpoints itself; where it finds the other writer, it ends if that is too old."""
    sys.modules.setdefault(_OTHER_WRITER, None)
