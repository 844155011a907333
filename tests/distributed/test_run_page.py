"""A run's page in a real browser: a run with pictures, a judged set, and Chromium's own picture of the page."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from megatron_cca.io.figures import BLUE, RED
from tests.distributed.launch import ROOT, SCRIPT, run_tool, torchrun

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]
STEPS = 12


@pytest.fixture(scope="module")
def written(digit_shards, tmp_path_factory):
    """The page of a run of two processes that was resumed once, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    run, judged = folder / "run", folder / "judged"
    keys = [f"data.path={digit_shards}", f"training.output_dir={run}", "training.global_batch_size=64"]
    prompts = folder / "prompts.txt"
    prompts.write_text("a handwritten seven\nthe digit one\n" * 8)
    keys += [
        "logging.sample_interval=4",
        f"logging.sample_prompts={prompts}",
        "optimizer.lr_warmup_iters=1",
        "training.save_interval=4",
    ]
    keys.append("training.pretrained_checkpoint=null")
    for steps in (4, STEPS):
        settings = [word for key in [*keys, f"training.train_iters={steps}"] for word in ("--set", key)]
        found = torchrun(2, SCRIPT, "--config", "emu3_tiny_cca", *settings, cwd=folder)
        assert found.returncode == 0, found.stderr
    drawn = ["--checkpoint", run, "--prompts", prompts, "--output", folder / "drawn", "--grid", 4, 4]
    found = run_tool(ROOT / "tools" / "generate.py", *drawn, cwd=folder)
    assert found.returncode == 0, found.stderr
    sets = ["--samples", f"mine={folder / 'drawn'}", "--reference", "digits", "--metrics", "inception_score"]
    found = run_tool(ROOT / "tools" / "evaluate.py", *sets, "--output", judged, cwd=folder)
    assert found.returncode == 0, found.stderr
    arguments = [run, "--evaluation", judged, "--output", folder / "page.html"]
    found = run_tool(ROOT / "tools" / "report.py", *arguments, cwd=folder)
    assert found.returncode == 0, found.stderr
    return folder / "page.html", run


def pictured(page, size, folder):
    """Chromium's picture of a page, uint8 ``[H, W, 3]``, and the page's document as Chromium reads it."""
    picture = folder / f"{size[0]}.png"
    common = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/user",
    ]
    shot = [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run([*common, *shot], check=True, capture_output=True, timeout=200)
    found = subprocess.run(
        [*common, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=200
    )
    return np.asarray(Image.open(picture).convert("RGB")), found.stdout


def share_of(pixels, colour):
    """The share of pixels that have nearly this colour."""
    wanted = np.array(to_rgb(colour)) * 255
    return (np.abs(pixels - wanted).max(-1) < 12).mean()


def test_chromium_shows_curves_pictures_and_tables(written, tmp_path):
    page, run = written
    pixels, document = pictured(page, (1300, 3400), tmp_path)
    assert pixels.shape == (3400, 1300, 3)
    # Curves, and text all the way down to the table of the evaluation.
    assert share_of(pixels, BLUE) > 1e-5
    assert all((band < 128).any() for band in np.array_split(pixels, 10))
    for words in ("finished at step 12", "after 12 steps", "mine", "Predicted and measured"):
        assert words in document, words
    steps = [f"after {step} steps" for step in (0, 4, 8, 12)]
    assert [one for one in steps if f'alt="{one}"' in document] == steps
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert "resumed" in events
    assert f"{len(events)} events" in document


def test_on_a_narrow_screen_nothing_is_wider_than_the_screen(written, tmp_path):
    page, _ = written
    pixels, _ = pictured(page, (500, 5000), tmp_path)
    # What is too wide would push the curves' right edge out of the picture: their margin is white.
    assert (pixels[:, -8:] > 200).all()
    assert share_of(pixels, RED) < 0.5
