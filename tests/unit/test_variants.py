"""Variants of an image: all are kept, and which one a step sees follows from seed, step and row alone."""

import json

import numpy as np
import pytest

from megatron_cca.data.manifest import VARIANTS, read_manifest
from megatron_cca.data.microbatches import BatchBuilder
from megatron_cca.data.shard_writing import Sample, TokenWriter, merge_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.io.external_files import sha256
from tests.references.token_shards import VOCABULARY, encode_text, pairing, random_samples, write

COUNTS = (1, 2, 10)


def samples(number=30, seed=0):
    """Sample i has COUNTS[i % 3] variants of a grid of its own."""
    random = np.random.default_rng(seed)
    return [
        Sample(random.integers(128, size=(COUNTS[i % 3], 1, *random.integers(1, 5, 2))), random.integers(320, size=5))
        for i in range(number)
    ]


def opened(folder, *lists):
    folders = [write(folder / str(index), some) for index, some in enumerate(lists)]
    return TokenData([TokenShards(path, VOCABULARY) for path in folders], [1.0] * len(folders))


def test_every_variant_comes_back_from_one_folder_or_several(tmp_path):
    written = [samples(30), random_samples(20), samples(10, seed=5)]
    data = opened(tmp_path, *written)
    flat = [sample for some in written for sample in some]
    counts = data.num_variants(np.arange(len(flat)))
    for index, sample in enumerate(flat):
        variants = sample.codes if sample.codes.ndim == 4 else sample.codes[None]
        assert counts[index] == len(variants)
        for number, codes in enumerate(variants):
            assert np.array_equal(data.codes(index, number), codes)
        assert np.array_equal(data.caption(index), sample.caption)


def test_joined_parts_are_the_bytes_of_one_writing(tmp_path):
    some, plain = samples(30), random_samples(10)
    for name, chunk in (("a", some[:11]), ("b", plain), ("c", some[11:])):
        (tmp_path / name).mkdir()
        with TokenWriter(tmp_path / name, VOCABULARY) as writer:
            for sample in chunk:
                writer.add(sample)
    parts = [tmp_path / name for name in "abc"]
    merge_shards(tmp_path / "joined", parts, VOCABULARY, encode_text, lambda folder: None, {}, tmp_path / "aside")
    write(tmp_path / "whole", [*some[:11], *plain, *some[11:]])
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name != "manifest.json")
    assert VARIANTS in names
    for name in names:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_shards_without_variants_are_as_they_always_were(tmp_path):
    folder = write(tmp_path / "plain", random_samples(5))
    assert VARIANTS not in read_manifest(folder)["files"]
    assert not (folder / VARIANTS).exists()
    assert TokenShards(folder, VOCABULARY).variants.tolist() == [1] * 5


@pytest.mark.parametrize("spoil", ["drop", "zero", "more", "type", "unlisted"])
def test_variants_that_do_not_fit_the_codes_are_refused(spoil, tmp_path):
    folder = write(tmp_path / "shards", samples(6))
    path, variants = folder / VARIANTS, np.load(folder / VARIANTS)
    if spoil == "drop":
        path.unlink()
    elif spoil != "unlisted":
        changed = {"zero": variants * 0, "more": variants + 1, "type": variants.astype(np.int64)}[spoil]
        np.save(path, changed)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    if spoil == "unlisted":
        manifest.write_text(text.replace(VARIANTS, "others.npy"))
        path.rename(folder / "others.npy")
        with pytest.raises(UserError, match=r"does not fit samples.npy or codes.bin"):
            TokenShards(folder, VOCABULARY)
        return
    with pytest.raises(UserError, match=VARIANTS):
        TokenShards(folder, VOCABULARY)
    if spoil in ("zero", "more", "type"):
        contents = json.loads(text)
        contents["files"][VARIANTS] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest.write_text(json.dumps(contents))
        with pytest.raises(UserError, match=r"variants.npy|codes"):
            TokenShards(folder, VOCABULARY)


def shown(data, step, **changes):
    return pairing(data, num_variants=data.num_variants, **changes).at(step)


def test_which_variant_is_a_pure_function_of_seed_and_step(tmp_path):
    data = opened(tmp_path, samples(300))
    for step in (0, 7, 1_000_000):
        first, again, other = shown(data, step), shown(data, step), shown(data, step, seed=8)
        assert np.array_equal(first.variants, again.variants)
        assert not np.array_equal(first.variants, other.variants)
        counts = data.num_variants(first.sample_ids)
        assert ((first.variants >= 0) & (first.variants < counts)).all()


def test_variants_change_nothing_else_of_a_batch(tmp_path):
    data = opened(tmp_path, samples(300))
    for step in range(4):
        with_them, without = shown(data, step), pairing(data).at(step)
        for name in ("sample_ids", "negative_ids", "condition_dropped", "negative_is_positive"):
            assert np.array_equal(getattr(with_them, name), getattr(without, name))
        assert without.variants.tolist() == [0] * 16


def test_variants_are_uniform_and_change_from_epoch_to_epoch(tmp_path):
    data = opened(tmp_path, [Sample(np.zeros((10, 1, 1, 1), int), np.array([label])) for label in range(4)])
    drawn = np.concatenate([shown(data, step, global_batch_size=4).variants for step in range(5000)])
    found = np.bincount(drawn, minlength=10)
    # Chi-square with 9 degrees of freedom: 27.9 is its 0.999 quantile.
    assert ((found - 2000) ** 2 / 2000).sum() < 27.9
    by_sample = {}
    for step in range(200):
        batch = shown(data, step, global_batch_size=4)
        for sample, variant in zip(batch.sample_ids.tolist(), batch.variants.tolist(), strict=True):
            by_sample.setdefault(sample, set()).add(variant)
    assert all(len(variants) == 10 for variants in by_sample.values())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_rows_are_the_same_for_any_share_of_the_batch(size, micro_batch_size, tmp_path):
    data = opened(tmp_path, samples(60), random_samples(20))
    plan = pairing(data, num_variants=data.num_variants)

    def rows(micro_batch_size, size):
        builder = BatchBuilder(data, plan, False, micro_batch_size, 64, 512)
        shares = [builder.build(3, rank, size).microbatches for rank in range(size)]
        return np.concatenate([rows.tokens.numpy() for share in shares for rows in share])

    assert np.array_equal(rows(micro_batch_size, size), rows(16, 1))
