"""Tiles of the LM head, products added in place, and the gradient that holds nothing."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cca.parallel import sequence_logps
from megatron_cca.parallel.tiles import CPU, GPU, TileSizes, block_width, blocks, chunk_size_of
from megatron_cca.platform import operations
from megatron_cca.platform.operations import DeviceOperations, MainGradPlaceholder, operating_by
from tests.references.dense_logps import dense_token_logps, worst_relative_error
from tests.references.gpu_products import half_precision_products

# Not as an attribute of its package, where the function of the same name hides it.
MODULE = sys.modules["megatron_cca.parallel.sequence_logps"]
# The last rank's words of Emu3's over 1, 2, 4 and 8, and its rows as Megatron pads them; and others' vocabularies.
SHARDS = [(184_622, 184_704), (92_206, 92_416), (46_030, 46_208), (22_878, 23_168), (16_384, 16_384), (50_257, 50_304)]
S, B, H = 9, 2, 16


@pytest.mark.parametrize(("words", "rows"), SHARDS)
@pytest.mark.parametrize("sizes", [CPU, GPU], ids=["CPU", "GPU"])
def test_tiles_are_of_one_width_and_cover_each_true_word_once(words, rows, sizes):
    slices = list(blocks(words, rows, sizes))
    assert [block.start for block in slices[1:]] == [block.stop for block in slices[:-1]]
    widths = [block.stop - block.start for block in slices]
    assert slices[0].start == 0 and len({*widths[:-1]} | {block_width(words, sizes)}) == 1
    assert widths[-1] <= widths[0] <= sizes.width
    # No tile more than the widest ones would need.
    assert len(slices) == -(-words // sizes.width)
    assert slices[-1].stop == (words if sizes is CPU else -(-words // 128) * 128)


@pytest.mark.parametrize("words", range(120, 140))
@pytest.mark.parametrize("spare", [0, 5, 128])
def test_the_last_tile_ends_at_a_multiple_or_where_the_rows_end(words, spare):
    *_, last = blocks(words, words + spare, GPU)
    assert last.stop == min(-(-words // 128) * 128, words + spare)


def test_a_rank_of_padding_alone_has_no_tile():
    assert list(blocks(0, 128, GPU)) == []


@pytest.mark.parametrize(("configured", "on_gpu", "found"), [(None, False, 1024), (None, True, 4096), (7, True, 7)])
def test_the_chunk_is_the_devices_where_nothing_is_configured(configured, on_gpu, found):
    assert chunk_size_of(configured, on_gpu=on_gpu) == found


class LikeGpu(DeviceOperations):
    """A GPU's tiles and factors for tensors of any device."""

    def is_on_gpu(self, tensor):
        return True


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The way of a GPU on CPU tensors, in narrower tiles; half precision wants ``half_precision_products`` besides."""
    monkeypatch.setattr(MODULE, "tile_sizes", lambda *, on_gpu: TileSizes(4096, 512, 128))
    operations.way_to_add.cache_clear()
    with operating_by(LikeGpu()):
        yield
    operations.way_to_add.cache_clear()


def batch(words, rows, dtype, garbage):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = torch.randn(rows, H, generator=generator).to(dtype)
    weight[words:] = garbage
    targets = torch.randint(0, words, (B, S), generator=generator)
    # The first and last word of the vocabulary and of the tiles.
    width = block_width(words, TileSizes(4096, 512, 128))
    edges = torch.tensor([0, width - 1, width, words - 1])
    targets[0, : len(edges)] = edges.clamp(max=words - 1)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(B, S, generator=generator) < 0.8


def exact(hidden, weight, targets, mask, words):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight[:words]))
    values = dense_token_logps(hidden, weight, targets, mask, words).sum(1)
    values.backward(torch.tensor([1.0, -0.5], dtype=torch.float64))
    return values.detach(), hidden.grad, weight.grad


def run(hidden, weight, targets, mask, words, **options):
    values = sequence_logps(hidden, weight, targets, mask, vocab_size=words, **options)
    values.backward(torch.tensor([1.0, -0.5]))
    return values.detach(), hidden.grad


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize(("words", "rows"), [(1154, 1280), (1154, 1160), (1154, 1154), (1, 128), (1024, 1152)])
@pytest.mark.parametrize("is_gpu", [True, False], ids=["GPU", "CPU"])
def test_padding_never_counts_and_its_gradient_is_zero(words, rows, garbage, is_gpu, request):
    """Rows past the vocabulary may hold anything, and be more or fewer than the tiles would like."""
    if is_gpu:
        request.getfixturevalue("like_a_gpu")
    inputs = batch(words, rows, torch.float32, garbage)
    found = (*run(*inputs, words, chunk_size=5), inputs[1].grad[:words])
    for mine, expected in zip(found, exact(*inputs, words), strict=True):
        assert worst_relative_error(mine, expected) < 1e-5
    assert (inputs[1].grad[words:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds_to_fp32", [True, False], ids=["torch 2.10", "torch 2.8"])
def test_half_precision_on_a_gpu_is_summed_in_fp32(dtype, adds_to_fp32, like_a_gpu):
    words, rows = 1154, 1280
    inputs = batch(words, rows, dtype, float("nan"))
    expected, weight = exact(*inputs, words), inputs[1]
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(rows, H), False
    with half_precision_products(adds_to_fp32=adds_to_fp32):
        values, hidden_gradient = run(*inputs, words, chunk_size=5)
        way = operations.way_to_add(torch.device("cpu"), dtype)
    assert way is (operations._by_torch if adds_to_fp32 else operations._product_and_sum)
    assert worst_relative_error(values, expected[0]) < 1e-5
    # The gradient of the logits is rounded to half precision, and nothing after it.
    rounding = torch.finfo(dtype).eps
    assert worst_relative_error(hidden_gradient, expected[1]) < 2 * rounding
    assert worst_relative_error(weight.main_grad[:words] - 1, expected[2]) < 2 * rounding
    assert (weight.main_grad[words:] == 1).all()


def storages(tree):
    return {
        leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)
    }


class Products(TorchDispatchMode):
    """The names of products, and the bytes of what operations made."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        if "mm" in function.overloadpacket.__name__:
            self.names.append(str(function))
        self.sizes += [storage.nbytes() for key, storage in storages(result).items() if key not in known]
        return result


def test_a_backward_pass_on_a_gpu_makes_no_product_of_its_own_and_no_placeholder(like_a_gpu):
    """Counted for 18 tokens in two chunks and 3 tiles of 512 words: nothing is larger than a tile."""
    words, rows, width = 1536, 1536, 512
    hidden, weight, targets, _ = batch(words, rows, torch.bfloat16, 0.0)
    mask = torch.ones(B, S, dtype=bool)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(rows, H), False
    with half_precision_products():
        operations.way_to_add(torch.device("cpu"), torch.bfloat16)
        values = sequence_logps(hidden, weight, targets, mask, vocab_size=words, chunk_size=9).sum()
        with Products() as counted:
            values.backward()
    tiles = 2 * 3
    assert counted.names.count("aten.mm.dtype") == tiles
    assert counted.names.count("aten.addmm.dtype_out") == 2 * tiles
    assert len(counted.names) == 3 * tiles
    # The logits of a tile in fp32; an fp32 product would be 32 KiB, the weight's gradient 48 KiB.
    assert max(counted.sizes) == 9 * width * 4 < 4 * width * H < 2 * rows * H
    assert isinstance(weight.grad, MainGradPlaceholder) and weight.grad.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_placeholder_is_stepped_over_by_all_that_autograd_does(dtype):
    """Two microbatches, two heads in one graph, and a weight that has another use: as Megatron's hook finds them."""
    words, inputs = 40, batch(40, 40, dtype, 0.0)
    weight = inputs[1]
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(words, H), False
    hooked = []
    accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: hooked.append(type(weight.grad)))
    for _ in range(2):
        run(*inputs, words)
    once = weight.main_grad / 2
    (sequence_logps(*inputs, vocab_size=words).sum() + sequence_logps(*inputs, vocab_size=words).sum()).backward()
    assert hooked == [MainGradPlaceholder] * 3
    weight.grad, weight.main_grad = None, torch.zeros(words, H)
    (sequence_logps(*inputs, vocab_size=words) @ torch.tensor([1.0, -0.5]) + weight.float().sum()).backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(weight.main_grad, once)
    # Megatron adds it nevertheless where another layer shares the weight (zero_out_wgrad).
    weight.grad = None
    run(*inputs, words)
    before = weight.main_grad.clone()
    assert torch.equal(weight.main_grad.add_(weight.grad.data), before)


def test_the_placeholder_has_no_numbers_to_read():
    placeholder = MainGradPlaceholder(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert (placeholder.shape, placeholder.stride(), placeholder.dtype) == ((3, 4), (4, 1), torch.bfloat16)
    assert "shape=(3, 4)" in repr(placeholder)
    with pytest.raises(RuntimeError, match=r"weight.grad is a placeholder; the gradient is in weight.main_grad"):
        placeholder.norm()
    with pytest.raises(RuntimeError, match=r"weight.grad is a placeholder"):
        placeholder.add_(torch.ones(3, 4))
