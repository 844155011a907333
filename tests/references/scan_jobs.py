"""Tokenising jobs on a few scans with captions."""

import torch

from megatron_cca.data.tokenizing import job
from megatron_cca.models.emu3 import tiny_vocabulary

CPU = torch.device("cpu")
VOCABULARY = tiny_vocabulary()
NUMBER = 150  # of the scans


def tokenize(settings, rank=0, world_size=1):
    """Run one rank of a job; return its result."""
    return job.tokenize(settings, rank, world_size, CPU)
