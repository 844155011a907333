"""Mixtures of conditional and unconditional logits against autograd on all logits in float64."""

import pytest
import torch

from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.null_pairs import NullPairing
from megatron_cca.parallel import sequence_logps
from megatron_cca.parallel.mixed_logps import mixed_sequence_logps
from tests.references import token_shards
from tests.references.dense_logps import worst_relative_error

S, B, H, V = 9, 3, 16, 2900
TOKENS, PROMPTS = [0, 3, 5], [4, 2, 1]


def inputs(with_bias, padded=V + 92):
    """Images begin later in the rows with a condition; one row has no image token."""
    random = torch.Generator().manual_seed(0)
    mask = torch.zeros(2 * B, S, dtype=torch.bool)
    targets = torch.randint(V, (2 * B, S), generator=random)
    for row, (tokens, prompt) in enumerate(zip(TOKENS, PROMPTS, strict=True)):
        mask[row, prompt : prompt + tokens] = True
        mask[B + row, 1 : 1 + tokens] = True
        targets[B + row, 1 : 1 + tokens] = targets[row, prompt : prompt + tokens]
    hidden, weight, bias = (torch.randn(*size, generator=random) for size in ((S, 2 * B, H), (padded, H), (padded,)))
    return hidden, weight, bias if with_bias else None, targets, mask


def leaf(tensor, dtype=torch.float64):
    return None if tensor is None else tensor.to(dtype).clone().requires_grad_()


def authors(hidden, weight, bias, targets, mask, share, support):
    """The sum over a row of log-probabilities by share x conditional + (1 - share) x stopped unconditional logits."""
    logits = hidden.transpose(0, 1) @ weight.t() + (0 if bias is None else bias)
    logits = logits[..., support.start : support.stop]
    rows = []
    for row in range(B):
        conditional, unconditional = (logits[place][mask[place]] for place in (row, B + row))
        mixture = share * conditional + (1 - share) * unconditional.detach()
        ids = targets[row][mask[row]] - support.start
        rows.append(mixture.log_softmax(-1).gather(-1, ids[:, None]).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [2, 1000])
@pytest.mark.parametrize("support", [range(V), range(1200, 2850)])
def test_values_and_gradients_are_the_authors(share, with_bias, chunk_size, support):
    hidden, weight, bias, targets, mask = inputs(with_bias)
    targets[mask] = targets[mask] % len(support) + support.start
    upstream = torch.tensor([1.0, -2.0, 0.7])
    exact, ours = ([leaf(one, dtype) for one in (hidden, weight, bias)] for dtype in (torch.float64, torch.float32))
    expected = authors(*exact, targets, mask, share, support)
    expected.backward(upstream.double())
    options = {"share": share, "vocab_size": V, "support": support, "chunk_size": chunk_size}
    found = mixed_sequence_logps(ours[0], ours[1], targets, mask, bias=ours[2], **options)
    found.backward(upstream)
    assert found[0] == 0.0
    assert worst_relative_error(found.detach(), expected.detach()) < 1e-5
    for mine, theirs in zip(ours, exact, strict=True):
        if theirs is not None:
            assert worst_relative_error(mine.grad, theirs.grad) < 1e-5
    assert ours[0].grad[:, B:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_head_goes_to_main_grad(dtype):
    hidden, weight, _, targets, mask = inputs(False)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = leaf(weight)
    authors(hidden.double(), exact, None, targets, mask, 0.25, range(V)).sum().backward()
    ours = torch.nn.Parameter(weight)
    ours.main_grad = torch.ones(weight.shape)
    mixed_sequence_logps(hidden, ours, targets, mask, share=0.25, bias=None, vocab_size=V).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert worst_relative_error(ours.main_grad - 1, exact.grad) < tolerance


def test_a_row_without_a_condition_has_its_plain_likelihood_and_a_share_of_the_gradient():
    hidden, weight, bias, targets, mask = inputs(True)
    twice = [torch.cat([one[B:], one[B:]]) for one in (hidden.transpose(0, 1), targets, mask)]
    leaves = [leaf(one, torch.float32) for one in (twice[0].transpose(0, 1), weight, bias)]
    mixed = mixed_sequence_logps(*leaves[:2], *twice[1:], share=0.25, bias=leaves[2], vocab_size=V)
    mixed.sum().backward()
    alone = [leaf(one, torch.float32) for one in (hidden[:, B:], weight, bias)]
    plain = sequence_logps(*alone[:2], targets[B:], mask[B:], bias=alone[2], vocab_size=V)
    plain.sum().backward()
    torch.testing.assert_close(mixed, plain)
    torch.testing.assert_close(leaves[0].grad[:, :B], 0.25 * alone[0].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, 0.25 * alone[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaves[2].grad, 0.25 * alone[2].grad, rtol=1e-4, atol=1e-6)


def test_the_second_row_of_a_sample_is_its_image_without_a_condition(tmp_path):
    data = token_shards.token_data(tmp_path, 40)
    plain = token_shards.pairing(data)
    null = NullPairing(**vars(plain))
    ours, theirs = null.at(3), plain.at(3)
    for name in ("sample_ids", "condition_dropped", "variants", "second_ids", "second_variants"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name
    assert ours.second_dropped.all() and not ours.condition_dropped.all()
    (rows,) = BatchBuilder(data, null, True, 16, 1, 128).build(3, 0, 1).microbatches
    images, masks = rows.targets.chunk(2), rows.mask.chunk(2)
    for own, other, mask, null_mask in zip(*images, *masks, strict=True):
        assert own[mask].equal(other[null_mask])
    first, without = (mask.int().argmax(1) for mask in masks)
    assert (without < first).equal(~torch.from_numpy(ours.condition_dropped))
    assert without.le(first).all()
