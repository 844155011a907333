"""Preferences from a user's files to training: tokenised by the program, then pairs of images for DPO."""

import math

import numpy as np
import pytest

from megatron_cca.data.partners import PAIRS
from tests.distributed.launch import ROOT, run_tool, run_workers
from tests.distributed.test_layout_parity import under
from tests.references.scans import write_scans
from tests.references.sources import lines

TOOL = ROOT / "tools" / "tokenize_images.py"


@pytest.fixture(scope="module")
def preferences(digit_shards, tmp_path_factory):
    """24 pairs of scans of two digits, 3 ties, and what the program said."""
    folder = tmp_path_factory.mktemp("preferences")
    images = write_scans(folder / "images", 54)
    names = [f"{index:05d}.png" for index in range(54)]
    rows = [
        {"prompt": f"number {place % 5}", "images": list(pair), "scores": [1, 0 if place < 24 else 1]}
        for place, pair in enumerate(zip(names[::2], names[1::2], strict=True))
    ]
    (images / "captions.jsonl").unlink()
    (images / "preferences.jsonl").write_text(lines(*rows))
    tokenizers = ["--image-tokenizer", digit_shards, "--text-tokenizer", digit_shards]
    job = ["run", "--source", images, "--output", "shards", *tokenizers, "--model", "emu3-tiny", "--area", "64"]
    return folder / "shards", run_tool(TOOL, *job, cwd=folder)


def test_the_program_says_how_many_pairs_it_wrote(preferences):
    folder, done = preferences
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-2] == "skipped 3: a tie: none of its images is better than another"
    assert said[-1].startswith("wrote shards: 48 samples in 24 pairs, 3 skipped (see skipped.jsonl there), ")
    assert said[-1].endswith(" records/s")
    assert np.load(folder / PAIRS).tolist() == [[place, place + 1] for place in range(0, 48, 2)]
    done = run_tool(TOOL, "inspect", "shards", cwd=folder.parent)
    assert "pairs of images     24 of 24 better ones" in done.stdout, done.stderr


def test_dpo_trains_on_them(preferences, tmp_path):
    folder, _ = preferences
    common = [*under("dpo"), f"data.path={folder}", "data.pairs=images", "optimizer.lr=1e-3"]
    common += ["data.condition_dropout=0", f"training.output_dir={tmp_path}/run"]
    rows = run_workers(1, "traces", {"common": common, "layouts": {"one": []}, "steps": 8}, tmp_path)["one"]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
