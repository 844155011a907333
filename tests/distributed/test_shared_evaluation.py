"""An evaluation by several processes: one report, with the numbers of one process; what fails on one ends all."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_cca.generation.prompt_sets import geneval_prompts
from megatron_cca.lab.evaluation.image_sets import read_images
from megatron_cca.lab.evaluation.shares import Share
from tests.distributed.launch import ROOT, ended, run_tool, start_job, torchrun
from tests.unit.test_geneval import tiny_detr

TOOL = ROOT / "tools" / "evaluate.py"
OWN = """
import os
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.layers = nn.ModuleList([nn.Linear(192, width) for width in (5, 3)])

    def forward(self, images):
        rows = images.float().flatten(1) / 255
        return tuple(torch.tanh(layer(rows)) for layer in self.layers)

def network():
    return Network()

def ink(images, prompts):
    return images.reshape(len(images), -1).mean(1) + [len(prompt) for prompt in prompts]

def ink_of_rank_0(images, prompts):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("the pen of rank 1 is empty")
    return ink(images, prompts)
"""
METRICS = ["--metrics", "fid", "inception_score", "precision", "recall", "kid", "coverage"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of 25 images with prompts, one of 3 with fewer batches than processes, and 21 real ones."""
    folder, random = tmp_path_factory.mktemp("sets"), np.random.default_rng(4)
    (folder / "own.py").write_text(OWN)
    np.savez(folder / "real.npz", random.integers(256, size=(21, 8, 8, 3), dtype=np.uint8))
    for name, count in (("many", 25), ("few", 3)):
        (folder / name).mkdir()
        lines = []
        for place in range(count):
            pixels = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")
            lines.append(json.dumps({"file": f"{place}.png", "prompt": "a" * place}))
        (folder / name / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "many" / "stray.png").write_bytes((folder / "many" / "0.png").read_bytes())
    return folder


def test_three_processes_find_the_numbers_of_one(sets, tmp_path):
    own = f"{sets / 'own.py'}:ink"
    words = ["--reference", sets / "real.npz", "--extractor", f"{sets / 'own.py'}:network", "--batch-size", 4]
    words += [*METRICS, "--kid-subset-size", 10, "--neighborhood", 2, "--scorer", own, "--device", "cpu"]
    words += ["--samples", sets / "many", "--samples", f"again={sets / 'many'}"]
    done = run_tool(TOOL, *words, "--output", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    jobs = start_job(3, TOOL, *words, "--output", "three", "--save-statistics", "kept.npz", cwd=tmp_path)
    assert ended(jobs) == [0, 0, 0], [(tmp_path / f"rank{rank}.err").read_text()[-1000:] for rank in range(3)]
    one, three = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "three"))
    for ours, theirs in zip(one["sets"], three["sets"], strict=True):
        numbers = {name: value for name, value in ours.items() if isinstance(value, float)}
        assert {"fid", "kid", "coverage"} <= numbers.keys()
        assert numbers == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-9, abs=1e-12)
        assert ours["rewards"] == theirs["rewards"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "three").iterdir()
    )
    assert (tmp_path / "kept.npz").exists()
    assert "table.md, metrics.json to three" in (tmp_path / "rank0.out").read_text()
    assert "1 images are not in prompts.jsonl" in (tmp_path / "rank0.err").read_text()
    for rank in (1, 2):
        assert not (tmp_path / f"rank{rank}.out").read_text()
        assert not (tmp_path / f"rank{rank}.err").read_text()


def test_fewer_batches_than_processes_are_no_trouble(sets, tmp_path):
    words = ["--samples", sets / "few", "--reference", sets / "real.npz", "--metrics", "--batch-size", 2]
    words += ["--scorer", f"{sets / 'own.py'}:ink", "--device", "cpu", "--output", "out"]
    assert ended(start_job(3, TOOL, *words, cwd=tmp_path)) == [0, 0, 0]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"][0]
    images = read_images(sets / "few").images.reshape(3, -1).mean(1) + np.arange(3)
    assert found["rewards"][f"{sets / 'own.py'}:ink"]["mean"] == pytest.approx(images.mean())


@pytest.mark.full
def test_bad_input_is_said_by_rank_0_alone(sets, tmp_path):
    words = ["--samples", sets / "few", "--reference", sets / "real.npz", "--extractor", f"{sets / 'own.py'}:network"]
    words += ["--metrics", "fid", "--device", "cpu", "--output", "out"]
    assert ended(start_job(2, TOOL, *words, cwd=tmp_path)) == [2, 2]
    errors = [(tmp_path / f"rank{rank}.err").read_text() for rank in (0, 1)]
    assert "3 images are too few for FID on 5 features; it wants 6 or more" in errors[0]
    assert errors[0].count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_what_fails_on_one_process_ends_all_and_is_said(sets, tmp_path):
    words = ["--samples", sets / "many", "--reference", sets / "real.npz", "--metrics", "--batch-size", 4]
    words += ["--scorer", f"{sets / 'own.py'}:ink_of_rank_0", "--device", "cpu", "--output", "out"]
    done = torchrun(2, TOOL, *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "--scorer: " in done.stderr
    assert "ink_of_rank_0 failed at line 25: RuntimeError: the pen of rank 1 is empty" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_share_is_whole_batches_in_turn():
    assert [list(Share(rank, 3).starts(25, 4)) for rank in range(3)] == [[0, 12, 24], [4, 16], [8, 20]]
    rows = np.stack([Share(rank, 3).rows(25, 4) for rank in range(3)])
    assert (rows.sum(0) == 1).all()
    assert np.flatnonzero(rows[1]).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert sum(Share(0, 3).done(start, 25, 4) for start in Share(0, 3).starts(25, 4)) == 25
    assert Share().starts(5, 2) == range(0, 5, 2)


def test_a_process_decodes_only_its_part_of_a_folder(sets, tmp_path):
    (tmp_path / "many").mkdir()
    for place in range(5):
        (tmp_path / "many" / f"{place}.png").write_bytes((sets / "many" / f"{place}.png").read_bytes())
    (tmp_path / "many" / "3.png").write_bytes(b"damaged")
    found = read_images(tmp_path / "many", lambda count: np.arange(count) % 2 == 0).images
    assert np.array_equal(found[[0, 2, 4]], read_images(sets / "many").images[[0, 2, 4]])


def test_verdicts_of_two_processes_are_those_of_one(tmp_path):
    folder, random = tmp_path / "drawn", np.random.default_rng(5)
    folder.mkdir()
    tiny_detr(tmp_path / "detr")
    # A random head is certain of nothing.
    weights = load_file(tmp_path / "detr" / "model.safetensors")
    weights["class_labels_classifier.weight"] *= 3000
    save_file(weights, tmp_path / "detr" / "model.safetensors", {"format": "pt"})
    lines, prompts = [], [prompt.text for prompt in geneval_prompts() if prompt.tag in ("single_object", "position")]
    for place, prompt in enumerate(prompts[60:91]):
        pixels = random.integers(256, size=(64, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
        lines.append(json.dumps({"file": f"{place}.png", "prompt": prompt}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    words = ["--samples", folder, "--reference", folder, "--metrics", "--detector", tmp_path / "detr"]
    words += ["--batch-size", 6, "--device", "cpu"]
    done = run_tool(TOOL, *words, "--output", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    jobs = start_job(2, TOOL, *words, "--output", "two", cwd=tmp_path)
    assert ended(jobs) == [0, 0], [(tmp_path / f"rank{rank}.err").read_text()[-1000:] for rank in range(2)]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["sets"][0] for name in ("one", "two"))
    assert one == two
    verdicts = one["geneval_details"]["verdicts"]
    assert [verdict["prompt"] for verdict in verdicts] == prompts[60:91]
    table = (tmp_path / "two" / "table.md").read_text()
    assert one["geneval_position"] == np.mean([each["correct"] for each in verdicts if each["tag"] == "position"])
    header, _, row = table.splitlines()[:3]
    assert "| FID ↓ | GenEval ↑ | single object ↑ | position ↑ |" in header
    assert row.split(" | ")[2] == "–"
    assert "not comparable with numbers by mmdet's Mask2Former" in table
    assert "522 of 553 prompts have no image; the mean is over 2 of 6 tasks" in table
    assert "A reward alone misleads" in table
