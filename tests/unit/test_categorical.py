"""Drawing a code from logits, and the options of sampling: what is refused, what follows from a number."""

import numpy as np
import pytest
import torch

from megatron_cca.errors import UserError


def drawn(logits, uniforms, **options):
    from megatron_cca.generation.decode_loop import draw_codes

    rows = torch.tensor(logits, dtype=torch.float32).expand(len(uniforms), -1)
    options = {"temperature": 1.0, **options}
    return draw_codes(rows, torch.tensor(uniforms, dtype=torch.float64), **options).tolist()


LOGITS = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
UNIFORMS = [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.6999, 0.7001, 1 - 1e-16]


def test_a_number_gives_the_code_of_the_cumulative_distribution():
    assert drawn(LOGITS, UNIFORMS) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_top_k_and_top_p_leave_the_likeliest_in_their_order():
    assert drawn(LOGITS, UNIFORMS, top_k=1) == [1] * 8
    assert set(drawn(LOGITS, UNIFORMS, top_k=2)) == {1, 3}
    assert drawn(LOGITS, [0.57, 0.58], top_k=2) == [1, 3]  # 0.4 of 0.7 is 0.571
    assert drawn(LOGITS, UNIFORMS, top_k=9) == drawn(LOGITS, UNIFORMS)
    assert set(drawn(LOGITS, UNIFORMS, top_p=0.39)) == {1}
    assert set(drawn(LOGITS, UNIFORMS, top_p=0.41)) == {1, 3}
    assert set(drawn(LOGITS, UNIFORMS, top_p=0.85)) == {1, 2, 3}


def test_temperature_sharpens_and_zero_takes_the_likeliest():
    assert drawn(LOGITS, UNIFORMS, temperature=0.0) == [1] * 8
    assert set(drawn(LOGITS, UNIFORMS[1:-1], temperature=0.01)) == {1}
    # At temperature 2 the probabilities are as their square roots.
    roots = np.sqrt([0.1, 0.4, 0.2, 0.3])
    border = roots[0] / roots.sum()
    assert drawn(LOGITS, [border - 1e-6, border + 1e-6], temperature=2.0) == [0, 1]


def test_blocks_of_codes_make_no_difference():
    """1,000 codes, eight blocks and a part of one, against NumPy's plain cumulative sum."""
    random = np.random.default_rng(0)
    logits = random.normal(scale=3.0, size=1000).astype(np.float32)
    logits[random.random(1000) < 0.3] = -np.inf
    weights = np.exp(logits.astype(np.float64))
    uniforms = random.random(5000)
    expected = np.searchsorted(weights.cumsum() / weights.sum(), uniforms, side="right")
    found = drawn(logits.tolist(), uniforms.tolist())
    assert (np.array(found) != expected).mean() < 1e-3  # float32 weights: a number on a border may fall beside it
    assert np.isfinite(logits[found]).all()


def test_a_code_that_is_ruled_out_is_never_drawn():
    out = float("-inf")
    assert set(drawn([out, 0.0, out, 0.0, out], [0.0, 0.4, 0.5, 0.9, 1 - 1e-16])) == {1, 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}], ids=lambda one: str(one)
)
def test_nothing_is_drawn_from_what_is_no_number(bad, options):
    assert drawn([0.0, bad, 1.0, 2.0], [0.0, 0.5], **options) == [-1, -1]
    assert drawn([0.0, 1.0], [0.0, 0.5], temperature=1e-300) == [-1, -1]


def test_contrastive_logits_are_the_ratio_within_the_plausible():
    from megatron_cca.generation.decode_loop import contrastive_logits

    expert, amateur = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.1, 0.3, 0.2])
    logits = [torch.from_numpy(np.log(p) + shift)[None] for p, shift in ((expert, 3.0), (amateur, -2.0))]
    for top_k, alpha, kept in ((1, 0.5, [0, 1]), (1, 1.0, [0]), (2, 0.4, [0, 1, 2]), (9, 1.0, [0, 1, 2, 3])):
        found = contrastive_logits(*logits, top_k, alpha)[0].numpy()
        assert np.flatnonzero(np.isfinite(found)).tolist() == kept, (top_k, alpha)
        np.testing.assert_allclose(found[kept], np.log(expert / amateur)[kept], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height: must be 1 or more, found 0"),
        ({"guidance_scale": float("nan")}, "guidance scale: must be 0 or more and finite, found nan"),
        ({"guidance_scale": float("inf")}, "guidance scale: must be 0 or more and finite, found inf"),
        ({"guidance_scale": -1.0}, "guidance scale: must be 0 or more and finite, found -1.0"),
        ({"temperature": -0.5}, "temperature: must be 0 or more and finite, found -0.5"),
        ({"top_k": -1}, "top-k: must be 0 or more, found -1"),
        ({"top_p": 0.0}, "top-p: must be more than 0 and at most 1, found 0.0"),
        ({"contrastive_alpha": 1.5}, "contrastive alpha: must be more than 0 and at most 1, found 1.5"),
        ({"batch_size": 0}, "batch size: must be 1 or more, found 0"),
        (
            {"guidance_scale": 1.0, "contrastive_top_k": 5},
            "contrastive top-k: does not go with a guidance scale; set one of them to 0",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    from megatron_cca.generation.decode_loop import SamplingSettings

    with pytest.raises(UserError) as error:
        SamplingSettings(**{"height": 4, "width": 4, **options})
    assert str(error.value) == message
