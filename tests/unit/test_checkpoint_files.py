"""A checkpoint on the disk: recorded, sealed, renamed when whole, kept by a rule, put back after a kill."""

import json

import pytest

from megatron_cca.checkpoint import integrity, layout
from megatron_cca.errors import UserError


def write(root, iteration, content=b"x" * 100, checksums=None):
    partial = layout.partial_folder(root, iteration)
    (partial / "sub").mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(content)
    (partial / "sub" / "more").write_bytes(b"more")
    layout.finalize(partial, root, iteration, {"config": {}}, checksums)
    return layout.iteration_folder(root, iteration)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_finalize_records_every_file_and_moves_the_latest_file(tmp_path):
    folder = write(tmp_path, 7)
    summary = integrity.check_whole(folder, "key")
    assert summary["iteration"] == 7
    assert {name: record["bytes"] for name, record in summary["files"].items()} == {"__0_0.distcp": 100, "sub/more": 4}
    assert layout.latest_iteration(tmp_path) == 7
    assert names(tmp_path) == ["iter_0000007", layout.LATEST]


def test_a_checksum_taken_while_writing_is_what_counts(tmp_path):
    """A file that went bad between its hash and the end of the save must not be blessed."""
    folder = write(tmp_path, 7, checksums={"__0_0.distcp": "0" * 32})
    with pytest.raises(UserError, match=r"key: .*__0_0.distcp is damaged: not what was written"):
        integrity.check_whole(folder, "key")


def test_what_is_known_good_is_read_again_once_it_has_changed(tmp_path):
    folder = write(tmp_path, 7)
    integrity.check_whole(folder, "key")
    (folder / "__0_0.distcp").write_bytes(b"y" + b"x" * 99)
    with pytest.raises(UserError, match="is damaged"):
        integrity.check_whole(folder, "key")


@pytest.mark.parametrize("position", [0, 40, -2])
def test_a_flipped_bit_in_the_summary_is_found(position, tmp_path):
    folder = write(tmp_path, 7)
    content = bytearray((folder / layout.SUMMARY).read_bytes())
    content[position] ^= 1
    (folder / layout.SUMMARY).write_bytes(content)
    with pytest.raises(UserError, match=rf"key: {folder}/checkpoint.json is damaged"):
        layout.read_summary(folder, "key")


def test_a_summary_that_names_files_outside_is_refused(tmp_path):
    folder = write(tmp_path, 7)
    summary = json.loads((folder / layout.SUMMARY).read_text())
    del summary["checksum"]
    summary["files"]["../../secret"] = {"bytes": 1, "xxh3": ""}
    (folder / layout.SUMMARY).write_text(layout.sealed(summary))
    with pytest.raises(UserError, match="is damaged"):
        layout.read_summary(folder, "key")


def test_a_checkpoint_replaces_another_of_its_iteration(tmp_path):
    write(tmp_path, 7)
    folder = write(tmp_path, 7, b"z" * 50)
    assert (folder / "__0_0.distcp").read_bytes() == b"z" * 50
    assert names(tmp_path) == ["iter_0000007", layout.LATEST]


def test_a_rename_that_fails_puts_the_former_one_back(tmp_path, monkeypatch):
    write(tmp_path, 7)
    rename = type(tmp_path).rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write(tmp_path, 7, b"z")
    assert integrity.check_whole(layout.iteration_folder(tmp_path, 7), "key")["files"]["__0_0.distcp"]["bytes"] == 100


def test_tidy_takes_back_what_a_kill_between_two_renames_hid(tmp_path):
    folder = write(tmp_path, 7)
    folder.rename(tmp_path / ".iter_0000007.former")
    (tmp_path / ".iter_0000009.partial").mkdir()
    (tmp_path / ".iter_0000003.removed").mkdir()
    layout.tidy(tmp_path)
    assert names(tmp_path) == ["iter_0000007", layout.LATEST]
    integrity.check_whole(folder, "key")


def test_tidy_forgets_a_former_one_that_was_replaced(tmp_path):
    write(tmp_path, 7)
    (tmp_path / ".iter_0000007.former").mkdir()
    layout.tidy(tmp_path)
    assert names(tmp_path) == ["iter_0000007", layout.LATEST]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (1, None, [10]),
        (2, None, [8, 10]),
        (2, 4, [4, 8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
    ],
)
def test_retention(keep_last, keep_every, kept, tmp_path):
    for iteration in (2, 4, 6, 8, 10):
        write(tmp_path, iteration)
    removed = layout.prune(tmp_path, 10, keep_last, keep_every)
    assert layout.iterations(tmp_path) == kept
    assert removed == sorted({2, 4, 6, 8, 10} - {*kept})
    assert not list(tmp_path.glob(".*"))


def test_retention_never_gives_up_what_was_just_saved_for_a_damaged_newer_one(tmp_path):
    """A run that passed over step 6 for its damage has continued from 2 and saved 4."""
    for iteration in (2, 4, 6):
        write(tmp_path, iteration)
    (layout.iteration_folder(tmp_path, 6) / "__0_0.distcp").write_bytes(b"y" * 100)
    assert layout.prune(tmp_path, 4, keep_last=1, keep_every=None) == [2]
    assert layout.iterations(tmp_path) == [4, 6]


def test_a_cut_file_is_passed_over_where_only_sizes_are_looked_at(tmp_path):
    write(tmp_path, 2)
    (write(tmp_path, 4) / "__0_0.distcp").write_bytes(b"x")
    assert layout.newest_complete(tmp_path) == 2
    assert layout.newest_complete(tmp_path / "nothing") is None


def test_without_a_latest_file_one_must_say_which(tmp_path):
    folder = write(tmp_path, 2)
    (tmp_path / layout.LATEST).unlink()
    with pytest.raises(
        UserError, match=r"key: .* has no latest_checkpointed_iteration.txt; give one of the iter_ fold"
    ):
        layout.resolve(tmp_path, "key")
    assert layout.resolve(folder, "key") == folder


def test_companions_keep_their_recorded_checksums(tmp_path):
    start, root = tmp_path / "start", tmp_path / "run"
    partial = layout.partial_folder(start, 0)
    (partial / layout.COMPANION_FILES).mkdir(parents=True)
    (partial / layout.COMPANION_FILES / "tokenizer.json").write_text("{}")
    (partial / "__0_0.distcp").write_bytes(b"weights")
    layout.finalize(partial, start, 0, {})
    origin = layout.iteration_folder(start, 0)
    (origin / layout.COMPANION_FILES / "tokenizer.json").write_text("[]")
    partial = layout.partial_folder(root, 5)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"others!")
    known = layout.keep_companions(root, origin, partial)
    assert [*known] == [f"{layout.COMPANION_FILES}/tokenizer.json"]
    layout.finalize(partial, root, 5, {}, known)
    with pytest.raises(UserError, match=r"huggingface/tokenizer.json is damaged"):
        integrity.check_whole(layout.iteration_folder(root, 5), "key")
