"""From captioned images to a shard folder: in parts, on any number of processes, going on where it was interrupted."""

from megatron_cca.data.tokenizing.job import tokenize
from megatron_cca.data.tokenizing.settings import TokenizeSettings

__all__ = ["TokenizeSettings", "tokenize"]
