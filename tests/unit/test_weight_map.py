"""The weight map against Megatron's layout written out by hand, and its own inverse."""

import math

import pytest
import torch

from megatron_cca.config import ModelConfig
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.weight_map import MappedTensor, Rows, rows_in_megatron

WEIGHTS = FAMILIES["emu3"].huggingface.weights


def architecture(**sizes):
    return resolve_architecture(ModelConfig(name="emu3-tiny", **sizes))


def test_emu3s_own_sizes():
    shapes = WEIGHTS.huggingface_shapes(resolve_architecture(ModelConfig(name="emu3-8b")))
    assert len(shapes) == 291
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_492_011_520


def rows_of(tensor, weights):
    return torch.cat([weights[r.name][r.start : r.start + r.count] for r in tensor.cut(0, tensor.num_rows)])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_megatrons_tensors_are_what_its_layout_says(groups):
    sizes = architecture(num_query_groups=groups)
    weights = {name: torch.randn(shape) for name, shape in WEIGHTS.huggingface_shapes(sizes).items()}
    tensors = {(tensor.key, tensor.layer): tensor for tensor in WEIGHTS.tensors(sizes)}
    assert len(tensors) == 3 + 6 * sizes.num_layers
    for layer in range(sizes.num_layers):
        q, k, v = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        parts = [torch.cat(part) for part in zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)]
        qkv = rows_of(tensors["decoder.layers.self_attention.linear_qkv.weight", layer], weights)
        assert torch.equal(qkv, torch.cat(parts))
        gate, up = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        fc1 = rows_of(tensors["decoder.layers.mlp.linear_fc1.weight", layer], weights)
        assert torch.equal(fc1, torch.cat([gate, up]))
    assert torch.equal(rows_of(tensors["output_layer.weight", None], weights), weights["lm_head.weight"])


def test_the_map_backwards_undoes_it():
    sizes = architecture()
    weights = {name: torch.randn(shape) for name, shape in WEIGHTS.huggingface_shapes(sizes).items()}
    tensors = WEIGHTS.tensors(sizes)
    ours = {(tensor.key, tensor.layer): rows_of(tensor, weights) for tensor in tensors}
    back = rows_in_megatron(tensors)
    assert back.keys() == weights.keys()
    for name, whole in weights.items():
        parts = [ours[s.tensor.key, s.tensor.layer][s.megatron_start : s.megatron_start + s.count] for s in back[name]]
        assert torch.equal(torch.cat(parts), whole)


def test_a_cut_is_part_of_the_whole():
    sizes = architecture()
    weights = {name: torch.randn(shape) for name, shape in WEIGHTS.huggingface_shapes(sizes).items()}
    tensor = next(tensor for tensor in WEIGHTS.tensors(sizes) if "linear_qkv.weight" in tensor.key)
    whole = rows_of(tensor, weights)
    for start, stop in ((0, 1), (5, 37), (30, 100), (tensor.num_rows - 1, tensor.num_rows)):
        parts = [weights[r.name][r.start : r.start + r.count] for r in tensor.cut(start, stop)]
        assert torch.equal(torch.cat(parts), whole[start:stop])
    assert list(tensor.cut(tensor.num_rows, tensor.num_rows + 9)) == []


def test_rows_may_lie_in_any_order_but_none_may_be_left_out():
    def tensor(*parts):
        return MappedTensor("merged", None, parts, columns=4, padded=False)

    found = rows_in_megatron([tensor(Rows("a", 2, 3), Rows("b", 0, 1), Rows("a", 0, 2))])["a"]
    assert [(source.start, source.count, source.megatron_start) for source in found] == [(0, 2, 4), (2, 3, 0)]
    with pytest.raises(AssertionError, match="leaves rows of a out"):
        rows_in_megatron([tensor(Rows("a", 2, 3), Rows("a", 0, 1))])
