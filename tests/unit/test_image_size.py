"""The size that an image is brought to before it is tokenised. Oracle: Emu3's own rule, written once more."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cca.data.resizing import target_size


def restated_size(height, width, area, factor):
    """prepare_data.py's smart_resize, then the image processor's, written once more."""
    scale = (area / (height * width)) ** 0.5
    sides = [round(side * scale) for side in (height, width)]
    if min(sides) < factor or max(sides) / min(sides) > 5:
        return None
    tokens = [round(side / factor) for side in sides]
    found = tokens[0] * tokens[1] * factor * factor
    least, most = min(512**2, area), max(1024**2, area)
    if found > most:
        tokens = [math.floor(side / math.sqrt(sides[0] * sides[1] / most) / factor) for side in sides]
    elif found < least:
        tokens = [math.ceil(side * math.sqrt(least / (sides[0] * sides[1])) / factor) for side in sides]
    return tokens[0] * factor, tokens[1] * factor


@pytest.mark.parametrize(
    ("size", "area", "grid"),
    [
        ((1000, 1000), 720 * 720, (90, 90)),
        ((1200, 1600), 720 * 720, (78, 104)),
        ((1080, 1920), 720 * 720, (68, 120)),
        ((2000, 3000), 720 * 720, (74, 110)),  # 588 / 8 = 73.5 goes to the even neighbour
        ((3000, 2000), 720 * 720, (110, 74)),
        ((300, 300), 512 * 512, (64, 64)),
        ((300, 400), 512 * 512, (56, 74)),  # below the area, so rounded up
        ((100, 100), 64 * 64, (8, 8)),
        ((5000, 1000), 720 * 720, (201, 40)),
        ((4000, 3000), 2048 * 2048, (295, 221)),  # above the area, so rounded down
    ],
)
def test_known_grids(size, area, grid):
    assert target_size(*size, area, 8) == (grid[0] * 8, grid[1] * 8) == restated_size(*size, area, 8)


@settings(max_examples=500, deadline=None)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    area=st.one_of(st.integers(1, 5000), st.integers(1, 3_000_000), st.sampled_from([512**2, 720**2, 1024**2])),
    factor=st.sampled_from([1, 2, 8, 16]),
)
def test_sizes_are_emu3s(height, width, area, factor):
    expected = restated_size(height, width, area, factor)
    if expected is None:
        with pytest.raises(
            ValueError, match=r"^(aspect ratio [\d.]+ is beyond 5, which|\d+ x \d+ pixels at an area of)"
        ):
            target_size(height, width, area, factor)
    else:
        assert target_size(height, width, area, factor) == expected
        assert min(expected) >= factor
        assert not any(side % factor for side in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 730, 720 * 720, 8), "aspect ratio 7.32 is beyond 5, which Emu3's own processor refuses"),
        ((1000, 5030, 720 * 720, 8), "aspect ratio 5.04 is beyond 5"),
        ((10, 10, 49, 8), "7 x 7 pixels at an area of 49: a side is below the 8 of one token"),
        ((1, 10**6, 720 * 720, 8), "1 x 720000 pixels at an area of 518400: a side is below"),
        ((0, 10, 64, 8), "height must be a positive integer below 2**31, found 0"),
        ((10, 10.5, 64, 8), "width must be a positive integer below 2**31, found 10.5"),
        ((10, 10, True, 8), "area must be a positive integer below 2**31, found True"),
        ((10, 10, 10**400, 8), "area must be a positive integer below 2**31, found 1000"),
    ],
)
def test_sizes_that_cannot_be_are_said(arguments, message):
    with pytest.raises(ValueError) as error:
        target_size(*arguments)
    assert message in str(error.value)
