"""The images' recipe. Oracle: hadolint, and the checkout itself; that the images build takes a Docker daemon."""

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")
INSTRUCTIONS = [
    line.split(None, 1)
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())).splitlines()
    if line.strip()
]


def hadolint(file):
    if not HADOLINT.exists():
        pytest.skip("hadolint is not installed; pip install -e '.[dev]'")
    return subprocess.run([HADOLINT, "--failure-threshold", "style", file], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say():
    answer = hadolint(ROOT / "Dockerfile")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout == ""


def test_hadolint_would_say_something(tmp_path):
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text((ROOT / "Dockerfile").read_text().replace("USER 10001:0", "RUN pip install numpy"))
    assert "DL3013" in hadolint(spoilt).stdout


def copied():
    """What comes from the checkout."""
    sources = [arguments.split()[:-1] for name, arguments in INSTRUCTIONS if name == "COPY"]
    return sorted({path for paths in sources if not paths[0].startswith("--from=") for path in paths})


def is_ignored(path):
    """As Docker reads .dockerignore: the last line that matches the path or a folder above it counts."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts)
        else:
            matches = any(fnmatch.fnmatch(one, pattern) and one.count("/") == pattern.count("/") for one in above)
        if matches:
            ignored = not line.startswith("!")
    return ignored


def tracked(folder):
    listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--", folder], capture_output=True, text=True)
    return [name for name in listing.stdout.split("\0") if name]


def test_what_is_copied_is_there_and_reaches_the_builder():
    paths = copied()
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    assert [name for path in paths for name in (path, *tracked(path)) if is_ignored(name)] == []


def test_who_installs_the_package_has_the_examples_that_it_takes_along():
    there, installs = set(), 0
    for name, arguments in INSTRUCTIONS:
        there = set() if name == "FROM" else there | ({arguments.split()[0]} if name == "COPY" else set())
        if name == "RUN" and arguments.endswith("--no-deps ."):
            installs += 1
            assert {"megatron_cca", "examples"} <= there
    assert installs == 1


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "runs/x/config.yaml", "tests/conftest.py", "megatron_cca/__pycache__/a.pyc"],
)
def test_what_no_image_needs_stays_outside(path):
    assert is_ignored(path)


def test_no_stage_that_is_run_ends_as_root():
    stages, last = {}, None
    for name, arguments in INSTRUCTIONS:
        if name == "FROM":
            last = arguments.split()[-1]
            assert ":" in arguments and ":latest" not in arguments, "every base is pinned"
        elif name == "USER":
            stages[last] = arguments
    assert stages == {"cpu": "10001:0", "gpu": "10001:0"}


@pytest.fixture(scope="module")
def image():
    spec = importlib.util.spec_from_file_location("image_constraints", ROOT / "docker" / "image_constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NGC = {
    "apex": "0.1",
    "filelock": "3.20.0",
    "numpy": "2.1.0",
    "nvidia-dali-cuda130": "1.52.0",
    "torch": "2.10.0a0+b558c986e8.nv25.11",
    "transformer-engine": "2.9.0+70f53666",
    "xgboost": "3.0.0+nv",
    "yarl": "1.2",
}


def test_what_the_image_has_built_stays_and_the_rest_is_bounded(image):
    ours = image.pins("# comment\nnumpy==2.5.5\ntorch_fidelity==0.4.0\ntorch==2.15.0\nfilelock==4.2.11\nyarl==1.1\n")
    assert image.image_constraints(ours, NGC) == [
        "apex==0.1",
        "filelock<=4.2.11",
        "numpy==2.1.0",
        "nvidia-dali-cuda130==1.52.0",
        "torch-fidelity<=0.4.0",
        "torch==2.10.0a0+b558c986e8.nv25.11",
        "transformer-engine==2.9.0+70f53666",
        "xgboost==3.0.0+nv",
    ]


def test_what_has_moved_is_named(image):
    written = "\n".join(image.image_constraints({}, NGC))
    assert image.moved(written, NGC) == []
    assert image.moved(written, NGC | {"torch": "2.15.0"}) == ["torch was 2.10.0a0+b558c986e8.nv25.11, is 2.15.0"]
    second = image.moved(written, NGC | {"nvidia-dali-cuda120": "1.52.0"})
    assert second == ["several DALIs: nvidia-dali-cuda130, nvidia-dali-cuda120"]


def test_every_pin_is_read(image):
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(image.pins(text)) == len(lines)
