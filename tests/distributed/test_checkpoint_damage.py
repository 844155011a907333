"""Each file of a checkpoint cut, flipped or deleted in turn: found, named, and the one before taken instead."""

import shutil

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.integrity import check_whole
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.errors import UserError
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA, PP2, TP2

NEWEST, BEFORE = 4, 2
LAYOUTS = {"one process": (1, []), "TP 2": (2, TP2), "PP 2": (2, PP2), "DP 2": (2, [])}
LATEST = layout.LATEST


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {"cut": cut, "flipped": flip, "deleted": lambda path: path.unlink()}


@pytest.fixture(scope="module")
def saved(digit_shards, tmp_path_factory):
    """The checkpoints of steps 2 and 4 of a run on two ranks, with files of both."""
    folder = tmp_path_factory.mktemp("saved")
    overrides = [*CCA, *TP2, f"data.path={digit_shards}", f"training.output_dir={folder}/run"]
    for _ in range(2):
        run_workers(2, "checkpoint_workers.resume", {"overrides": overrides, "steps": 2, "save": True}, folder)
    root = folder / "run" / layout.FOLDER
    assert layout.iterations(root) == [BEFORE, NEWEST]
    return root


def files_of(root):
    folder = layout.iteration_folder(root, NEWEST)
    found = sorted(str(path.relative_to(root)) for path in folder.rglob("*") if path.is_file())
    assert {".metadata", "metadata.json", "checkpoint.json", "__0_0.distcp", "__1_0.distcp"} <= {
        name.split("/")[1] for name in found
    }
    return [*found, LATEST]


def test_every_damage_is_named_and_the_checkpoint_before_taken(saved, tmp_path):
    roots = {}
    for name in files_of(saved):
        for damage, spoil in DAMAGES.items():
            root = tmp_path / f"{damage} {name.replace('/', ' ')}"
            shutil.copytree(saved, root)
            spoil(root / name)
            roots[str(root)] = (root / name, name)
    answers = run_workers(2, "checkpoint_workers.newest_checkpoints", {"roots": list(roots)}, tmp_path / "job")
    for root, (path, name) in roots.items():
        iteration, passed_over = answers[root]
        # Without the latest-file nothing is lost: the folders say which is newest.
        assert iteration == (NEWEST if name == LATEST else BEFORE), root
        assert any(str(path) in line for line in passed_over) or (
            name.endswith(layout.SUMMARY) and str(path.parent) in passed_over[0]
        ), (root, passed_over)


def test_every_damage_of_a_checkpoint_to_start_from_is_refused_by_name(saved, tmp_path):
    for name in files_of(saved)[:-1]:
        for damage, spoil in DAMAGES.items():
            root = tmp_path / f"{damage} {name.replace('/', ' ')}"
            shutil.copytree(saved, root)
            spoil(root / name)
            with pytest.raises(UserError) as refusal:
                check_whole(layout.iteration_folder(root, NEWEST), "training.pretrained_checkpoint")
            said = str(refusal.value)
            assert said.startswith("training.pretrained_checkpoint: ")
            assert name.split("/")[-1] in said
            assert "\n" not in said


def test_damage_everywhere_is_refused_and_nothing_starts_over(saved, tmp_path):
    roots = [tmp_path / name for name in ("damaged", "gone", "empty", "never")]
    shutil.copytree(saved, roots[0])
    for number in layout.iterations(roots[0]):
        flip(layout.iteration_folder(roots[0], number) / "__0_0.distcp")
    shutil.copytree(saved, roots[1], ignore=shutil.ignore_patterns("iter_*"))
    roots[2].mkdir()
    answers = run_workers(
        2, "checkpoint_workers.newest_checkpoints", {"roots": list(map(str, roots))}, tmp_path / "job"
    )
    damaged, gone, empty, never = (answers[str(root)] for root in roots)
    assert "iter_0000004/__0_0.distcp is damaged" in damaged
    assert "none of" in damaged
    assert "names a checkpoint that is gone" in gone
    assert empty is None
    assert never is None


def test_a_latest_file_that_names_an_older_one_does_not_take_steps_back_unsaid(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "root")
    (root / LATEST).write_text(f"{BEFORE}\n")
    iteration, said = run_workers(1, "checkpoint_workers.newest_checkpoints", {"roots": [str(root)]}, tmp_path / "job")[
        str(root)
    ]
    assert iteration == NEWEST
    assert said == [
        f"{root}/{LATEST} says 2, iter_0000004 is the newest whole checkpoint and is taken; to go back, remove the "
        "newer ones"
    ]


@pytest.mark.parametrize("name", ["one process", "PP 2", "DP 2"])
def test_what_is_written_beside_the_training_is_the_step_it_was_begun_at(name, digit_shards, tmp_path):
    """The disk waits for the other steps, so that weights and optimizer move on before it writes."""
    ranks, overrides = LAYOUTS[name]
    common = [*CCA, *overrides, f"data.path={digit_shards}", "training.micro_batch_size=2"]
    at_once = [*common, f"training.output_dir={tmp_path}/at_once", "training.async_save=false"]
    beside = [*common, f"training.output_dir={tmp_path}/beside"]
    run_workers(ranks, "checkpoint_workers.resume", {"overrides": at_once, "steps": 2, "save": True}, tmp_path)
    settings = {"overrides": beside, "steps": 5, "may_write": str(tmp_path / "may_write")}
    answer = run_workers(ranks, "checkpoint_workers.saved_while_training", settings, tmp_path)
    assert answer == {"writing": True, "problems": [None], "iteration": 5}
    first, second = (
        StoredTensors(layout.iteration_folder(tmp_path / name / layout.FOLDER, 2), "key")
        for name in ("at_once", "beside")
    )
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        shape = first.shape(name)
        one, other = (stored.read_block(name, [0] * len(shape), shape) for stored in (first, second))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_bad_numbers_are_named_move_nothing_and_are_never_saved(name, digit_shards, tmp_path):
    ranks, overrides = LAYOUTS[name]
    common = [*CCA, f"data.path={digit_shards}", f"training.output_dir={tmp_path}/run", "training.micro_batch_size=2"]
    found = run_workers(
        ranks, "checkpoint_workers.bad_numbers", {"common": common, "layouts": {name: overrides}}, tmp_path
    )[name]
    assert found["gradients"].startswith("gradients: NaN or infinity on rank ")
    assert "layer 1 (1 tensor), first in decoder.layers.1.mlp.linear_fc1.weight" in found["gradients"]
    assert found["grad_norm_is_nan"]
    assert found["unmoved"]
    assert found["after"] is None
    assert found["moved"]
    assert found["loss"].startswith("loss: NaN or infinity in the policy's log p(x|c) in ")
    assert "the reference's" not in found["loss"]
    (saved,) = found["saved"]
    assert "linear_fc1" in saved
    assert saved.endswith("holds NaN or infinity")
    assert found["files"] == []


def test_remainders_saved_as_master_weights_are_not_resumed_and_the_weights_are_whole(digit_shards, tmp_path):
    common = [*CCA, "model.num_layers=2", "training.precision=bf16", f"data.path={digit_shards}"]
    settings = {
        "overrides": [*common, f"training.output_dir={tmp_path}/run"],
        "elsewhere": [f"training.output_dir={tmp_path}/again"],
    }
    answer = run_workers(1, "checkpoint_workers.saved_remainders", settings, tmp_path)
    assert answer["refusal"].startswith(
        f"training.output_dir: {answer['folder']} cannot be resumed: its master weights"
    )
    assert answer["same weights"]
    assert answer["rows"][0]["worst"] == 0.0
