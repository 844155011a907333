"""Settings of the smallest runs whose products FP8's kernels take with a scale a tensor."""

from tests.gpu.fp8_runs import FALLING

COMMON = [
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128"),
    *("model.num_attention_heads=4", "model.num_query_groups=2", "data.pad_to_multiple_of=16"),
    *("training.micro_batch_size=2", "training.global_batch_size=4", "reference.allow_bias=100"),
    *FALLING,
]
TENSORWISE = ["training.precision=fp8", "training.fp8_recipe=tensorwise"]
DELAYED = ["training.precision=fp8", "training.fp8_recipe=delayed"]
