"""Turn captioned images into a shard folder, in parts, on any number of processes.

An interrupted job can be continued.
"""

from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.data.tokenizing.settings import TokenizeSettings

__all__ = ["TokenizeSettings", "tokenize"]
