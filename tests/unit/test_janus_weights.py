"""Janus-Pro's folders in both forms: in and out bit for bit, what travels along, what is refused."""

import pytest
import torch

from tests.references.huggingface import assert_same_bits, convert, load_tensors
from tests.references.janus import FORMS, save_janus


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS[:2])
def test_there_and_back_is_bit_for_bit(form, dtype, tmp_path):
    hf = save_janus(tmp_path / "hf", form, dtype=dtype)
    back = convert(hf, tmp_path)
    assert_same_bits(load_tensors(back), load_tensors(hf))
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()
