"""Pairs of images: each row has its own image under the sample's condition; who the partners are, and what is refused.

The oracle reads the shards sample by sample, and knows nothing of how a batch is built.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_cca.config.load import load_config
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.pairing import training_order
from megatron_cca.data.partners import PAIRS, ImagePairing, find_partners
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.training.checks import check_new_run
from tests.references.token_shards import VOCABULARY, encode_text, write

BATCH = 16
PARTNERS = "data.partner_path"


def samples(number, seed, captions=6):
    """Of several grids; caption c is c + 1 tokens of c."""
    random = np.random.default_rng(seed)
    texts = [np.full(1 + index, index) for index in range(captions)]
    shapes = random.integers(1, 5, (number, 2))
    return [Sample(random.integers(128, size=shape), texts[index % captions]) for index, shape in enumerate(shapes)]


def opened(folder, key="data.path"):
    return TokenShards(folder, VOCABULARY, key)


@pytest.fixture(scope="module")
def with_partners(tmp_path_factory):
    """Two folders of data, whose partners lie in a third: of caption c there are some with that caption."""
    folder = tmp_path_factory.mktemp("partners")
    first, second, others = (
        write(folder / name, samples(number, seed)) for name, number, seed in (("a", 20, 1), ("b", 13, 2), ("c", 31, 3))
    )
    return TokenData([opened(first), opened(second)], [1.0, 1.0], [opened(others, PARTNERS)])


def preferences(folder, pairs, number=12, captions=3):
    def write_pairs(partial):
        np.save(partial / PAIRS, np.array(pairs))

    write_shards(folder, samples(number, 5, captions), VOCABULARY, encode_text, write_pairs)
    return TokenData([opened(folder)])


# Samples of 12 with caption number % 3: 0 has two losers, 4 and 9 one each; 5 loses to nobody and is in no pair.
PAIRS_OF_12 = [[9, 6], [0, 3], [0, 6], [4, 1]]


def builder(data, micro_batch_size=4, **changes):
    partners = find_partners(data)
    order = training_order(data, 7, 0.0, 0, partners.count)
    rule = {
        "global_batch_size": BATCH,
        "condition_dropout": 0.3,
        "seed": 7,
        "num_variants": data.num_variants,
    } | changes
    pairing = ImagePairing(order=order, rows=data.rows, partners=partners, **rule)
    return BatchBuilder(data, pairing, True, micro_batch_size, 1, 128)


def decoded(tokens):
    """Caption, meta words and codes of a row."""
    tokens = tokens.tolist()
    boi, img = tokens.index(VOCABULARY.boi), tokens.index(VOCABULARY.img)
    codes = [token - VOCABULARY.visual_start for token in tokens if token >= VOCABULARY.visual_start]
    return tokens[1:boi], tokens[boi + 1 : img], codes


def rows(batches, data_parallel_size, step):
    parts = [batches.build(step, rank, data_parallel_size) for rank in range(data_parallel_size)]
    microbatches = [microbatch for part in parts for microbatch in part.microbatches]
    first, second = zip(*(microbatch.tokens.chunk(2) for microbatch in microbatches), strict=True)
    return torch.cat(first), torch.cat(second)


def test_each_row_has_its_own_image_under_the_samples_condition(with_partners):
    batches, grids = builder(with_partners), []
    for step in range(6):
        batch = batches.pairing.at(step)
        assert not batch.negative_is_positive.any()
        for row, (first, second) in enumerate(zip(*rows(batches, 1, step), strict=True)):
            sample, partner = int(batch.sample_ids[row]), int(batch.second_ids[row])
            caption = with_partners.caption(sample).tolist()
            assert with_partners.caption(partner).tolist() == caption
            assert sample < len(with_partners) <= partner
            wanted = [] if batch.condition_dropped[row] else caption
            for tokens, image in ((first, sample), (second, partner)):
                found, words, codes = decoded(tokens)
                stored = with_partners.codes(image)
                assert found == wanted
                assert words == with_partners.meta_ids(image, stored.shape).tolist()
                # A code of the last place is a target alone where the row is the longest.
                assert codes in (stored.reshape(-1).tolist(), stored.reshape(-1).tolist()[:-1])
            grids.append(with_partners.codes(sample).shape == with_partners.codes(partner).shape)
    assert 0 < sum(grids) < len(grids)


@pytest.mark.parametrize(("micro", "data_parallel"), [(1, 1), (4, 2), (2, 4), (1, 16)])
def test_rows_do_not_depend_on_how_the_batch_is_cut(with_partners, micro, data_parallel):
    whole = rows(builder(with_partners, 16), 1, 3)
    for expected, found in zip(whole, rows(builder(with_partners, micro), data_parallel, 3), strict=True):
        assert torch.equal(expected, found)


def test_a_batch_is_a_function_of_seed_and_step(with_partners):
    one, again = (builder(with_partners).pairing.at(5) for _ in range(2))
    assert all((getattr(one, name) == getattr(again, name)).all() for name in one.__dataclass_fields__)
    for other in (builder(with_partners).pairing.at(6), builder(with_partners, seed=8).pairing.at(5)):
        assert (one.second_ids != other.second_ids).any()


def test_each_partner_is_drawn_as_often(with_partners):
    pairing = builder(with_partners).pairing
    counts = Counter()
    for step in range(400):
        batch = pairing.at(step)
        counts.update(batch.second_ids[batch.sample_ids == 0].tolist())
    # Caption 0 has six images among 31 partners.
    others = [len(with_partners) + index for index in range(0, 31, 6)]
    assert sorted(counts) == others
    mean = sum(counts.values()) / 6
    # 5 degrees of freedom: below 20.5 with probability 0.999.
    assert sum((count - mean) ** 2 / mean for count in counts.values()) < 20.5


def test_preferences_name_their_own_partners(tmp_path):
    data = preferences(tmp_path / "own", PAIRS_OF_12)
    seen = set()
    for step in range(20):
        batch = builder(data).pairing.at(step)
        seen |= set(zip(batch.sample_ids.tolist(), batch.second_ids.tolist(), strict=True))
    assert seen == set(map(tuple, PAIRS_OF_12))


def test_the_held_out_samples_have_partners(tmp_path):
    data = preferences(tmp_path / "own", PAIRS_OF_12)
    counts = find_partners(data).count
    kept = training_order(data, 7, 0.34, 0, counts)
    assert set(kept.pools[0].tolist()) < {0, 4, 9}


def test_two_folders_of_preferences_keep_to_their_own(tmp_path):
    one, two = (preferences(tmp_path / name, PAIRS_OF_12) for name in ("a", "b"))
    data = TokenData([*one.shards, *two.shards], [1.0, 1.0])
    batch = builder(data).pairing.at(0)
    assert (batch.sample_ids // 12 == batch.second_ids // 12).all()
    assert len(np.unique(batch.sample_ids // 12)) == 2


def test_a_sample_without_a_partner_is_named(tmp_path, with_partners):
    few = opened(write(tmp_path / "few", samples(4, 3, captions=4)), PARTNERS)
    message = (
        f"data.partner_path: no image there has the condition of sample 4 of {with_partners.shards[0].folder} and of 9 "
        "more; a pair of images needs two for one condition: draw or tokenize some for it"
    )
    assert refused(TokenData(with_partners.shards, [1.0, 1.0], [few])) == message


def refused(data):
    with pytest.raises(UserError) as error:
        find_partners(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_without_pairs_is_refused(with_partners):
    assert refused(TokenData(with_partners.shards[:1])) == (
        f"data.path: {with_partners.shards[0].folder} names no pairs of images (pairs.npy); tokenize preferences, or "
        "name the partners' folder in data.partner_path"
    )


def test_messages_name_the_option_of_the_folder(tmp_path):
    validation = opened(write(tmp_path / "own", samples(4, 3)), "validation.path")
    assert refused(TokenData([validation])).startswith(f"validation.path: {tmp_path / 'own'} names no pairs of images")
    few = opened(write(tmp_path / "few", samples(2, 3)), "validation.partner_path")
    assert refused(TokenData([validation], partners=[few])).startswith("validation.partner_path: no image there has ")


def test_the_partners_of_a_run_are_looked_for_once(with_partners, monkeypatch):
    data = TokenData(with_partners.shards, [1.0, 1.0], with_partners.partners)
    found = data.image_partners
    monkeypatch.setattr(TokenData, "rows", None)
    assert data.image_partners is found


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 3], [1, 12]], "names sample 12 of 12"),
        ([[0, -1]], "names sample -1 of 12"),
        ([[0, 3], [1, 2]], "pair 1, samples [1, 2], has two conditions; it must be one"),
        ([0, 3], "must hold int64 [P, 2], holds int64 [2]"),
        (np.zeros((0, 2), np.int64), "must hold int64 [P, 2], holds int64 [0, 2]"),
        (np.zeros((2, 2)), "must hold int64 [P, 2], holds float64 [2, 2]"),
    ],
)
def test_damaged_pairs_are_named(pairs, message, tmp_path):
    data = preferences(tmp_path / "own", pairs)
    assert refused(data) == f"data.path: {tmp_path / 'own' / PAIRS}: {message}"


PATH, IMAGES = "data.partner_path=b", "data.pairs=images"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([IMAGES], "data.pairs: images, but cca contrasts conditions; leave it out, or set objective.name to"),
        (
            [IMAGES, "objective.name=next_token"],
            "data.pairs: images, but next_token has no pairs; leave it out, or set",
        ),
        (
            [PATH],
            "data.partner_path: b, but this run has no pairs of images; leave it out, or set objective",
        ),
        (
            ["validation.partner_path=b"],
            "validation.partner_path: b, but this run has no pairs of images; leave it out",
        ),
        ([PATH, IMAGES, "objective.name=dpo", "data.path=b"], "data.partner_path: b is data.path; an image is no"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, overrides)
    with pytest.raises(UserError) as error:
        check_new_run(config, 1)
    assert str(error.value).startswith(message)


def test_either_kind_of_pairs_suits_dpo():
    for overrides in ([], [IMAGES, PATH]):
        check_new_run(load_config(None, ["objective.name=dpo", *overrides]), 1)
