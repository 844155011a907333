"""What all tests of image tokenizers ask of them."""

import pytest
import torch

from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError


def pixels(shape, seed=0):
    """Return random uint8 pixels."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def refused(folder, **options):
    """Return the one line by which an image tokenizer's files are refused."""
    with pytest.raises(UserError) as error:
        open_image_tokenizer(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
