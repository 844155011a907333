"""What a GPU's allocator holds, for comparisons."""

import gc

from megatron_cca import platform


def bytes_in_use() -> int:
    """Return what is allocated and still reachable.

    Models sit in cycles of references: without a collection, an earlier test's would be counted now and freed later.
    """
    gc.collect()
    platform.synchronize()
    return platform.memory_bytes()
