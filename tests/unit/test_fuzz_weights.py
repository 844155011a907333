"""A family's own file of weights, in either of torch's formats or as safetensors, that may hold anything."""

import io

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import WeightsDescription
from megatron_cca.checkpoint.huggingface.importing import open_public
from tests.references import llamagen
from tests.references.fuzzing import changed, fuzzed, plain, spoilt

STATE = llamagen.random_weights(llamagen.Sizes(1, 8, 2, grid=2, codebook=16, classes=3, ffn=8))
PLAIN = {"model": STATE, "ema": {name: value + 1 for name, value in STATE.items()}, "steps": 3}
READING = WeightsDescription({"num_attention_heads": 2, "max_position_embeddings": 5}, section="model")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 24]), max_size=3).map(torch.ones)


def in_format(content, is_new):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_new)
    return file.getvalue()


FORMATS = [in_format(PLAIN, True), in_format(PLAIN, False)]
FORGED = st.builds(in_format, changed(PLAIN, plain | SHAPES), st.booleans())


def opened(sandbox, content, name="w.pt", reading=READING):
    (sandbox.inside / name).write_bytes(content)
    return sandbox.check(lambda: open_public(sandbox.inside / name, "--hf", reading))


@fuzzed("weights file")
@given(spoilt(*FORMATS) | FORGED | spoilt(save(STATE)))
@example(in_format({"model": STATE | {"norm.weight": torch.ones(1).expand(10**12)}}, False))
def test_no_file_gets_through(sandbox, content):
    opened(sandbox, content)
    opened(sandbox, content, "w.safetensors", WeightsDescription(READING.sizes))


@pytest.mark.parametrize("content", FORMATS, ids=["of today", "former"])
def test_a_whole_one_is_read(sandbox, content):
    assert opened(sandbox, content).architecture.vocabulary.num_classes == 3


def test_whole_safetensors_are_read(sandbox):
    found = opened(sandbox, save(STATE), "w.safetensors", WeightsDescription(READING.sizes))
    assert found.architecture.vocabulary.codebook_size == 16
