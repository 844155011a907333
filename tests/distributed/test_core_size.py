"""What a training job imports: little enough to be read, nothing of the laboratory, nothing that is switched off."""

import json
import os
import sys
from pathlib import Path

import pytest

import megatron_cca
from megatron_cca.models import FAMILIES
from tests.distributed.launch import ROOT, SCRIPT, typed
from tests.distributed.test_layout_parity import CCA

PACKAGE = Path(megatron_cca.__file__).parent
MOST_LINES, MOST_CALLS = 12_000, 8
# Switched off in the tiny run: what it must not import, and the key that would.
SWITCHED_OFF = {
    "training/pictures.py": "logging.sample_interval",
    "generation/decode_loop.py": "logging.sample_interval",
    "training/caching.py": "reference.strategy=cached",
    "models/lora.py": "lora.dim",
    "models/frozen_weights.py": "reference.strategy=offload or reference.fp8_param",
    "models/rotary_2d.py": "a family with position_embedding rope_2d",
    "models/formats.py": "a conversion",
    "models/fp8_devices.py": "training.precision=fp8",
    "models/weight_map.py": "a conversion, or lora.dim",
    "checkpoint/stored_tensors.py": "a conversion, or a resume",
    "io/file_contents.py": "files of other programs",
    "io/output_folders.py": "reference.strategy=cached",
    "training/engine.py": "parallel.tp_comm_overlap or kernels.cuda_graph_impl",
    "data/partners.py": "data.pairs=images",
    "training/host_memory.py": "reference.strategy=offload or optimizer.optimizer_cpu_offload",
    "platform/host_weights.py": "reference.strategy=offload",
    "models/num_parameters.py": "reference.strategy=offload",
    "training/drawn_partners.py": "objective.name=ddo",
    "data/null_pairs.py": "objective.name=gft",
    "parallel/mixed_logps.py": "objective.name=gft",
    "data/digits.py": "data.path=digits",
    "data/codebooks.py": "data.path=digits",
    "models/scale_quantizer.py": "data.path=digits",
    "data/shard_writing.py": "data.path=digits",
    "training/kernel_checks.py": "keys of kernels, overlaps and layouts",
    "training/trackers/__init__.py": "logging.wandb or logging.mlflow",
    "training/trackers/to_wandb.py": "logging.wandb",
    "training/trackers/to_mlflow.py": "logging.mlflow",
    "megatron_compat/relied_on.py": "a test",
}

REPORT = """
import inspect, json, os, runpy, sys
import megatron_cca
from megatron_cca.objectives.cca import CCA
package = os.path.dirname(megatron_cca.__file__) + os.sep

def loss(self, rows, compute=CCA.loss):
    names = [frame.function for frame in inspect.stack(0) if frame.filename.startswith(package)]
    print("called by:", json.dumps(names))
    return compute(self, rows)

CCA.loss = loss
runpy.run_path(sys.argv.pop(1), run_name="__main__")
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print("imported:", json.dumps([file for file in files if file]))
"""


@pytest.fixture(scope="module")
def run(digit_shards, checkpoint, tmp_path_factory):
    """What a run of the tiny model prints which loads its base, takes a step and saves, and then what it imported."""
    values = {
        "data.path": digit_shards,
        "training.output_dir": "run",
        "training.pretrained_checkpoint": checkpoint,
        "training.train_iters": 1,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 8,
    }
    sizes = [override for override in CCA if override.startswith("model.")]
    overrides = [*sizes, *(f"{key}={value}" for key, value in values.items())]
    sets = [word for override in overrides for word in ("--set", override)]
    arguments = ("--config", ROOT / "examples" / "emu3_tiny_cca.yaml", *sets)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = tmp_path_factory.mktemp("core")
    done = typed(sys.executable, "-c", REPORT, SCRIPT, *arguments, cwd=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "checkpoints" / "iter_0000001").is_dir()
    return done.stdout


@pytest.fixture(scope="module")
def imported(run):
    """The package's files that the run imports."""
    files = json.loads(run.rpartition("imported:")[2])
    return {file.relative_to(PACKAGE): file for file in map(Path, files) if file.is_relative_to(PACKAGE)}


def test_what_a_training_job_imports_can_be_read(imported):
    lines = {str(name): len(file.read_text().splitlines()) for name, file in imported.items()}
    longest = ", ".join(f"{name} {lines[name]}" for name in sorted(lines, key=lines.get, reverse=True)[:10])
    assert sum(lines.values()) <= MOST_LINES, f"{sum(lines.values())} lines in {len(lines)} files, such as {longest}"
    assert len(lines) > 60


def test_the_loss_is_near_the_program(run):
    """The functions of the package between the program's start and the objective's loss, which is not among them."""
    (line, *_) = [line for line in run.splitlines() if line.startswith("called by:")]
    names = json.loads(line.removeprefix("called by:"))
    assert names[-1] == "main"
    assert len(names) <= MOST_CALLS, names


def test_it_imports_nothing_of_the_laboratory(imported):
    assert not [name for name in imported if name.parts[0] == "lab"]


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_it_imports_nothing_that_is_switched_off(name, imported):
    assert (PACKAGE / name).is_file()
    assert Path(name) not in imported, f"only {SWITCHED_OFF[name]} needs it; import it where that is asked for"


def test_it_imports_one_family(imported):
    assert {name.parts[1] for name in imported if name.parts[0] == "models"} & {*FAMILIES} == {"emu3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_are_called_after_their_family(family):
    """Else a preset's family could not be told without importing all of them."""
    presets = FAMILIES[family].presets
    assert all(name.startswith(f"{family}-") for name in presets)
    assert f"{family}-tiny" in presets
