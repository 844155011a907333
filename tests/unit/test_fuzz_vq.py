"""A ``.pt`` of LlamaGen's or VAR's image tokenizer that may hold anything."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cca.data.tokenizers import open_image_tokenizer
from tests.references.fuzzing import changed, fuzzed, plain, spoilt
from tests.references.llamagen_vq import random_vq, saved
from tests.references.var_vq import random_var_vq

TABLE, HITS = "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"
SMALLEST = {"first": 32, "widths": (32,), "blocks": 1, "latent": 2, "codebook": (3, 2)}
PLAIN = {"model": random_vq(SMALLEST), "steps": 3}
VAR = random_var_vq(SMALLEST)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 32, 33, 64]), max_size=5)
FOREIGN = plain | SHAPES.map(torch.ones) | SHAPES.map(lambda shape: torch.ones(1).expand([10**6, *shape[:1], 1][:2]))


@fuzzed("vq file")
@given(spoilt(saved(PLAIN)) | changed(PLAIN, FOREIGN).map(saved))
@example(saved({"model": PLAIN["model"] | {TABLE: torch.ones(1, 1).expand(10**10, 10**5)}}))
@example(saved({"model": {"encoder.conv_in.weight": torch.ones(1, 1, 1, 1).expand(10**10, 1, 1, 1)}}))
def test_no_file_gets_through(sandbox, content):
    (sandbox.inside / "vq.pt").write_bytes(content)
    sandbox.check(lambda: open_image_tokenizer(sandbox.inside))


@fuzzed("var's vq file")
@given(spoilt(saved(VAR)) | changed(VAR, FOREIGN).map(saved))
@example(saved(VAR | {HITS: torch.ones(1, 1).expand(10**10, 3)}))
def test_no_file_of_vars_gets_through(sandbox, content):
    (sandbox.inside / "vae.pth").write_bytes(content)
    sandbox.check(lambda: open_image_tokenizer(sandbox.inside))


@pytest.mark.parametrize("content", [PLAIN, VAR], ids=["llamagen", "var"])
def test_the_smallest_is_read(sandbox, content):
    (sandbox.inside / "vq.pt").write_bytes(saved(content))
    assert sandbox.check(lambda: open_image_tokenizer(sandbox.inside)).spatial_factor == 1
