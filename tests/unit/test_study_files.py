"""Files of studies: what they may say, what is refused before anything runs, and those that come with the project."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_cca.checkpoint import layout
from megatron_cca.config.load import config_from_dict
from megatron_cca.data import DIGITS
from megatron_cca.errors import UserError
from megatron_cca.lab.studies import SamplingConfig
from megatron_cca.lab.studies.checks import check_study
from megatron_cca.lab.studies.study import ConfiguredRun, grid, open_study, passes_of_run
from megatron_cca.objectives import OBJECTIVES
from tests.references import fashion
from tests.references.idx_files import clothes, write_idx
from tests.references.small_study import BETA, CONFIGS, GONE, LAMBDA, LR, SCALE, STUDY, checkpoint, opened


def test_the_file_is_read(tmp_path):
    study = opened(tmp_path)
    assert list(study.methods) == ["base", "cfg", "control", "cca"]
    assert study.methods["cca"].trials == [{LR: 0.001}, {LR: 0.002}]
    assert study.methods["cca"].sweep[:2] == [{BETA: 0.1, LAMBDA: 1.0}, {BETA: 0.1, LAMBDA: 1000.0}]
    run = study.methods["cca"].configured({LR: 0.002, LAMBDA: 10.0, SCALE: 0.5})
    assert (run.config.optimizer.lr, run.config.objective.negative_weight) == (0.002, 10.0)
    assert (run.sampling.guidance_scale, run.sampling.forwards_per_token) == (0.5, 2)
    assert study.methods["cfg"].configured({SCALE: 0.5}).config is None


def test_set_reaches_every_run_and_a_methods_own_comes_last(tmp_path):
    own = {**STUDY["methods"]["cca"], "set": {"optimizer.weight_decay": 0.2, "sampling.top_k": 5}}
    study = opened(tmp_path, **{"set": {"optimizer.weight_decay": 0.1}, "methods/cca": own})
    decays = [one.config.optimizer.weight_decay for one in (study.methods["control"], study.methods["cca"])]
    assert (study.base.optimizer.weight_decay, *decays) == (0.1, 0.1, 0.2)
    assert [study.methods[name].run.sampling.top_k for name in ("base", "cca")] == [0, 5]


def test_another_objective_keeps_the_keys_that_it_has_too(tmp_path):
    own = {"set": {"objective.name": "dpo"}, "sweep": {BETA: [0.2]}}
    study = opened(tmp_path, **{"methods/cca": {**STUDY["methods"]["cca"], **own}, "plots": [{"kind": "comparison"}]})
    objectives = [study.methods["cca"].configured(values).config.objective for values in ({}, {BETA: 0.2})]
    assert objectives == [OBJECTIVES["dpo"](0.1), OBJECTIVES["dpo"](0.2)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample": 5}, "study.yaml: sample: unknown key; did you mean samples?"),
        ({"methods/cca/tun": {}}, "methods.cca.tun: unknown key; did you mean methods.cca.tune?"),
        ({"methods/Big one": {}}, "methods.Big one: must be of a-z, 0-9, _ and -, found 'Big one'"),
        ({"sampling": {"hight": 4}}, "sampling.hight: unknown key; did you mean sampling.height?"),
        ({"seeds": GONE}, "seeds: is missing"),
        ({"seeds": [1]}, "seeds: must be a list of 2 or more"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has one twice"),
        ({"seeds": [1, 7]}, "tuning_seed: 7 is one of seeds"),
        ({"trials": 3}, "methods.cfg.tune: 2 settings, but trials is 3"),
        ({"methods/cca/tune": {}}, "methods.cca.tune: 1 settings, but trials is 2"),
        ({"methods/cca/tune": {LR: [0.001, 0.001]}}, "methods.cca.tune: a value is given twice"),
        ({"methods/cca/sweep": {BETA: []}}, "methods.cca.sweep.objective.beta: must be a list of 1 or more"),
        ({"methods/control": GONE}, "methods.control: every study needs it"),
        ({"metrics": ["fid"]}, "plots.0: kind: frontier draws inception_score; add it to metrics"),
        ({"samples": 64}, "samples: 64 images are too few for FID on 64 features; it wants 65 or more"),
        ({"tuning_samples": 3}, "tuning_samples: 3 images are too few for FID"),
        ({"metrics": ["fid", "kid"]}, "samples: 100 images are too few for KID with kid_subset_size 1000"),
        ({"extractor": "none.py:f"}, "extractor: the file none.py does not exist"),
        ({"classifier": "none.py:f"}, "classifier: the file none.py does not exist"),
        ({"scorer": "none.py:f"}, "scorer: --scorer: the file none.py does not exist"),
        (
            {"scorer": "hpsv2:none"},
            "scorer: --scorer: the file none does not exist; give a copy of HPS",
        ),
        ({"sampling": {"height": 90, "width": 90}}, "sampling: a grid of 90 x 90 takes "),
        ({"methods/control/config": "cca.yaml"}, "methods.control: every study needs it"),
        ({"methods/control/config": None}, "methods.control: every study needs it"),
        ({"methods/cca/config": None}, "methods.cca: optimizer.lr: nothing is trained here"),
        ({"methods/base": {}}, "methods.base: every study has the base"),
        ({"methods/cca/config": "no.yaml"}, "methods.cca.config: --config"),
        ({"methods/cca/set": {"objective.name": "dpo"}}, "methods.cca: objective.negative_weight: dpo has no such key"),
        ({"methods/control/set": {BETA: 0.1}}, "methods.control.set: objective.beta: next_token has no such key"),
        ({"methods/cca/tune": {"optimizer.lrr": [1, 2]}}, "methods.cca: optimizer.lrr: unknown key; did you mean"),
        ({"methods/cca/tune": {LR: [0.1, "much"]}}, "methods.cca: optimizer.lr: must be a number"),
        ({"methods/cca/tune": {"lr": [0.1, 0.2]}}, "methods.cca: lr: expected section.key, such as optimizer.lr"),
        ({"methods/cca/tune": {"training.seed": [5, 6]}}, "methods.cca: training.seed: is the study's own to set"),
        (
            {"methods/cfg/tune": {"sampling.scale": [1, 2]}},
            "methods.cfg: sampling.scale: unknown key; known here: guidance_scale",
        ),
        ({"methods/cfg/tune": {SCALE: [1, -2]}}, "sampling.guidance_scale: must be 0 or more"),
        (
            {"methods/cfg/set": {"sampling.contrastive_top_k": 5}},
            "sampling.contrastive_top_k: does not go with a guidance",
        ),
        (
            {"methods/cca/set": {"training.train_iters": 4}},
            "methods.cca: costs 4 steps x 8 samples x 8 passes = 256, methods.control 8 steps x 8 samples x 3 passes = "
            "192; all training must cost the same within 5%: 3 steps would",
        ),
        ({"methods/cca/sweep": {"training.train_iters": [3, 6]}}, "methods.cca: costs 6 steps x 8 samples"),
        ({"methods/cca/set": {"training.micro_batch_size": 5}}, "methods.cca: training.global_batch_size: 8 is not a"),
        ({"methods/cca/set": {"model.hidden_size": 96}}, "methods.cca: model: hidden_size is 96, the base's 64"),
        ({"methods/cca/set": {"parallel.context_parallel_size": 2}}, "does not divide the 1 processes of this job"),
        ({"base": {"config": "base.yaml", "checkpoint": "runs/x"}}, "base: needs either a config to pretrain it"),
        ({"base": {"checkpoint": "runs/nothing"}}, "no checkpoint at runs/nothing"),
        ({"base": {"config": "base.yaml", "set": {"trainin.seed": 3}}}, "base.set: trainin: unknown key"),
        ({"metrics": ["precision"]}, "metrics: fid is missing"),
        ({"tune_by": "accuracy", "classifier": None}, "tune_by: accuracy needs a classifier"),
        ({"tune_by": "inception_score", "metrics": ["fid"]}, "tune_by: inception_score is not among metrics"),
        (
            {"classifier": "someone"},
            "classifier: --classifier: 'someone' is neither digits nor FILE.py:FUNCTION nor FILE.judge",
        ),
        ({"extractor": "inception"}, "extractor: --extractor: inception needs its weights"),
        ({"reference": "no/where"}, "reference: no/where: does not exist"),
        ({"prompts": "no.txt"}, "prompts: no.txt: No such file or directory"),
        ({"plots": []}, "plots: is empty"),
        ({"compare": "dpo"}, "compare: dpo is no method; there are base, cfg, control, cca"),
        ({"methods/cfg/drawing": {}}, "methods.cfg.drawing: nothing is trained on these images; give a config"),
        ({"methods/cca/drawing": {}}, "methods.cca: drawing.role: partners, but objective cca has no pairs of images"),
        (
            {"methods/cca/drawing": {"role": "pairs"}},
            "cca.drawing.role: must be partners or data, found 'pairs'",
        ),
        ({"methods/cca/drawing": {"ronds": 2}}, "methods.cca.drawing.ronds: unknown key; did you mean "),
        ({"methods/cca/drawing": {"rounds": 0}}, "methods.cca.drawing.rounds: must be 1 or more, found 0"),
        ({"methods/control/drawing": {"role": "data"}}, "methods.control: every study needs it"),
        ({"methods/cca/set": {"drawing.rounds": 2}}, "methods.cca.set: drawing.rounds: nothing is drawn to train on"),
        ({"methods/cca/set": {"data.partner_path": "x"}}, "data.partner_path: is the study's own to set"),
        (
            {"methods/cca/drawing": {"role": "data", "guidance_scale": 1.0, "rounds": 2}},
            "methods.cca: costs 2 x (3 steps x 8 samples x 8 passes + 1437 drawn images x 2) = 6132, methods.control 8 "
            "steps x 8 samples x 3 passes = 192; all training must cost the same within 5%: 0 steps would",
        ),
        (
            {"plots": [{"kind": "frontier"}, {"kind": "frontier"}]},
            "plots.1.file: frontier.png is another plot's already",
        ),
        ({"plots": [{"kind": "against"}]}, "plots.0: x: is missing; give a key of a sweep"),
        ({"plots": [{"kind": "against", "x": LR}]}, "plots.0: x: no method sweeps optimizer.lr"),
        (
            {"plots": [{"kind": "against", "x": LR, "methods": ["cfg"]}]},
            "plots.0: methods: cfg does not sweep optimizer.lr",
        ),
        ({"plots": [{"kind": "comparison", "methods": ["dpo"]}]}, "plots.0: methods: dpo is none; there are base, cfg"),
        ({"plots": [{"kind": "comparison", "y": LR}]}, "plots.0: y: is of no use; leave it out"),
        ({"plots": [{"kind": "heatmap", "x": BETA, "y": BETA}]}, "must sweep the two keys x and y and no others"),
        (
            {"plots": [{"kind": "heatmap", "x": SCALE, "y": SCALE, "methods": ["cfg"]}]},
            "must sweep the two keys x and y",
        ),
        ({"plots": [{"kind": "frontier", "methods": ["control"]}]}, "none of them has a sweep"),
    ],
)
def test_refusals_are_one_line(changes, said, tmp_path):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, **changes)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "study.yaml" in message


def test_a_small_or_empty_reference_is_refused_before_anything_runs(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    with pytest.raises(UserError, match=r"study.yaml: reference: .*real: holds no PNG or JPEG files"):
        opened(tmp_path, reference=str(real))
    Image.new("RGB", (8, 8)).save(real / "0.png")
    with pytest.raises(
        UserError, match=r"study.yaml: reference: 1 images are too few for FID on 64 features; it wants"
    ):
        opened(tmp_path, reference=str(real))


def test_shards_and_idx_files_are_sets_of_real_images(digit_shards, tmp_path):
    opened(tmp_path, reference=str(digit_shards))
    opened(tmp_path, reference=str(write_idx(tmp_path / "idx", *clothes(12, 8, 8))))


def test_an_unreadable_file_is_one_line(tmp_path):
    for text, said in (
        ("[1, 2]", "expected keys name"),
        ("name: a\nname: b", "given twice"),
        (": :\n:", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            open_study(tmp_path / "bad.yaml")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--study .*none.yaml: No such file"):
        open_study(tmp_path / "none.yaml")


def test_a_given_checkpoint_of_another_size_is_refused(tmp_path):
    changes = checkpoint(tmp_path / "given")
    with pytest.raises(UserError, match=r"methods.control: model: num_layers is 2, the base's 4"):
        opened(tmp_path, **changes, set={"model.num_layers": 2})


def test_another_run_in_a_configurations_own_folder_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / config_from_dict(CONFIGS["cca"]).training.output_dir / layout.FOLDER
    partial = layout.partial_folder(root, 3)
    partial.mkdir(parents=True)
    layout.finalize(partial, root, 3, {"config": CONFIGS["base"]})
    opened(tmp_path)


def test_compute_is_counted_in_passes():
    pair = config_from_dict({"objective": {"name": "dpo"}, "training": {"train_iters": 60, "global_batch_size": 256}})
    control = config_from_dict({"objective": {"name": "next_token"}, "training": {"train_iters": 160}})
    assert passes_of_run(ConfiguredRun(pair, SamplingConfig())) == 60 * 256 * 8 == 122880
    assert passes_of_run(ConfiguredRun(control, SamplingConfig())) == 160 * 256 * 3 == 122880
    assert passes_of_run(ConfiguredRun(None, SamplingConfig())) == 0


def test_a_grid_changes_its_last_key_fastest():
    assert grid({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert grid({}) == [{}]


STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
FILES = sorted(STUDIES.glob("*.yaml"))


def test_prompts_may_lie_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text('{"prompt": "the digit one", "label": 1}\n')
    assert opened(tmp_path, prompts="own.jsonl").settings.prompts == str(tmp_path / "own.jsonl")
    monkeypatch.chdir(tmp_path)
    assert opened(tmp_path, prompts="own.jsonl").settings.prompts == "own.jsonl"


def test_what_studies_name_is_installed_with_them():
    """A package of the project has what setup.py lists."""
    listed = re.search(r"for name in (\(.*?\))", (STUDIES.parents[1] / "setup.py").read_text()).group(1)
    installed = {path for pattern in ast.literal_eval(listed) for path in STUDIES.parent.glob(pattern)}
    for file in FILES:
        study = yaml.safe_load(file.read_text())
        names = [study["base"]["config"], *(method.get("config") for method in study["methods"].values())]
        names += [study["prompts"]] if study.get("prompts", DIGITS) != DIGITS else []
        for name in filter(None, names):
            assert (STUDIES / name).resolve() in installed, (file.name, name)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A folder to start in: the examples, and what the studies of Fashion-MNIST want beside them."""
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "examples").symlink_to(STUDIES.parent)
    fashion.written(folder)
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_study_can_run(file, surroundings, monkeypatch):
    monkeypatch.chdir(surroundings)
    study = open_study(file)
    check_study(study, 1)
    assert study.settings.name == file.stem
    assert len(study.settings.seeds) == 3
    assert f"`{file.name}`" in (STUDIES / "README.md").read_text(encoding="utf-8")
