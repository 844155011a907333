"""Chunked log-probabilities against a dense float64 log-softmax; tensor parallelism is in tests/distributed."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cca.parallel import sequence_logps, token_logps
from tests.references.dense_logps import dense_token_logps, worst_relative_error

S, B, H = 7, 3, 16
V = 4133  # three tiles wide on a CPU, the last one narrow
MASKS = {
    "full": torch.ones(B, S, dtype=bool),
    "empty": torch.zeros(B, S, dtype=bool),
    "ragged": torch.arange(S)[None] < torch.tensor([[0], [3], [S]]),
    "scattered": torch.arange(B * S).view(B, S) % 3 == 0,
}


def inputs(dtype=torch.float32, padded=V, seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, batch, H, generator=generator).to(dtype)
    weight = torch.randn(padded, H, generator=generator).to(dtype)
    targets = torch.randint(0, V, (batch, S), generator=generator)
    # The first and last word of the vocabulary and of the tiles.
    targets[0] = torch.tensor([0, 1407, 1408, 2815, 2816, V - 1, 1])
    return hidden, weight, targets


def leaves(*tensors, dtype=None):
    return [tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_() for tensor in tensors]


def upstream(rows=B):
    return torch.randn(rows, generator=torch.Generator().manual_seed(1))


def oracle(hidden, weight, targets, mask, support=None):
    """Values and gradients in float64, for the upstream gradient above."""
    hidden64, weight64 = leaves(hidden, weight, dtype=torch.float64)
    values = dense_token_logps(hidden64, weight64, targets, mask, V, support).sum(1)
    values.backward(upstream(len(values)).double())
    return values.detach(), hidden64.grad, weight64.grad


def ours(hidden, weight, targets, mask, **options):
    hidden, weight = leaves(hidden, weight)
    values = sequence_logps(hidden, weight, targets, mask, vocab_size=V, **options)
    values.backward(upstream(len(values)))
    return values.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("padded", [V, 4224])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_equal_float64(chunk_size, padded, mask):
    hidden, weight, targets = inputs(padded=padded)
    found = ours(hidden, weight, targets, MASKS[mask], chunk_size=chunk_size)
    expected = oracle(hidden, weight, targets, MASKS[mask])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        assert worst_relative_error(gradient, reference) < 1e-5
    assert found[0].dtype == torch.float32
    assert (found[2][V:] == 0).all()
    assert (found[1].transpose(0, 1)[~MASKS[mask]] == 0).all()


def biased(padded=V, dtype=torch.float32):
    return 3 * torch.randn(padded, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("padded", [V, 4224])
@pytest.mark.parametrize("support", [range(V), range(1000, 4100)])
@pytest.mark.parametrize("mask", MASKS)
def test_a_bias_is_added_to_the_logits_and_gets_its_gradient(chunk_size, padded, support, mask):
    hidden, weight, targets = inputs(padded=padded)
    targets = targets.clamp(support[0], support[-1])
    hidden, weight, bias = leaves(hidden, weight, biased(padded))
    options = {"bias": bias, "vocab_size": V, "support": support, "chunk_size": chunk_size}
    found = sequence_logps(hidden, weight, targets, MASKS[mask], **options)
    found.backward(upstream())
    exact = leaves(hidden, weight, bias, dtype=torch.float64)
    expected = dense_token_logps(*exact[:2], targets, MASKS[mask], V, support, exact[2]).sum(1)
    expected.backward(upstream().double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for tensor, reference in zip((hidden, weight, bias), exact, strict=True):
        assert worst_relative_error(tensor.grad, reference.grad) < 1e-5
    assert (bias.grad[V:] == 0).all()
    assert (bias.grad[: support.start] == 0).all() and (bias.grad[support.stop :] == 0).all()


def test_a_bias_of_half_precision_is_added_in_fp32():
    hidden, weight, targets = inputs(torch.bfloat16)
    hidden, weight, bias = leaves(hidden, weight, biased(dtype=torch.bfloat16))
    sequence_logps(hidden, weight, targets, MASKS["full"], bias=bias, vocab_size=V).backward(upstream())
    exact = leaves(hidden, weight, bias, dtype=torch.float64)
    dense_token_logps(*exact[:2], targets, MASKS["full"], V, None, exact[2]).sum(1).backward(upstream().double())
    assert bias.grad.dtype == torch.bfloat16
    assert worst_relative_error(bias.grad, exact[2].grad) < 4e-3
    assert worst_relative_error(hidden.grad, exact[0].grad) < 4e-3


# Within a tile of words, across three, a single word, and all of them.
@pytest.mark.parametrize("support", [range(5, 700), range(1000, 4100), range(9, 10), range(V)])
@pytest.mark.parametrize("mask", ["full", "ragged"])
def test_words_outside_of_a_support_have_no_probability(support, mask):
    hidden, weight, targets = inputs(padded=4224)
    # Of no use to anyone: huge, so that one of them in a sum would show.
    weight[: support.start] *= 100
    weight[support.stop :] *= 100
    targets = support.start + targets % len(support)
    found = ours(hidden, weight, targets, MASKS[mask], support=support, chunk_size=4)
    expected = oracle(hidden, weight, targets, MASKS[mask], support)
    for mine, exact in zip(found, expected, strict=True):
        assert worst_relative_error(mine, exact) < 1e-5
    assert (found[2][: support.start] == 0).all() and (found[2][support.stop :] == 0).all()


def test_gradients_of_a_support_equal_finite_differences():
    hidden, weight, _ = inputs(torch.float64)
    targets = torch.randint(100, 107, (B, S), generator=torch.Generator().manual_seed(2))

    def logps(hidden, weight):
        whole = torch.cat([torch.ones(100, H, dtype=torch.float64), weight, torch.ones(9, H, dtype=torch.float64)])
        return token_logps(hidden, whole, targets, MASKS["full"], vocab_size=110, support=range(100, 107), chunk_size=4)

    # To fp32 they are cast in the end, so the differences are wide.
    assert torch.autograd.gradcheck(logps, leaves(hidden, weight[:7]), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_a_batch_of_one():
    hidden, weight, targets = inputs(batch=1)
    mask = MASKS["full"][:1]
    for found, expected in zip(ours(hidden, weight, targets, mask), oracle(hidden, weight, targets, mask), strict=True):
        assert worst_relative_error(found, expected) < 1e-5


def test_logits_of_ten_thousand_keep_their_digits():
    """Whole-number inputs make the logits exact, so that only the softmax can lose anything."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-40, 41, (S, B, H), generator=generator).float()
    weight = torch.randint(-40, 41, (V, H), generator=generator).float()
    # Near ties at the top: each token's best word again, one and two below it.
    best = (hidden.view(-1, H) @ weight.t()).argmax(1)
    hidden[..., 0] = 1
    for offset in (1, 2):
        weight[offset : 2 * S * B : 2 * S] = weight[best[:3]]
        weight[offset : 2 * S * B : 2 * S, 0] -= offset
    scaled = weight * 8
    assert (hidden.view(-1, H) @ scaled.t()).abs().max() > 1e4
    targets = (hidden.view(-1, H) @ scaled.t()).argmax(1).view(S, B).t().contiguous()
    targets[:, ::3] = torch.randint(0, V, targets[:, ::3].shape, generator=generator)
    per_token = token_logps(hidden, scaled, targets, MASKS["full"], vocab_size=V)
    exact = dense_token_logps(hidden.double(), scaled.double(), targets, MASKS["full"], V)
    torch.testing.assert_close(per_token.double(), exact, rtol=1e-5, atol=1e-30)
    for found, expected in zip(
        ours(hidden, scaled, targets, MASKS["full"]), oracle(hidden, scaled, targets, MASKS["full"]), strict=True
    ):
        assert worst_relative_error(found, expected) < 1e-5


def test_near_ties_beside_a_huge_logit():
    """log p = -log(1 + 1/e) beside a logit of 1e4: fp32's spacing there is 1e-3, the answer needs 1e-5."""
    weight = torch.zeros(V, 2)
    weight[5], weight[6] = torch.tensor([10000.0, 0.0]), torch.tensor([10000.0, -1.0])
    hidden, targets, mask = torch.ones(1, 1, 2), torch.tensor([[5]]), torch.ones(1, 1, dtype=bool)
    logps = sequence_logps(hidden, weight, targets, mask, vocab_size=V)
    assert logps.item() == pytest.approx(-0.31326168751822286, rel=1e-5)


def test_per_token_variant_is_zero_outside_the_mask():
    hidden, weight, targets = inputs()
    mask = MASKS["ragged"]
    logps = token_logps(hidden, weight, targets, mask, vocab_size=V)
    expected = dense_token_logps(hidden.double(), weight.double(), targets, mask, V)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=0)
    assert (logps[~mask] == 0).all()


def test_bfloat16_is_no_worse_than_dense_bfloat16_with_an_fp32_softmax():
    hidden, weight, targets = inputs(torch.bfloat16)
    mask = MASKS["full"]
    exact = oracle(hidden, weight, targets, mask)
    usual_leaves = leaves(hidden, weight)
    logits = (usual_leaves[0].transpose(0, 1) @ usual_leaves[1].t()).float()
    values = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1).sum(1)
    values.backward(upstream())
    usual = (values.detach(), *(leaf.grad for leaf in usual_leaves))
    found = ours(hidden, weight, targets, mask)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, theirs, truth in zip(found, usual, exact, strict=True):
        assert (mine.double() - truth).norm() <= (theirs.double() - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_goes_into_main_grad_in_its_dtype(dtype):
    """Eight microbatches, as under Megatron's data parallelism; the sum must be as exact as fp32, not as bf16."""
    batches = [inputs(dtype, seed=seed) for seed in range(8)]
    weight = batches[0][1].clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(V, H), False
    exact, rounded = torch.zeros(V, H, dtype=torch.float64), torch.zeros(V, H, dtype=dtype)
    for hidden, _, targets in batches:
        values = sequence_logps(hidden, weight, targets, MASKS["full"], vocab_size=V, chunk_size=4)
        values.backward(upstream())
        assert weight.grad_added_to_main_grad
        weight.grad = None
        exact += oracle(hidden, weight.detach(), targets, MASKS["full"])[2]
        rounded += ours(hidden, weight.detach(), targets, MASKS["full"])[2]
    error = worst_relative_error(weight.main_grad, exact)
    assert error < (1e-5 if dtype == torch.float32 else 4e-3)
    if dtype == torch.bfloat16:
        assert (weight.main_grad - exact).norm() < 0.5 * (rounded.double() - exact).norm()


def test_a_frozen_head_gets_no_gradient_and_a_frozen_trunk_neither():
    hidden, weight, targets = inputs()
    expected = oracle(hidden, weight, targets, MASKS["full"])
    for index in (0, 1):
        tensors = [hidden.clone(), weight.clone()]
        tensors[index].requires_grad_()
        sequence_logps(*tensors, targets, MASKS["full"], vocab_size=V).backward(upstream())
        assert tensors[1 - index].grad is None
        assert worst_relative_error(tensors[index].grad, expected[1 + index]) < 1e-5


class ProductFlops(TorchDispatchMode):
    """Floating-point operations of all matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.size(1)
        return func(*args, **(kwargs or {}))


def test_only_masked_in_tokens_are_computed():
    hidden, weight, targets = inputs(padded=4224)
    for mask in MASKS.values():
        with ProductFlops() as counted:
            sequence_logps(*leaves(hidden, weight), targets, mask, vocab_size=V).sum().backward()
        # Forward, its recomputation, and the two gradients.
        assert counted.flops == 4 * (2 * int(mask.sum()) * V * H)


class LargestTensor(TorchDispatchMode):
    """The numbers in the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_logits_are_never_held():
    length, words, width = 256, 16384, 4
    hidden, weight = leaves(torch.randn(length, 1, width), torch.randn(words, width))
    targets, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=bool)
    with LargestTensor() as largest:
        sequence_logps(hidden, weight, targets, mask, vocab_size=words, chunk_size=32).sum().backward()
    assert largest.numel == max(32 * 2048, weight.numel())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": range(7, 7)}, r"support: range\(7, 7\), must be consecutive ids of 0 to 4132, at least one"),
        (
            {"support": range(0, V + 1)},
            r"support: range\(0, 4134\), must be consecutive ids of 0 to 4132, at least one",
        ),
        ({"support": range(0, V, 2)}, r"support: range\(0, 4133, 2\), must be consecutive"),
        ({"support": range(1, V)}, r"targets: id 0 at row 0, position 0, must be 1 to 4132 where the mask is on"),
        ({"chunk_size": 0}, r"chunk_size: 0, must be 1 or more"),
        ({"hidden": torch.zeros(S, H)}, r"hidden: shape \(7, 16\), must be \[S, B, H\]"),
        ({"weight": torch.zeros(V, H + 1)}, r"weight: shape \(4133, 17\), must be \[V_local, 16\] to fit hidden"),
        ({"bias": torch.zeros(V - 1)}, r"bias: shape \(4132,\), must be \[V_local\] = \(4133,\) to fit weight"),
        ({"weight": torch.zeros(V, H).bfloat16()}, r"weight: torch.bfloat16, must be hidden's torch.float32"),
        ({"weight": torch.zeros(V - 1, H)}, r"weight: 4132 rows on each of 1 rank\(s\) are 4132 ids, must be at"),
        (
            {"targets": torch.zeros(S, B, dtype=torch.int64)},
            r"targets: shape \(7, 3\), must be \[B, S\] = \(3, 7\) to fit hidden",
        ),
        ({"targets": torch.zeros(B, S)}, r"targets: torch.float32, must be torch.int64"),
        ({"mask": torch.ones(B, S - 1, dtype=bool)}, r"mask: shape \(3, 6\), must be \[B, S\] = \(3, 7\)"),
        ({"mask": torch.ones(B, S)}, r"mask: torch.float32, must be torch.bool"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "mask": MASKS["full"], **change}
    with pytest.raises(ValueError, match=message):
        sequence_logps(**arguments, vocab_size=V)


@pytest.mark.parametrize("wrong", [-1, V, V + 50])
def test_a_target_outside_the_vocabulary_is_named_where_the_mask_is_on(wrong):
    hidden, weight, targets = inputs(padded=4224)
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"targets: id {wrong} at row 1, position 2, must be 0 to 4132"):
        sequence_logps(hidden, weight, targets, MASKS["ragged"], vocab_size=V)
    masked_out = MASKS["ragged"].clone()
    masked_out[1, 2] = False
    assert sequence_logps(hidden, weight, targets, masked_out, vocab_size=V).isfinite().all()


def test_the_fused_kernels_equal_the_plain_ones():
    """Triton's interpreter runs them on a CPU; it must be switched on before Triton is imported, hence the process."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.references.interpreted_triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "fused and plain agree\n"


@pytest.mark.parametrize("architecture", [80, 90, 100], ids=["A100", "H100", "B200"])
def test_the_fused_kernels_compile_without_a_gpu(architecture, monkeypatch):
    pytest.importorskip("triton")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_cca.parallel import triton_tiles

    tile = {"logits": "*fp32", "stride": "i32"}
    statistics = {"local_targets": "*i64", "peak": "*fp32", "sum_exp": "*fp32"}
    last = {"width": "i32", "COLUMNS": "constexpr"}
    signatures = [(triton_tiles._absorb_kernel, {**tile, **statistics, "target_logits": "*fp32", **last})]
    for dtype in ("*fp32", "*bf16", "*fp16"):
        tiles = {"logits": "*fp32", "logits_stride": "i32", "result": dtype, "result_stride": "i32"}
        signatures.append((triton_tiles._gradient_kernel, {**tiles, **statistics, "upstream": "*fp32", **last}))
    # What a user has set for other kernels, or what another version of Triton has as its default.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    for kernel, signature in signatures:
        source = ASTSource(fn=kernel, signature=signature, constexprs={(len(signature) - 1,): 2048})
        target = GPUTarget("cuda", architecture, 32)
        compiled = compile_kernel(source, target=target, options=dict(triton_tiles._LAUNCH))
        assert compiled.asm["cubin"]
        assert compiled.metadata.enable_fp_fusion is True
