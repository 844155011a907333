"""Adapters against plain models whose weights are W + alpha / dim * B A: values, gradients, names, freezing."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch.nn.functional import rms_norm

from megatron_cca.checkpoint.distributed import adapter_settings
from megatron_cca.config import LoraConfig
from megatron_cca.config.load import load_config
from megatron_cca.config.schema import LORA_TARGETS
from megatron_cca.errors import UserError
from megatron_cca.models import lora, resolve_architecture
from megatron_cca.models.gpt import build_gpt, image_logps
from megatron_cca.models.initialization import initialize_by_name
from megatron_cca.models.weight_map import merged_weight
from megatron_cca.parallel.ranks import initialize_distributed

SETTINGS = LoraConfig(dim=3, alpha=5.0)
SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.init_method_std=0.2",
]


def build(*overrides):
    """The same tiny model each time, with weights."""
    config = load_config(None, [*SMALL, *overrides])
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    (chunk,) = build_gpt(architecture, config.model, config.parallel, config.training)
    sizes = {"num_layers": architecture.num_layers, "vocab_size": architecture.vocabulary.size}
    initialize_by_name(chunk, seed=1, std=config.model.init_method_std, **sizes)
    return chunk


def randomized(chunk, settings=SETTINGS, seed=2):
    """The model with adapters whose B is not zero."""
    lora.attach([chunk], settings, seed=seed)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in chunk.named_parameters():
        if "linear_out" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return chunk


def logps(chunk, batch=3, length=14):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 400, (batch, length + 1), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.8
    return image_logps(chunk, tokens[:, :-1], tokens[:, 1:], mask, vocab_size=400, chunk_size=16)


def adapters(chunk):
    """By the projection's name: A and B."""
    state = dict(chunk.named_parameters())
    ends = ("linear_in.weight", "linear_out.weight")
    names = [name.removesuffix(ends[0]) for name in state if name.endswith(ends[0])]
    return {name.removesuffix(".adapter."): tuple(state[f"{name}{end}"] for end in ends) for name in names}


def plain_sum(chunk, settings=SETTINGS):
    """A plain model with the weights of the adapted one."""
    plain = build()
    state = dict(plain.named_parameters())
    for name, (linear_in, linear_out) in adapters(chunk).items():
        product = linear_out.detach().double() @ linear_in.detach().double()
        weight = state[f"{name}.weight"].data
        weight.copy_(weight.double() + settings.alpha / settings.dim * product)
    return plain


def test_logps_and_gradients_are_those_of_the_plain_sum():
    chunk = randomized(build())
    plain = plain_sum(chunk)
    ours, theirs = logps(chunk), logps(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    scale = SETTINGS.alpha / SETTINGS.dim
    found = adapters(chunk)
    assert len(found) == 4 * len(chunk.decoder.layers)
    for name, (linear_in, linear_out) in found.items():
        gradient = gradients[f"{name}.weight"]
        for factor, expected in (
            (linear_in, scale * linear_out.detach().t() @ gradient),
            (linear_out, scale * gradient @ linear_in.detach().t()),
        ):
            torch.testing.assert_close(factor.grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("targets", [["linear_qkv"], ["linear_proj"], ["linear_fc1"], ["linear_fc2"], LORA_TARGETS])
@pytest.mark.parametrize(
    "recompute",
    [
        ["training.recompute_granularity=full"],
        ["training.recompute_granularity=full", "training.recompute_method=block"],
        ["training.recompute_granularity=selective", "training.recompute_modules=[core_attn, mlp]"],
    ],
    ids=["full", "block", "selective"],
)
def test_recomputed_gradients_are_all_there(recompute, targets):
    settings = LoraConfig(dim=3, alpha=5.0, target_modules=list(targets))
    kept, recomputed = randomized(build(), settings), randomized(build(*recompute), settings)
    for chunk in (kept, recomputed):
        logps(chunk).sum().backward()
    assert adapters(kept)
    for name, pair in adapters(kept).items():
        for ours, theirs in zip(adapters(recomputed)[name], pair, strict=True):
            assert theirs.grad.abs().max() > 0, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attaching_changes_no_output_and_leaves_only_the_adapters_to_train(precision):
    chunk = build(f"training.precision={precision}")
    before, names = logps(chunk), set(chunk.state_dict())
    lora.attach([chunk], LoraConfig(dim=4, target_modules=["linear_qkv", "linear_fc2"]), seed=2)
    assert torch.equal(logps(chunk), before)
    # Megatron's wrapper for half precision leaves its own name out of state dicts.
    trained = {name.removeprefix("module.") for name, value in chunk.named_parameters() if value.requires_grad}
    assert trained == {
        f"decoder.layers.{layer}.{projection}.adapter.linear_{end}.weight"
        for layer in range(4)
        for projection in ("self_attention.linear_qkv", "mlp.linear_fc2")
        for end in ("in", "out")
    }
    assert chunk.state_dict().keys() == names | trained
    assert {name for name in chunk.sharded_state_dict() if ".adapter." in name} == trained
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {parameter.dtype for parameter in chunk.parameters()} == {dtype}


def test_a_is_drawn_from_seed_and_name():
    first, same, other = (adapters(randomized(build(), LoraConfig(dim=16), seed)) for seed in (2, 2, 3))
    assert all(torch.equal(first[name][0], same[name][0]) for name in first)
    drawn = [pair[0] for pair in (*first.values(), *other.values())]
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in drawn}) == len(drawn)
    for tensor in drawn:
        assert tensor.std().item() == pytest.approx((3 * tensor.size(1)) ** -0.5, rel=0.15)


def test_no_target_modules_are_refused():
    with pytest.raises(UserError, match=r"lora.target_modules: none, .*; name some of linear_qkv, linear_proj"):
        lora.attach([build()], LoraConfig(dim=4, target_modules=[]), seed=2)


def wrapped_in_ddp(chunk):
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(chunk.config, config, chunk)


@pytest.mark.parametrize("wrap", [lambda chunk: chunk, wrapped_in_ddp], ids=["bare", "DDP"])
def test_switched_off_it_is_the_base_model_bit_for_bit(wrap):
    base = logps(build())
    chunk = wrap(randomized(build()))
    adapted = logps(chunk)
    assert not torch.equal(adapted, base)
    with lora.adapters_off([chunk]):
        off = logps(chunk)
        assert torch.equal(off, base) and not off.requires_grad
        with lora.adapters_off([chunk]):
            assert torch.equal(logps(chunk), base)
        assert torch.equal(logps(chunk), base)
        with pytest.raises(ZeroDivisionError), lora.adapters_off([chunk]):
            raise ZeroDivisionError
        assert torch.equal(logps(chunk), base)
    assert torch.equal(logps(chunk), adapted)
    with pytest.raises(ZeroDivisionError), lora.adapters_off([chunk]):
        raise ZeroDivisionError
    assert torch.equal(logps(chunk), adapted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merging_leaves_a_plain_model(precision):
    chunk, plain = randomized(build(f"training.precision={precision}")), build(f"training.precision={precision}")
    factors, weights = adapters(chunk), dict(plain.named_parameters())
    for name, (linear_in, linear_out) in factors.items():
        product = sum(
            linear_out[:, k : k + 1].detach().double() * linear_in[k : k + 1].detach().double() for k in range(3)
        )
        whole = weights[f"{name}.weight"].data
        whole.copy_((whole.double() + 5 / 3 * product).float().to(whole.dtype))
    before = logps(chunk)
    lora.merge([chunk])
    assert list(chunk.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in chunk.parameters())
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.equal(logps(chunk), logps(plain))
    torch.testing.assert_close(logps(chunk), before, rtol=1e-5 if precision == "fp32" else 0.1, atol=0)
    assert [type(module) for module in chunk.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_hooks for module in chunk.modules())
    assert adapter_settings([chunk]) is None
    lora.attach([chunk], SETTINGS, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_merged_as_the_whole(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (2100, 77), (8, 77), (2100, 8)
    weight, linear_in, linear_out = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    whole = merged_weight(weight, linear_in, linear_out, 0.7)
    assert whole.dtype == dtype
    for rows, columns in ((slice(0, 1), slice(None)), (slice(1000, 1030), slice(3, 50)), (slice(None), slice(76, 77))):
        block = merged_weight(weight[rows, columns], linear_in[:, columns], linear_out[rows], 0.7)
        assert torch.equal(block, whole[rows, columns])
    expected = weight.double() + 0.7 * linear_out.double() @ linear_in.double()
    assert torch.equal(whole, expected.float().to(dtype))


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Norms its input itself, as Transformer Engine's layer of this kind does, with its names."""

    def forward(self, x):
        return super().forward(rms_norm(x, (x.size(-1),), self.layer_norm_weight, self.eps))


def fuse(projection, norm):
    projection.__class__ = NormedColumnParallelLinear
    projection.layer_norm_weight = norm.weight
    projection.eps, projection.normalization, projection.zero_centered_gamma = norm.eps, "RMSNorm", False


def test_a_projection_that_norms_its_input_gives_the_adapter_the_normed_input():
    separate, fused = build(), build()
    for chunk in (separate, fused):
        for index, layer in enumerate(chunk.decoder.layers):
            for offset, norm in enumerate((layer.input_layernorm, layer.pre_mlp_layernorm)):
                norm.weight.data.uniform_(0.3, 3.0, generator=torch.Generator().manual_seed(2 * index + offset))
    for layer in fused.decoder.layers:
        fuse(layer.self_attention.linear_qkv, layer.input_layernorm)
        fuse(layer.mlp.linear_fc1, layer.pre_mlp_layernorm)
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp()
    for chunk in (separate, fused):
        randomized(chunk)
        logps(chunk).sum().backward()
    torch.testing.assert_close(logps(fused), logps(separate), rtol=1e-6, atol=0)
    for name, pair in adapters(separate).items():
        for ours, theirs in zip(adapters(fused)[name], pair, strict=True):
            assert torch.equal(ours, theirs)
            # The two norms round differently; how much, depends on the CPU.
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * theirs.grad.abs().max().item())
