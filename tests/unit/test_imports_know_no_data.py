"""What a checkpoint that no run wrote is believed to be: its weights' sizes and width, and nothing about data."""

import json

import numpy as np
import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import Config, ModelConfig, ParallelConfig
from megatron_cca.data.tokenizers import train_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.model_loading import default_grid, inspect_for_sampling, open_tokenizers
from megatron_cca.generation.sampling_job import job_of
from megatron_cca.lab.studies import SamplingConfig
from megatron_cca.lab.studies import checks as study_checks
from megatron_cca.lab.studies.study import ConfiguredRun, Method, Study, with_own_grid
from megatron_cca.models import resolve_architecture
from megatron_cca.programs import generate as program
from megatron_cca.programs.parsing import parsed
from tests.references import llamagen, thin
from tests.references.resealed import reseal

ALONE = ParallelConfig()


@pytest.fixture(scope="module")
def emu3(tmp_path_factory):
    return thin.save_emu3(tmp_path_factory.mktemp("hub") / "emu3")


@pytest.fixture(scope="module")
def imported_emu3(emu3, tmp_path_factory):
    return import_checkpoint(emu3, tmp_path_factory.mktemp("emu3") / "out", progress_bar=False)


@pytest.fixture(scope="module")
def imported_llamagen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    torch.save({"model": llamagen.random_weights(thin.LLAMAGEN)}, folder / "thin.pt")
    return import_checkpoint(folder / "thin.pt", folder / "out", sizes=thin.LLAMAGEN_KEYS, progress_bar=False)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where nothing has been tokenised yet."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists()


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_import_stores_that_its_data_are_unknown(imported_emu3, imported_llamagen):
    for folder, precision in ((imported_emu3, "bf16"), (imported_llamagen, "fp32")):
        assert json.loads((folder / layout.SUMMARY).read_text())["config"]["data"]["path"] is None
        config = saved_config(folder, "")
        assert (config.data.path, config.training.precision) == (None, precision)


@pytest.mark.parametrize("source", ["import", "folder"])
def test_the_released_emu3_draws_the_released_grid(source, emu3, imported_emu3):
    found = inspect_for_sampling(str(emu3 if source == "folder" else imported_emu3), ALONE)
    assert default_grid(found.config) == (90, 90)
    vocabulary = found.architecture.vocabulary
    assert (vocabulary.size, vocabulary.visual_start, vocabulary.codebook_size) == (184_622, 151_854, 32_768)


@pytest.fixture(scope="module")
def generate():
    """tools/generate.py, as far as it needs no job."""

    def job(checkpoint, *arguments):
        given = parsed(program.OPTIONS, ["--checkpoint", str(checkpoint), "--output", "drawn", *arguments])
        return job_of(given, inspect_for_sampling(str(checkpoint), ALONE))

    return job


def test_the_program_draws_what_the_model_is_of(generate, imported_emu3, imported_llamagen, tmp_path):
    job = generate(imported_emu3, "--caption", "a cat")
    assert (job.settings.height, job.settings.width) == (90, 90)
    job = generate(imported_llamagen, "--classes", "all")
    assert (job.settings.height, job.settings.width) == (4, 4)
    assert [(prompt.title, prompt.label) for prompt in job.prompts] == [(f"class {n}", n) for n in range(1000)]
    assert [prompt.label for prompt in generate(imported_llamagen, "--classes", "207", "360").prompts] == [207, 360]
    (tmp_path / "names.txt").write_text("".join(f"name {n}\n" for n in range(1000)))
    (prompt,) = generate(imported_llamagen, "--classes", "name 42", "--class-captions", "names.txt").prompts
    assert (prompt.title, prompt.label) == ("name 42", 42)
    message = refused(generate, imported_llamagen, "--classes", "1000")
    assert message.startswith("--classes: '1000' is no class; there are 1000: 0 to 999; --class-captions gives")


def test_who_has_no_room_for_the_released_grid_is_asked_for_one(tmp_path):
    thin.save_emu3(tmp_path, max_position_embeddings=5120)
    found = inspect_for_sampling(str(tmp_path), ALONE)
    assert refused(default_grid, found.config) == (
        "the checkpoint does not say what images the model was trained on; give height and width in visual tokens, "
        "such as 16 16"
    )


def test_a_missing_tokenizer_is_what_is_named(imported_emu3, imported_llamagen, tmp_path):
    def opened(checkpoint, **given):
        found = inspect_for_sampling(str(checkpoint), ALONE)
        return refused(open_tokenizers, found.folder, found.config, found.architecture.vocabulary, **given)

    lacking = "has no image tokenizer with it; give the"
    wanted = f"--image-tokenizer: {imported_llamagen} {lacking} .pt of LlamaGen's, such as vq_ds16_c2i.pt"
    assert opened(imported_llamagen) == wanted
    wanted = f"--image-tokenizer: {imported_emu3} {lacking} config.json and safetensors of Emu3's"
    (tmp_path / "words").mkdir()
    train_tokenizer(["a cat"], 300).save(str(tmp_path / "words" / "tokenizer.json"))
    assert opened(imported_emu3, text=tmp_path / "words") == wanted
    hf = thin.save_emu3(tmp_path / "hf")
    (hf / "emu3.tiktoken").unlink()
    lacking = "has no text tokenizer with it; give a folder with tokenizer.json or emu3.tiktoken"
    assert opened(hf) == f"--text-tokenizer: {hf} {lacking}"


def rewritten(folder, to, **changes):
    """A copy of a checkpoint whose summary has the defaults of former versions, and other changes."""
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())

    def change(summary):
        summary["config"]["data"]["path"] = "digits"
        summary["config"]["objective"]["beta"] = 7.0
        return {key: value for key, value in (summary | changes).items() if value is not ...}

    reseal(to, change)
    return to


def test_imports_of_former_versions_know_as_little(imported_llamagen, tmp_path):
    config = saved_config(rewritten(imported_llamagen, tmp_path / "former"), "")
    assert config.data.path is None
    assert config.objective == Config().objective
    assert config.model == saved_config(imported_llamagen, "").model


def test_what_a_run_wrote_is_believed(imported_llamagen, tmp_path):
    config = saved_config(rewritten(imported_llamagen, tmp_path / "run", imported_from=..., data="abc"), "")
    assert (config.data.path, config.objective.beta) == ("digits", 7.0)


def test_a_study_does_not_ask_a_model_of_other_things_for_digits(imported_llamagen):
    settings = type("Settings", (), {"prompts": "digits"})()
    study = Study(None, settings, None, saved_config(imported_llamagen, "").model, {})
    message = refused(study_checks._check_conditions, study)
    assert message == "prompts: digits are for models of the digits; name a file of this model's prompts"


def test_a_study_does_not_draw_the_digits_grid_with_another_model(imported_emu3, imported_llamagen):
    def drawing(checkpoint, **sizes):
        model = saved_config(checkpoint, "").model
        own_grid = with_own_grid(SamplingConfig(**sizes), model)
        method = Method("base", "base", ConfiguredRun(None, own_grid), [{}], [])
        return Study(None, None, None, model, {"base": method})

    wanted = "sampling: emu3-8b has images of any size; give their height and width"
    assert refused(study_checks._check_grids, drawing(imported_emu3)) == wanted
    assert refused(study_checks._check_grids, drawing(imported_emu3, height=90)) == wanted
    study_checks._check_grids(drawing(imported_emu3, height=90, width=90))
    study_checks._check_grids(drawing(imported_llamagen))
    other = drawing(imported_llamagen, height=5, width=7)
    assert refused(study_checks._check_grids, other).startswith("sampling: 5 x 7 codes, the model takes")


def test_a_study_draws_the_grid_that_a_model_of_the_digits_has():
    for name, grid in (("emu3-tiny", (4, 4)), ("llamagen-tiny", (4, 4)), ("var-tiny", (1, 21)), ("var-d16", (1, 680))):
        own = with_own_grid(SamplingConfig(), ModelConfig(name=name))
        assert (own.height, own.width) == grid, name


def test_all_1000_classes_are_there(imported_llamagen):
    vocabulary = resolve_architecture(saved_config(imported_llamagen, "").model).vocabulary
    assert (vocabulary.num_classes, vocabulary.codebook_size) == (1000, 16_384)
    none = np.empty(0, dtype=np.int64)
    ids = [int(vocabulary.prompt(np.array([label]), none)[0]) for label in (0, 207, 999)]
    assert ids == [16_384, 16_591, 17_383]
    assert int(vocabulary.prompt(none, none)[0]) == 17_384
