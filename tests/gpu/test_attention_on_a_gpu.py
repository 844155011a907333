"""One GPU: which heads Transformer Engine has a fused attention for. No emulation of its kernels can tell."""

import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.models.architecture import unfused_because
from tests.gpu.test_training_on_a_gpu import train
from tests.references.drawn_digits import shards_of_digits

pytestmark = pytest.mark.gpu
LENGTH, HEADS = 2048, 8


@pytest.mark.needs_hardware("memory")
@pytest.mark.parametrize(("channels", "precision"), [(64, "bf16"), (128, "bf16"), (100, "bf16"), (64, "fp32")])
def test_attention_holds_scores_where_the_rule_says_so(channels, precision):
    engine = pytest.importorskip("transformer_engine.pytorch")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shape = (LENGTH, 1, HEADS, channels)
    inputs = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)]
    attention = engine.DotProductAttention(HEADS, channels, attn_mask_type="causal", attention_dropout=0.0)
    attention(*inputs).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*inputs).sum().backward()
    scores = inputs[0].element_size() * HEADS * LENGTH**2
    held = torch.cuda.max_memory_allocated() - before
    assert (held > scores) == (unfused_because(channels, precision) is not None)


def test_fp8_products_go_with_torchs_attention(tmp_path):
    """Heads of 20 channels, as LlamaGen-3B has 100: the products' widths are multiples of 16 all the same."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron_cca.models import resolve_architecture
    from megatron_cca.models.fp8_devices import check_fp8_device

    try:
        check_fp8_device("tensorwise")
    except UserError as error:
        pytest.skip(str(error))
    widths = ["model.hidden_size=80", "model.ffn_hidden_size=112"]
    keys = ["model.name=llamagen-tiny", *widths, "training.precision=fp8", "training.micro_batch_size=2"]
    vocabulary = resolve_architecture(load_config(None, keys).model).vocabulary
    shards = shards_of_digits(vocabulary, tmp_path / "digits")
    reports = train(shards, tmp_path, 3, *keys, "data.pad_to_multiple_of=16", "optimizer.lr=1e-4")
    assert reports[0].log_ratio.worst == 0.0
    assert all(report.problem is None for report in reports)
