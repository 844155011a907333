"""A run continues only with the weights that it began with; what each key may do is declared."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config
from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.errors import UserError
from megatron_cca.keys import OnResume, effects
from megatron_cca.models import explicit
from megatron_cca.training.resuming import STARTED_FROM, check_resume, started_from


def test_every_key_is_declared_once():
    kinds = {
        (section.name, key.name): effects(Config())[f"{section.name}.{key.name}"].resume
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), section.name))
    }
    assert set(kinds.values()) == set(OnResume)
    with pytest.raises(KeyError):
        effects(Config())["training.new_key"]


def test_the_documentation_names_every_key_of_these_sections_that_is_refused():
    text = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    for section in ("data", "reference", "validation", "optimizer", "training"):
        for key in dataclasses.fields(getattr(Config(), section)):
            if effects(Config())[f"{section}.{key.name}"].resume is OnResume.REFUSED:
                table = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
                row = next(line for line in table.splitlines() if line.startswith(f"| `{key.name}` |"))
                assert " | refused | " in row


def save(folder, config, content=b"x", /, **summary):
    """A whole checkpoint with one file of tensors."""
    root = folder / layout.FOLDER
    partial = layout.partial_folder(root, 10)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(content)
    layout.finalize(partial, root, 10, {"config": config_to_dict(explicit(config)), **summary})
    return folder


@pytest.fixture
def bases(tmp_path):
    return [str(save(tmp_path / name, load_config(), name[:1].encode())) for name in ("a", "a2", "b")]


@pytest.fixture
def begun(tmp_path):
    """Begin a run, as of today or as of a version that did not record what it was started from."""

    def begin(*overrides, records=True):
        config = load_config(None, [f"training.output_dir={tmp_path}/run", *overrides])
        save(tmp_path / "run", config, **({STARTED_FROM: started_from(config)} if records else {}))

    return begin


def continued(tmp_path, *overrides):
    check_resume(load_config(None, [f"training.output_dir={tmp_path}/run", *overrides]))


def refused(tmp_path, *overrides):
    with pytest.raises(UserError) as error:
        continued(tmp_path, *overrides)
    return str(error.value)


PRETRAINED = "training.pretrained_checkpoint"


@pytest.mark.parametrize("records", [True, False])
def test_another_reference_is_refused_and_a_moved_one_is_not(bases, begun, tmp_path, records):
    a, same, b = bases
    begun(f"{PRETRAINED}={a}", records=records)
    continued(tmp_path, f"{PRETRAINED}={a}")
    continued(tmp_path, f"{PRETRAINED}={same}")
    assert refused(tmp_path, f"{PRETRAINED}={b}") == (
        f"{PRETRAINED}: {b!r} has other weights than the checkpoint that the run in {tmp_path}/run was started with "
        f"({a!r}); name that one, or choose another training.output_dir"
    )
    assert refused(tmp_path, f"{PRETRAINED}=null").startswith(f"{PRETRAINED}: None has other weights")
    shutil.rmtree(a)
    continued(tmp_path, f"{PRETRAINED}={same}")
    if records:
        assert refused(tmp_path, f"{PRETRAINED}={b}").startswith(f"{PRETRAINED}: ")


def test_a_path_that_leads_to_newer_weights_is_refused(bases, begun, tmp_path):
    a = bases[0]
    begun(f"{PRETRAINED}={a}")
    shutil.rmtree(a)
    save(Path(a), load_config(), b"trained on")
    assert refused(tmp_path, f"{PRETRAINED}={a}").startswith(f"{PRETRAINED}: ")
    shutil.rmtree(tmp_path / "run")
    begun("reference.checkpoint=" + bases[1])
    shutil.rmtree(bases[1])
    save(Path(bases[1]), load_config(), b"trained on")
    assert refused(tmp_path, "reference.checkpoint=" + bases[1]).startswith("reference.checkpoint: ")


def test_what_no_reference_is_made_of_may_move_on(bases, begun, tmp_path):
    a, _, b = bases
    begun(f"{PRETRAINED}={a}", "objective.name=next_token")
    shutil.rmtree(a)
    save(Path(a), load_config(), b"trained on")
    continued(tmp_path, f"{PRETRAINED}={a}", "objective.name=next_token")
    assert refused(tmp_path, f"{PRETRAINED}={b}", "objective.name=next_token").startswith(f"{PRETRAINED}: ")


def test_a_run_of_a_former_version_continues_whatever_was_written_for_its_objective(tmp_path):
    tree = config_to_dict(explicit(load_config(None, [f"training.output_dir={tmp_path}/run", "objective.name=dpo"])))
    former = {**tree, "objective": {**tree["objective"], "negative_weight": 50.0}}
    save(tmp_path / "run", load_config(), config=former)
    continued(tmp_path, "objective.name=dpo")
    assert refused(tmp_path, "objective.name=dpo", "objective.beta=0.5").startswith("objective.beta: 0.5, but the run")
    for name in ("cca", "unlearning", "next_token"):
        expected = f"objective.name: {name!r}, but the run in {tmp_path}/run was started with 'dpo'; set it so, or"
        assert refused(tmp_path, f"objective.name={name}").startswith(expected)


def test_a_damaged_record_is_no_record(bases, begun, tmp_path):
    begun(f"{PRETRAINED}={bases[0]}")
    assert json.loads((tmp_path / "run" / layout.FOLDER / "iter_0000010" / layout.SUMMARY).read_text())[STARTED_FROM]
    shutil.rmtree(tmp_path / "run")
    save(tmp_path / "run", load_config(None, [f"{PRETRAINED}={bases[0]}"]), **{STARTED_FROM: "x"})
    continued(tmp_path, f"{PRETRAINED}={bases[0]}")
