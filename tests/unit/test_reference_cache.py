"""Log-probabilities on disk: what comes back is what was written, and of nobody else's run."""

import json

import numpy as np
import pytest

from megatron_cca.data.reference_cache import BLOCK, ReferenceCache, ReferenceCacheWriter
from megatron_cca.errors import UserError

IDENTITY = {"weights": "abc", "training.seed": 1, "reference.fp8_recipe": None}
PATH = {"training.micro_batch_size": 2}


def logps(steps, rows=4, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, rows, 2)).astype(np.float32)


@pytest.fixture
def cache(tmp_path):
    """130 training steps, in three blocks, and two validation steps."""
    writer = ReferenceCacheWriter(tmp_path, IDENTITY, PATH)
    whole = logps(2 * BLOCK + 2)
    for first in range(0, len(whole), BLOCK):
        writer.write("training", first, whole[first : first + BLOCK])
    writer.write("validation", 0, logps(2, seed=1))
    return tmp_path


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_steps_come_back_as_they_were_written(cache):
    found = ReferenceCache(cache)
    for step in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 5):
        assert np.array_equal(found.read("training", step), logps(2 * BLOCK + 2)[step])
    assert np.array_equal(found.read("validation", 1), logps(2, seed=1)[1])
    assert (found.identity, found.path) == (IDENTITY, PATH)
    assert sorted(path.name for path in cache.iterdir()) == [
        "cache.json",
        "training_000000000_000000063.npz",
        "training_000000064_000000127.npz",
        "training_000000128_000000129.npz",
        "validation_000000000_000000001.npz",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "xyz"}, "was computed with weights abc, not with this run's xyz"),
        ({"training.seed": 2}, "was computed with training.seed 1, not with this run's 2"),
        ({"reference.fp8_recipe": "tensorwise"}, "reference.fp8_recipe none, not with this run's tensorwise"),
        ({"objective.normalization": "image"}, "objective.normalization vocabulary, not with this run's image"),
        ({"new": 1}, "was computed with new none, not with this run's 1"),
    ],
)
def test_the_cache_of_another_run_is_refused(cache, change, words):
    found = ReferenceCache(cache)
    found.check(IDENTITY)
    message = refused(found.check, IDENTITY | change)
    assert message.startswith(f"reference.cache: {cache} ") and words in message


def test_missing_steps_are_named(cache):
    found = ReferenceCache(cache)
    found.check_steps("training", 0, 2 * BLOCK + 2)
    found.check_steps("training", 100, 120)
    message = refused(found.check_steps, "training", 10, 2 * BLOCK + 3)
    assert message == (
        f"reference.cache: {cache} holds training steps 0 to 129, this run needs 10 to 130; "
        "compute the rest with megatron-cca cache-reference --steps 130:131"
    )
    (cache / "training_000000064_000000127.npz").unlink()
    assert "holds training steps 0 to 63, 128 to 129, this" in refused(found.check_steps, "training", 0, 130)
    assert "holds validation steps 0 to 1, this run needs 0 to 2;" in refused(found.check_steps, "validation", 0, 3)
    assert f"lacks training step {BLOCK}" in refused(ReferenceCache(cache).read, "training", BLOCK)


def test_damage_is_found(cache):
    path = cache / "training_000000000_000000063.npz"
    whole = path.read_bytes()
    for spoilt in (whole[:-100], whole[:700] + bytes([whole[700] ^ 1]) + whole[701:], b"", b"PK"):
        path.write_bytes(spoilt)
        message = refused(ReferenceCache(cache).read, "training", 3)
        assert message.startswith(f"reference.cache: {path} is missing or damaged")
    path.write_bytes(whole)
    np.savez(path, logps=np.zeros((64, 4)))
    assert "is damaged: float64 (64, 4)" in refused(ReferenceCache(cache).read, "training", 3)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format": "other", "identity": {}, "path": {}})])
def test_a_damaged_manifest_is_refused(cache, text):
    (cache / "cache.json").write_text(text)
    assert "cache.json is damaged or of another version" in refused(ReferenceCache, cache)


def test_a_folder_without_a_cache_is_refused(tmp_path):
    assert refused(ReferenceCache, tmp_path / "nowhere").startswith(f"reference.cache: {tmp_path}/nowhere holds no")


def test_an_interrupted_cache_is_continued_by_the_same_run_only(cache):
    ReferenceCacheWriter(cache, IDENTITY, PATH)
    assert "holds a cache computed with training.seed 1, not" in refused(
        ReferenceCacheWriter, cache, IDENTITY | {"training.seed": 2}, PATH
    )
    # The last bits would change in the middle.
    assert "training.micro_batch_size 2, not with this run's 4" in refused(
        ReferenceCacheWriter, cache, IDENTITY, {"training.micro_batch_size": 4}
    )


def test_a_longer_block_replaces_a_shorter_one(cache):
    longer = logps(BLOCK, seed=9)
    ReferenceCacheWriter(cache, IDENTITY, PATH).write("training", 2 * BLOCK, longer)
    assert np.array_equal(ReferenceCache(cache).read("training", 3 * BLOCK - 1), longer[-1])
    assert len(list(cache.glob("training_000000128_*"))) == 1


def test_nothing_is_written_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    assert "holds thesis.txt, which is no cache" in refused(ReferenceCacheWriter, tmp_path, IDENTITY, PATH)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_no_half_block(small_disk):
    writer = ReferenceCacheWriter(small_disk, IDENTITY, PATH)
    message = refused(writer.write, "training", 0, logps(BLOCK, rows=4000))
    assert "is full" in message
    assert [path.name for path in small_disk.iterdir()] == ["cache.json"]


def test_a_cache_of_a_former_version_is_of_the_whole_vocabulary(cache):
    ReferenceCache(cache).check({**IDENTITY, "objective.normalization": "vocabulary"})
