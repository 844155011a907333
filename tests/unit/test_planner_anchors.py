"""The time model beside published runs: the oracle of its default calibration.

Sources:
- NVIDIA Megatron-Bridge, docs/performance-summary.md, container 25.11: Llama 3 with sequences of 8,192, FP8.
- PyTorch torchtitan, benchmarks of Llama 3.1 8B on 8 and 128 H100 (December 2024), with sequences of 8,192. These cards
  have HBM2e of 2.4 TB/s and a limit of 500 W; "the actual peak TFLOPs number is between SXM and NVL".
- PyTorch torchtitan, docs/performance.md: Llama 3 8B on 64 A100.
- NVIDIA Megatron-LM, README: GPT-3 175B with batches of 1,152 x 4,096 on 96 and on 4,608 H100: 47 % and 42 % MFU. Its
  layout is not given; TP 8 x PP 12 is what 96 GPUs hold.

These programs train a language model without a reference, through a head that keeps its logits.
"""

import math
from dataclasses import replace

import pytest

from megatron_cca.config.load import config_from_dict
from megatron_cca.lab.planner.hardware import DEFAULT, GPUS, Cluster
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import Workload

LLAMA_8B = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32}
LLAMA_70B = {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64}
# It has 126 layers; embedding and head count as one each when its stages are divided.
LLAMA_405B = {"num_layers": 128, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_attention_heads": 128}
# Its feed-forward layer has no gate: two matrices of 49,152 columns are as many weights as three of 32,768.
GPT_3 = {"num_layers": 96, "hidden_size": 12288, "ffn_hidden_size": 32768, "num_attention_heads": 96}

H100, A100, B200 = GPUS["h100-80gb"], GPUS["a100-80gb"], GPUS["b200"]
H100_500W = replace(
    H100, memory_bandwidth=2.4e12, flops={"bf16": (989.5e12 + 835.5e12) / 2, "fp8": 989.5e12 + 835.5e12}
)

# Half of the operations of a layer are computed again: nearest to that, all of half the layers.
HALF_RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 16}

# Name -> GPU, how many, model, (TP, PP, CP, VPP), micro batch, global batch, precision, recomputation, tokens/s/GPU.
RUNS = {
    "Megatron-Bridge 8B": (H100, 8, LLAMA_8B, (1, 1, 1, 1), 1, 128, "fp8", {}, 14451),
    "Megatron-Bridge 70B": (H100, 64, LLAMA_70B, (4, 8, 1, 5), 1, 128, "fp8", {}, 1602),
    "Megatron-Bridge 405B": (H100, 1024, LLAMA_405B, (8, 8, 2, 8), 1, 512, "fp8", {}, 292 * 126 / 128),
    "Megatron-Bridge 8B, B200": (B200, 8, LLAMA_8B, (1, 1, 1, 1), 2, 128, "fp8", {}, 30624),
    "Megatron-Bridge 405B, B200": (B200, 128, LLAMA_405B, (4, 8, 2, 8), 1, 64, "fp8", {}, 661 * 126 / 128),
    "torchtitan 8B": (H100_500W, 8, LLAMA_8B, (1, 1, 1, 1), 2, 16, "bf16", HALF_RECOMPUTED, 6667),
    "torchtitan 8B, FP8": (H100_500W, 8, LLAMA_8B, (1, 1, 1, 1), 2, 16, "fp8", HALF_RECOMPUTED, 8532),
    "torchtitan 8B on 128": (H100_500W, 128, LLAMA_8B, (1, 1, 1, 1), 2, 256, "bf16", HALF_RECOMPUTED, 6514),
    "torchtitan 8B on 128, FP8": (H100_500W, 128, LLAMA_8B, (1, 1, 1, 1), 2, 256, "fp8", HALF_RECOMPUTED, 8380),
    "torchtitan 8B, A100": (A100, 64, LLAMA_8B, (1, 1, 1, 1), 1, 64, "bf16", HALF_RECOMPUTED, 2973),
}


def predicted(
    gpu, gpus, model, layout, micro_batch, batch, precision, recompute, *, seq_length=8192, vocab_size=128256
):
    tp, pp, cp, vpp = layout
    config = config_from_dict(
        {
            "model": {
                "name": "emu3-8b",
                "num_query_groups": model["num_attention_heads"] if model is GPT_3 else 8,
                "vocab_size": vocab_size,
                **model,
            },
            "parallel": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "context_parallel_size": cp,
                "virtual_pipeline_model_parallel_size": vpp,
                "sequence_parallel": tp > 1,
                "tp_comm_overlap": tp > 1,
            },
            "objective": {"name": "next_token"},
            "optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True},
            "kernels": {"gradient_accumulation_fusion": True, "apply_rope_fusion": True},
            "training": {
                "micro_batch_size": micro_batch,
                "global_batch_size": batch,
                "precision": precision,
                **recompute,
            },
        }
    )
    return predict_step(config, Cluster(gpu, gpus, 8), Workload(seq_length, seq_length), head_in_tiles=False)


def ratio(name):
    *run, published = RUNS[name]
    return published / predicted(*run).tokens_per_second_per_gpu


@pytest.mark.parametrize("name", RUNS)
def test_published_throughput_lies_within_the_error_bars(name):
    *run, published = RUNS[name]
    step = predicted(*run)
    tokens = step.tokens_per_gpu
    assert tokens / step.high < published < tokens / step.low


def test_the_error_bar_is_not_smaller_than_the_errors():
    squares = [math.log(ratio(name)) ** 2 for name in RUNS]
    assert math.sqrt(sum(squares) / len(squares)) < DEFAULT.relative_error


def test_the_default_calibration_is_not_biased():
    # Twice the standard error of the mean of so many runs.
    bound = 2 * DEFAULT.relative_error / math.sqrt(len(RUNS))
    assert abs(sum(math.log(ratio(name)) for name in RUNS) / len(RUNS)) < bound


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_data_parallel_scaling_is_that_of_the_published_runs(precision):
    fp8 = ", FP8" if precision == "fp8" else ""
    small, large = (predicted(*RUNS[f"torchtitan 8B{gpus}{fp8}"][:-1]) for gpus in ("", " on 128"))
    kept = large.tokens_per_second_per_gpu / small.tokens_per_second_per_gpu
    assert kept == pytest.approx(0.98, abs=0.03)


@pytest.mark.parametrize(("gpus", "published"), [(96, 0.47), (4608, 0.42)])
def test_strong_scaling_of_gpt_3(gpus, published):
    shape = {"seq_length": 4096, "vocab_size": 131072}
    step = predicted(H100, gpus, GPT_3, (8, 12, 1, 8), 1, 1152, "bf16", {}, **shape)
    assert published * (1 - 2 * step.relative_error) < step.mfu < published * (1 + 2 * step.relative_error)


def test_model_flops_are_counted_as_megatron_bridge_does():
    # Its 744 TFLOP/s and 14,451 tokens/s of the 8B model.
    step = predicted(*RUNS["Megatron-Bridge 8B"][:-1])
    assert step.model_flops_per_gpu / step.tokens_per_gpu == pytest.approx(744e12 / 14451, rel=0.005)
