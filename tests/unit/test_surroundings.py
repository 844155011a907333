"""Caches and temporary folders that cannot be used: one line that names them and what to set, whoever meets them."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from megatron_cca import reporting
from megatron_cca.data import digits
from megatron_cca.data.sources import SourceOptions, open_source
from megatron_cca.errors import SurroundingsError, UserError, error_context
from megatron_cca.io import paths
from megatron_cca.io.output_folders import claimed, remove_beside_others
from megatron_cca.io.outputs import check_writable, file_system_errors
from megatron_cca.io.paths import check_cache, check_surroundings, refusal, surroundings_fault
from megatron_cca.lab.scaling import program
from megatron_cca.models.emu3 import PRESETS
from tests.references.small_disk import mounted

# Nobody, root included, may make anything there.
CLOSED = Path("/sys")
VARIABLES = ("HOME", "TMPDIR", "XDG_CONFIG_HOME", *paths._CACHES)


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch, tmp_path):
    """None of the variables is set but HOME; the temporary folder is this test's own."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def denied(path, number=errno.EACCES):
    return OSError(number, os.strerror(number), str(path))


def line(error, cache=None):
    fault = surroundings_fault(error, cache)
    return None if fault is None else str(fault)


def test_a_cache_is_looked_for_where_its_library_does(monkeypatch, tmp_path):
    def of(variable):
        place = paths._place(variable)
        return str(place.folder), place.variable

    assert of("HF_DATASETS_CACHE") == (f"{tmp_path}/home/.cache/huggingface/datasets", "HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert of("HF_DATASETS_CACHE") == ("/x/huggingface/datasets", "XDG_CACHE_HOME")
    assert of("TORCH_HOME") == ("/x/torch", "XDG_CACHE_HOME")
    monkeypatch.setenv("HF_HOME", "/h")
    assert of("HF_DATASETS_CACHE") == ("/h/datasets", "HF_HOME")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/d")
    assert of("HF_DATASETS_CACHE") == ("/d", "HF_DATASETS_CACHE")
    assert of("TRITON_CACHE_DIR") == (f"{tmp_path}/home/.triton", "TRITON_CACHE_DIR")


@pytest.mark.full
def test_the_places_are_those_of_the_libraries_themselves():
    from datasets import config

    place = paths._CACHES
    assert Path(config.DEFAULT_HF_DATASETS_CACHE).name == place["HF_DATASETS_CACHE"][1]
    assert Path(config.DEFAULT_HF_CACHE_HOME).name == place["HF_HOME"][1]
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert Path(default_cache_dir()).name.startswith(place["TORCHINDUCTOR_CACHE_DIR"][1])


@pytest.mark.parametrize("variable", paths._CACHES)
def test_a_cache_that_cannot_be_written_is_named(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(CLOSED / "a" / "b"))
    with pytest.raises(SurroundingsError) as error:
        check_cache(variable)
    assert str(error.value).startswith(f"{variable}: /sys/a/b cannot be written (")
    assert str(error.value).endswith(f"); set {variable} to a folder that can be written")
    # What a library raises names the file, or a folder on the way to it.
    for path in (CLOSED / "a", CLOSED / "a/b", CLOSED / "a/b/c/lock"):
        assert line(denied(path)) == str(error.value).replace("Operation not permitted", "Permission denied")
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    with pytest.raises(SurroundingsError, match=r"file/below cannot be written \(Not a directory\)"):
        check_cache(variable)
    monkeypatch.setenv(variable, str(tmp_path / "new"))
    check_cache(variable)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cannot_be_read_in_a_cache_that_is_in_order_is_another_fault(tmp_path):
    """A user's checkpoint may lie in the hub's cache."""
    model = tmp_path / "home/.cache/huggingface/hub/model.safetensors"
    model.parent.mkdir(parents=True)
    assert line(denied(model)) is None
    assert line(denied(tmp_path / "elsewhere")) is None
    assert line(denied(Path(tempfile.gettempdir()) / "tmp.Xy/out")) is None
    assert line(OSError(errno.EACCES, "no name")) is None
    assert line(ValueError("none")) is None


def test_a_full_disk_is_named(tmp_path):
    file = Path(tempfile.gettempdir()) / "tmpabcd_123" / "x"
    assert line(denied(file, errno.ENOSPC)) == (
        f"TMPDIR: {tempfile.gettempdir()} is full (No space left on device); "
        "set TMPDIR to a folder that can be written and has room"
    )
    full = OSError(errno.ENOSPC, "No space left on device")
    assert line(full) is None
    assert line(full, "HF_DATASETS_CACHE").startswith(f"HF_HOME: {tmp_path}/home/.cache/huggingface/datasets is full")


@pytest.mark.full
def test_a_disk_that_is_really_full_is_named(monkeypatch, tmp_path):
    with mounted(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("HF_HOME", str(disk / "hf"))
        check_cache("HF_DATASETS_CACHE")
        with pytest.raises(OSError):
            (disk / "filler").write_bytes(bytes(10**6))
        with pytest.raises(SurroundingsError, match=r"HF_HOME: .*/disk/hf/datasets is full \(No space"):
            check_cache("HF_DATASETS_CACHE")
        with pytest.raises(UserError, match=r"--output: the disk of .*/disk/out is full"):
            check_writable(disk / "out")


def test_causes_count_too(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(CLOSED))
    try:
        try:
            raise denied(CLOSED / "x")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    except RuntimeError as error:
        assert line(error).startswith("TORCH_HOME: /sys cannot be written")
    loop = RuntimeError()
    loop.__cause__ = loop
    assert line(loop) is None


def test_no_temporary_folder_at_all_is_said(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/sys", "/proc"])
    with pytest.raises(SurroundingsError) as error:
        check_surroundings()
    assert str(error.value) == (
        "TMPDIR: no temporary folder can be written, of ['/sys', '/proc']; set TMPDIR to a folder that can be"
    )
    with pytest.raises(OSError) as raised:
        tempfile.mkdtemp()
    assert line(raised.value) == str(error.value)


def test_a_current_folder_that_is_gone_is_said(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SurroundingsError, match="the current folder has been removed; change to one that exists"):
        check_surroundings()


def test_a_fault_of_the_surroundings_is_not_laid_on_the_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "pq").mkdir()
    rows = {"image": [{"bytes": b"x", "path": None}], "text": ["a"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pq" / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(CLOSED / "cache"))
    with pytest.raises(SurroundingsError) as error, error_context("--source"):
        open_source(tmp_path / "pq", "auto", SourceOptions())
    assert str(error.value).startswith("HF_DATASETS_CACHE: /sys/cache cannot be written")


class Ended(BaseException):
    """In place of the process's end."""


@pytest.mark.parametrize("reported", [reporting.reported_errors, lambda: reporting.reported_tool_errors(())])
def test_programs_end_with_one_line_and_status_2(reported, monkeypatch, capsys):
    def leave(status):
        raise Ended(status)

    monkeypatch.setattr(reporting, "end_process", leave)
    monkeypatch.setattr(reporting.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(CLOSED / "i"))
    with pytest.raises(Ended) as ended, reported():
        (CLOSED / "i").mkdir()
    assert ended.value.args == (2,)
    assert capsys.readouterr().err == (
        "megatron_cca: error: TORCHINDUCTOR_CACHE_DIR: /sys/i cannot be written (Operation not permitted); set "
        "TORCHINDUCTOR_CACHE_DIR to a folder that can be written\n"
    )


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path):
    def said(path):
        with pytest.raises(UserError) as error:
            check_writable(path, "--to")
        return str(error.value)

    assert said(CLOSED / "a/b.json").startswith("--to: /sys/a/b.json cannot be written (")
    (tmp_path / "file").touch()
    assert said(tmp_path / "file/a/b") == (
        f"--to: {tmp_path}/file/a/b cannot be written: {tmp_path}/file is a file; give another folder"
    )
    check_writable(tmp_path / "new" / "er", "--to")
    check_writable(tmp_path / "file", "--to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "temporary"]
    with pytest.raises(UserError, match=r"--output: /sys/a cannot be written \("), claimed(CLOSED / "a"):
        pass
    # What is read meanwhile may be closed, too.
    with pytest.raises(UserError, match=r"^/elsewhere/b: Permission denied$"), file_system_errors(tmp_path / "out"):
        raise denied("/elsewhere/b")


def test_refusal_leaves_nothing_behind(tmp_path):
    assert refusal(tmp_path / "a" / "b", make=False) is None
    assert not (tmp_path / "a").exists()
    assert refusal(tmp_path / "a" / "b") is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_launchers_number_that_is_none_is_said(name, monkeypatch):
    monkeypatch.setenv(name, "two")
    with pytest.raises(SurroundingsError, match=f"^{name}: must be a whole number, found 'two'"):
        check_surroundings()
    monkeypatch.setenv(name, "0")
    check_surroundings()


def test_digits_that_are_there_need_no_folder_that_can_be_written(digit_shards, monkeypatch, tmp_path):
    vocabulary = PRESETS["emu3-tiny"].vocabulary
    monkeypatch.setattr(digits, "refusal", lambda folder: denied(folder, errno.EROFS))
    assert digits.ensure_digit_shards(vocabulary, Path(digit_shards)) == Path(digit_shards)
    with pytest.raises(SurroundingsError, match=r"new/digits cannot be written \(Read-only file system\)"):
        digits.ensure_digit_shards(vocabulary, tmp_path / "new" / "digits")


def test_a_sweeps_process_must_be_a_number(monkeypatch):
    monkeypatch.setenv(program.PARENT, "mine")
    with pytest.raises(UserError, match=f"{program.PARENT}: must be the number of a process, found 'mine'"):
        program.leave_with_the_sweep()


def test_a_folder_is_removed_while_another_process_removes_a_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "parts" / "rank1").mkdir(parents=True)
    (tmp_path / "parts" / "job.json").write_text("{}")
    remove, inner = os.rmdir, []

    def removed_before(path, **more):
        inner.append(path)
        remove(path, **more)
        if path == "rank1":
            remove(path, **more)

    monkeypatch.setattr(os, "rmdir", removed_before)
    remove_beside_others(tmp_path / "parts")
    assert "rank1" in inner and not (tmp_path / "parts").exists()
