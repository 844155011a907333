"""Settings of runs whose layers FP8's kernels take, and at which losses can be compared."""

import torch

from tests.gpu.test_reference_on_a_gpu import start, trace

# Blocks of 128 x 128 in every product: 2 x 4 rows of 32 tokens are 256.
SIZES = [
    *("model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4", "model.num_query_groups=4"),
    *("data.pad_to_multiple_of=32", "training.micro_batch_size=4", "training.global_batch_size=8"),
]
FP8 = [*SIZES, "training.precision=fp8", "reference.allow_bias=100"]
# Weights so small that errors do not grow from layer to layer.
SMALL_WEIGHTS = "model.init_method_std=0.02"
IN_BF16 = ["reference.precision=bf16", SMALL_WEIGHTS]
# At the other tests' learning rate, which is to show errors, not even float32's loss falls.
FALLING = [SMALL_WEIGHTS, "optimizer.lr=2e-4"]


def losses(digit_shards, folder, *overrides, steps=5):
    """Return the loss of each step."""
    return torch.tensor([report.metrics["loss"] for report in trace(start(digit_shards, folder, *overrides), steps)])
