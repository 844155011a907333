"""Turn captioned images into a shard folder, in parts, on any number of processes.

An interrupted job can be continued.
"""

from megatron_cca.data.tokenizing.run_job import tokenize
from megatron_cca.data.tokenizing.tokenize_settings import TokenizeSettings

__all__ = ["TokenizeSettings", "tokenize"]
