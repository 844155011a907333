"""What a run leaves in its folder, which may hold anything by the time that it is read again."""

import json
import shutil

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import saved_config, summarize
from megatron_cca.config.load import load_config
from megatron_cca.training.run_log import read_metrics
from tests.references.fuzzing import changed, fuzzed, names, plain, spoilt

KEY = "training.pretrained_checkpoint"
INDEX = ".metadata"
RECORDS = {"a.distcp": {"bytes": 3, "xxh3": "0"}, INDEX: {"bytes": 1, "xxh3": "0"}}
SUMMARY = json.loads(json.dumps({**summarize(load_config()), "iteration": 3, "files": RECORDS}))


def fill(folder, files):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@fuzzed("latest file")
@given(spoilt(b"60\n") | st.binary(max_size=20) | names.map(lambda name: name.encode("utf-8", "surrogatepass")))
@example("٣\n".encode())
@example(b"0x10")
@example(b"999999999999")
def test_no_latest_file_gets_through(sandbox, content):
    (sandbox.inside / layout.LATEST).write_bytes(content)
    sandbox.check(lambda: layout.latest_iteration(sandbox.inside))
    sandbox.check(lambda: layout.resolve(sandbox.inside, KEY))


def sealed(summary):
    """With the checksum that a forger would give it."""
    return (layout.sealed(summary) if isinstance(summary, dict) else json.dumps(summary)).encode()


SUMMARIES = changed(SUMMARY).map(sealed) | spoilt(sealed(SUMMARY))
ONE = st.fixed_dictionaries({"bytes": plain | st.integers(0, 9), "xxh3": st.just("0") | plain})
FILES = st.dictionaries(names, plain | ONE, max_size=3).map(lambda files: sealed(SUMMARY | {"files": files}))


def test_a_whole_summary_is_read(sandbox):
    fill(sandbox.inside, {"a.distcp": b"abc", INDEX: b"x", layout.SUMMARY: sealed(SUMMARY)})
    assert sandbox.check(lambda: saved_config(sandbox.inside, KEY)) is not None


@fuzzed("checkpoint summary")
@given(SUMMARIES | FILES)
def test_no_summary_gets_through(sandbox, content):
    fill(sandbox.inside, {"a.distcp": b"abc", INDEX: b"x", layout.SUMMARY: content})
    sandbox.check(lambda: layout.read_summary(sandbox.inside, KEY))
    sandbox.check(lambda: saved_config(sandbox.inside, KEY))


ROWS = [{"step": 0, "loss": 0.7, "samples_per_second": 3.0}, {"step": 1, "loss": 0.6, "samples_per_second": 3.0}]


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def test_metrics_are_read(sandbox):
    fill(sandbox.inside, {"metrics.jsonl": as_lines(ROWS) + b'{"step": 2, "lo'})
    assert sandbox.check(lambda: read_metrics(sandbox.inside)) == ROWS


@fuzzed("metrics")
@given(spoilt(as_lines(ROWS)) | st.lists(changed(ROWS[0]) | plain, max_size=3).map(as_lines))
@example(b"\xff\n")
@example(b"[]\n")
@example(b'{"step": "a"}\n')
def test_no_metrics_get_through(sandbox, content):
    fill(sandbox.inside, {"metrics.jsonl": content})
    sandbox.check(lambda: read_metrics(sandbox.inside))


def test_a_file_of_a_checkpoint_is_no_link_out_of_it(sandbox):
    fill(sandbox.inside, {INDEX: b"x", layout.SUMMARY: sealed(SUMMARY)})
    (sandbox.beside / "secret.distcp").write_bytes(b"abc")
    (sandbox.inside / "a.distcp").symlink_to(sandbox.beside / "secret.distcp")
    assert sandbox.check(lambda: layout.read_summary(sandbox.inside, KEY)) is None
