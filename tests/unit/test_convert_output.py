"""Folders that conversions write into: nothing lost, nothing half-written that looks whole, however they end."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import (
    compare_tensors,
    export_checkpoint,
    exporting,
    import_checkpoint,
    open_both,
)
from megatron_cca.errors import UserError
from megatron_cca.io import output_folders
from tests.references.huggingface import (
    UP_PROJ,
    assert_same_bits,
    edit_tensors,
    load_tensors,
    refused,
)


@pytest.fixture
def replacing(hub, tmp_path):
    """A former export of one model, which an export of another is to replace: (folder, tensors before, and after)."""
    one, other = hub("Emu3ForCausalLM"), hub("Emu3ForCausalLM", seed=1)
    import_checkpoint(one, tmp_path / "one", progress_bar=False)
    import_checkpoint(other, tmp_path / "megatron", progress_bar=False)
    export_checkpoint(tmp_path / "one", tmp_path / "back", progress_bar=False)
    return tmp_path / "back", load_tensors(one), load_tensors(other)


def failing_after(moves):
    """A way to move files that fails once, after so many."""
    done = []

    def move(path, to):
        done.append(path)
        if len(done) == moves + 1:
            raise RuntimeError("no further")
        path.rename(to)

    return move


def test_a_full_folder_is_kept_unless_told_otherwise(hf, tmp_path):
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    assert refused(hf, tmp_path) == (
        f"--output: {target} already holds thesis.tex; give an empty folder or --overwrite"
    )
    assert "not what --overwrite is meant to replace" in refused(hf, tmp_path, overwrite=True)
    (target / "thesis.tex").unlink()
    import_checkpoint(hf, target, progress_bar=False)
    assert "already holds iter_0000000 and 1 more" in refused(hf, tmp_path)
    edit_tensors(hf, lambda found: found[UP_PROJ].zero_())
    import_checkpoint(hf, target, overwrite=True, progress_bar=False)
    back = tmp_path / "back"
    export_checkpoint(target, back, progress_bar=False)
    assert load_tensors(back)[UP_PROJ].abs().max() == 0
    with pytest.raises(UserError, match="already holds"):
        export_checkpoint(target, back)
    (back / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt: not what --overwrite is meant to replace"):
        export_checkpoint(target, back, overwrite=True)
    (back / "notes.txt").unlink()
    export_checkpoint(target, back, overwrite=True, progress_bar=False)
    assert_same_bits(load_tensors(back), load_tensors(hf))


def test_no_export_of_this_tool_is_overwritten(hf, tmp_path):
    """A model that somebody else saved may be all there is of it."""
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds config.json and \d more: not what --overwrite is meant to replace"):
        export_checkpoint(tmp_path / "megatron", other, overwrite=True)
    assert_same_bits(load_tensors(other), load_tensors(hf))


@pytest.mark.parametrize("files", [["../hf/model.safetensors"], [".."], [""], [3], ["n" * 300], "config.json", None])
def test_a_forged_list_of_files_cannot_reach_others(files, hf, tmp_path):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    (other / exporting._RECORD).write_text(json.dumps({"files": files}))
    with pytest.raises(UserError, match="not what --overwrite is meant to replace"):
        export_checkpoint(tmp_path / "megatron", other, overwrite=True)
    assert exporting._exported_files(other) == []


def test_two_do_not_write_into_one_folder(hf, tmp_path):
    busy = pytest.raises(UserError, match=r"another process is writing into .*megatron; wait for it")
    with output_folders.claimed(tmp_path / "megatron"), busy:
        import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)


def test_the_folder_that_is_read_is_not_written_to(hf, tmp_path):
    for target in (hf, hf / "inside", tmp_path):
        with pytest.raises(UserError, match="in each other's way"):
            import_checkpoint(hf, target, overwrite=True)


@pytest.mark.parametrize("killed", [True, False])
def test_a_replacement_that_is_cut_short_is_taken_back(killed, replacing, tmp_path, monkeypatch):
    back, before, after = replacing
    names = sorted(path.name for path in back.iterdir())
    for moves in range(2 * len(names)):
        shutil.rmtree(back / exporting._PARTIAL, ignore_errors=True)
        with monkeypatch.context() as patched:
            patched.setattr(exporting, "_replace", failing_after(moves))
            if killed:  # then nobody tidies up
                patched.setattr(exporting, "_undo_move", lambda folder: None)
                patched.setattr(output_folders.shutil, "rmtree", lambda *arguments, **options: None)
            with pytest.raises(RuntimeError, match="no further"):
                export_checkpoint(tmp_path / "megatron", back, overwrite=True, progress_bar=False)
        if killed and (back / "config.json").exists():
            found = load_tensors(back)
            assert_same_bits(found, before if torch.equal(found[UP_PROJ], before[UP_PROJ]) else after)
        with pytest.raises(UserError, match="already holds"):
            export_checkpoint(tmp_path / "megatron", back)
        assert_same_bits(load_tensors(back), before)
        assert sorted(path.name for path in back.iterdir() if path.name not in exporting._UNFINISHED) == names
    export_checkpoint(tmp_path / "megatron", back, overwrite=True, progress_bar=False)
    assert_same_bits(load_tensors(back), after)
    assert sorted(path.name for path in back.iterdir()) == names


def test_a_first_export_that_is_cut_short_leaves_nothing(replacing, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_replace", failing_after(2))
    with pytest.raises(RuntimeError, match="no further"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "new", progress_bar=False)
    assert not (tmp_path / "new").exists()


def test_an_import_that_cannot_take_the_formers_place_leaves_it(hub, tmp_path, monkeypatch):
    folder = import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False)
    rename = Path.rename

    def fail(path, to):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error", str(path))
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="Input/output error"):
            import_checkpoint(hub("Emu3ForCausalLM", seed=1), tmp_path / "megatron", overwrite=True, progress_bar=False)
    assert compare_tensors(*open_both(hub("Emu3ForCausalLM"), folder), progress_bar=False).identical
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, layout.LATEST]


def test_an_import_killed_at_any_of_its_last_moves_can_be_repeated(hub, tmp_path):
    for name in (".latest_checkpointed_iteration.txt", ".iter_0000000.partial", ".iter_0000000.former"):
        left = tmp_path / "megatron" / name
        left.parent.mkdir(exist_ok=True)
        left.write_text("0\n") if name.endswith(".txt") else left.mkdir()
    import_checkpoint(hub("Emu3ForCausalLM"), tmp_path / "megatron", progress_bar=False)
    assert sorted(path.name for path in (tmp_path / "megatron").iterdir()) == ["iter_0000000", layout.LATEST]


def test_a_conversion_that_fails_midway_leaves_nothing(hf, tmp_path, monkeypatch):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import HuggingFaceCheckpoint
    from megatron_cca.checkpoint.huggingface.megatron_checkpoint import MegatronCheckpoint

    def fail(self, name, start, stop):
        if "layers.3" in name:
            raise RuntimeError("bad sector")
        return original(self, name, start, stop)

    for cls, convert_it in (
        (HuggingFaceCheckpoint, lambda: import_checkpoint(hf, tmp_path / "a", progress_bar=False)),
        (
            MegatronCheckpoint,
            lambda: export_checkpoint(tmp_path / "megatron", tmp_path / "b", progress_bar=False),
        ),
    ):
        original = cls.read
        with monkeypatch.context() as patched:
            patched.setattr(cls, "read", fail)
            with pytest.raises(RuntimeError, match="bad sector"):
                convert_it()
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_too_little_space_is_said_before_anything_is_written(hf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folders.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1.00kB free, 1.00MB are needed" in refused(hf, tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(hf, small_disk, tmp_path, monkeypatch):
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    # As if another program took the space in the meantime.
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folders.shutil, "disk_usage", lambda path: plenty)
    for write in (
        lambda: import_checkpoint(hf, small_disk / "a", progress_bar=False),
        lambda: export_checkpoint(tmp_path / "megatron", small_disk / "b", progress_bar=False),
    ):
        with pytest.raises(UserError, match=r"--output: the disk of \S+ is full") as error:
            write()
        assert "\n" not in str(error.value)
        assert list(small_disk.iterdir()) == []
