"""One rule for every path, wherever it is typed, and text that stays as it was typed."""

import argparse
import dataclasses
import importlib.machinery
import importlib.util
import os
import pwd
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from megatron_cca.config import Config
from megatron_cca.config.load import config_from_dict, config_to_dict, load_config
from megatron_cca.errors import UserError
from megatron_cca.io.paths import path_option, retyped, typed_path
from megatron_cca.lab import evaluation
from megatron_cca.lab.evaluation.classifiers import load_function
from megatron_cca.lab.evaluation.clip import check_scorer
from megatron_cca.lab.scaling import SweepSettings, read_sweep
from megatron_cca.lab.studies import StudySettings, read_study

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("examples/*/run.py"), *ROOT.glob("examples/*.sh")])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_home_folder_stands_at_the_beginning_only(home):
    me = pwd.getpwuid(os.geteuid())
    assert typed_path("~") == str(home)
    assert typed_path("~/runs/a") == f"{home}/runs/a"
    assert typed_path(f"~{me.pw_name}/a") == f"{me.pw_dir}/a"
    kept_as_typed = ["runs/~/a", "a~", "./~a", "/~", "digits", "a b", " a", "a: b", "#x", "ü\n"]
    for kept in [*kept_as_typed, "%HOME%", "a$", "$5", "$(a)"]:
        assert typed_path(kept) == kept
    assert "there is no user 'nobody at all'; write ./~nobody at all" in refused(typed_path, "~nobody at all/a")
    assert typed_path(retyped(path_option("./~a"))) == "./~a"


@pytest.mark.parametrize("value", ["", "relative"])
def test_without_a_home_folder_the_sign_for_it_is_refused(value, monkeypatch):
    monkeypatch.setenv("HOME", value)
    assert "no home folder is known; set HOME to it" in refused(typed_path, "~/runs")
    assert typed_path("runs") == "runs"


def test_a_variable_is_no_name_unless_something_is_called_so(home, monkeypatch):
    for text in ("$HOME/runs", "${HOME}/runs", "runs/$USER-1", "~/$A", "a$b"):
        assert "is not replaced here; write ~ for the home folder, or the path itself" in refused(typed_path, text)
    assert "$HOME is not replaced" in refused(typed_path, "$HOME/${RUN}")
    Path("a$b").mkdir()
    assert typed_path("a$b/new") == "a$b/new"
    assert "$c is not" not in refused(typed_path, "a$b/$c/new")
    odd = home / "$HOME"
    odd.mkdir()
    monkeypatch.setenv("HOME", str(odd / "not there"))
    assert typed_path("~/runs") == f"{odd}/not there/runs"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a\0b", "NUL"), ("x" * 256, "too long"), ("ü" * 128, "too long"), ("x/" * 2048, "too long")],
)
def test_what_no_file_can_be_called_is_refused(text, message):
    assert message in refused(typed_path, text)


# Texts that stand for something else than a path, names of methods among them.
NO_PATHS = {
    Config: {"model.name", "objective.name", "logging.wandb", "logging.mlflow"},
    StudySettings: {
        *("name", "title", "compare", "methods", "methods.label"),
        *("plots.file", "plots.title", "plots.methods", "plots.x", "plots.y"),
    },
    SweepSettings: {"name", "gpu", "planned.gpu"},
}


def parts(kind):
    """The types inside a type."""
    yield kind
    for part in get_args(kind)[: 1 if get_origin(kind) is Annotated else None]:
        yield from parts(part)


def texts(kind, prefix=""):
    """Keys that may hold text, with those of the sections below them."""
    hints = get_type_hints(kind, include_extras=True)
    for name, hint in ((one.name, hints[one.name]) for one in dataclasses.fields(kind)):
        for part in parts(hint):
            if dataclasses.is_dataclass(part):
                yield from texts(part, f"{prefix}{name}.")
            elif part is str and "KeysOf" not in repr(hint):
                yield f"{prefix}{name}", hint


@pytest.mark.parametrize("kind", NO_PATHS)
def test_every_key_that_holds_a_path_says_so(kind):
    found = dict(texts(kind))
    paths = {key for key, hint in found.items() if "_as_typed" in repr(hint)}
    assert found.keys() - paths == NO_PATHS[kind], "give the others the type PathText, or name them in NO_PATHS"
    assert len(paths) > 2


def test_paths_of_a_configuration_follow_the_rule(home, tmp_path):
    keys = [key for key, hint in texts(Config) if key not in NO_PATHS[Config]]
    assert "data.path" in keys and "training.output_dir" in keys and "logging.text_tokenizer" in keys
    tree = {}
    for section, _, name in (key.partition(".") for key in keys):
        tree.setdefault(section, {})[name] = "~/a b"
    for key in keys:
        section, _, name = key.partition(".")
        assert getattr(getattr(config_from_dict(tree, typed=True), section), name) == f"{home}/a b"
        assert getattr(getattr(load_config(None, [f"{key}=~/a"]), section), name) == f"{home}/a"
        assert refused(load_config, None, [f"{key}=$HOME/a"]).startswith(f"{key}: '$HOME/a': $HOME is not replaced")
    config = load_config(None, ["data.path={~/a: 1, b: 2}"])
    assert config.data.path == {f"{home}/a": 1, "b": 2}
    assert "data.path: two of its names" in refused(load_config, None, [f"data.path={{~/a: 1, {home}/a: 2}}"])
    assert "data.path: '$A'" in refused(load_config, None, ["data.path={$A: 1}"])


def test_what_a_run_wrote_down_is_read_as_it_is():
    tree = config_to_dict(load_config())
    tree["training"]["output_dir"], tree["data"]["path"] = "$HOME/runs", {"~/a": 1.0}
    assert config_to_dict(config_from_dict(tree)) == tree


def test_paths_of_studies_and_sweeps_follow_the_rule(home, tmp_path):
    (tmp_path / "study.yaml").write_text(
        "{name: 007, seeds: [1, 2], tuning_seed: 3, trials: 1, base: {checkpoint: ~/base}, prompts: ~/p, "
        "reference: ~/r, plots: [], methods: {1e5: {config: ~/c.yaml, label: yes, "
        "set: {training.output_dir: 1e3, objective.beta: 1e3}}}}"
    )
    study = read_study(tmp_path / "study.yaml")
    method = study.methods["1e5"]
    assert (study.name, study.base.checkpoint, method.config) == ("007", f"{home}/base", f"{home}/c.yaml")
    assert (study.prompts, study.reference, method.label) == (f"{home}/p", f"{home}/r", "yes")
    assert method.set == {"training.output_dir": "1e3", "objective.beta": 1000.0}
    (tmp_path / "sweep.yaml").write_text("{name: a, config: ~/c.yaml, calibration: $C/c.json}")
    assert "calibration: '$C/c.json': $C is not replaced" in refused(read_sweep, tmp_path / "sweep.yaml")
    (tmp_path / "sweep.yaml").write_text("{name: a, config: ~/c.yaml}")
    assert read_sweep(tmp_path / "sweep.yaml").config == f"{home}/c.yaml"


AS_TYPED = ["a: b", "#x", "007", "1e5", "yes", "[x]", "[1", "3", "!x", "'a'", '"a"', "a\\b", "grün", "@a", "%a", "`a"]
AS_TYPED += ["*a", "&a", "|", ">", " a ", "- a", "? a", "2026-01-01T00:00:00Z", "a=b", "a\nb", "{a", ".nan", "<<", "="]


@pytest.mark.parametrize("key", ["training.output_dir", "logging.text_tokenizer", "data.path", "model.name"])
def test_text_on_the_command_line_stays_as_typed(key):
    section, _, name = key.partition(".")
    for text in AS_TYPED:
        assert getattr(getattr(load_config(None, [f"{key}={text}"]), section), name) == text


def test_null_is_none_where_a_key_may_be_none():
    for text in ("null", ""):
        overrides = ["reference.checkpoint=a", f"reference.checkpoint={text}"]
        assert load_config(None, overrides).reference.checkpoint is None
    assert load_config(None, ["training.output_dir=null"]).training.output_dir == "null"
    assert "training.output_dir: is empty; give a path" in refused(load_config, None, ["training.output_dir="])
    assert "not valid UTF-8" in refused(load_config, None, ["training.output_dir=\udcfc"])


def test_unquoted_text_in_a_file_stays_as_typed(tmp_path):
    file = tmp_path / "config.yaml"
    for text in ("007", "1e5", "yes", "0x10", "2026-01-01T00:00:00Z", ".nan", "1_000", "12:30:00"):
        lines = [f"training: {{output_dir: {text}}}", f"logging: {{text_tokenizer: '{text}'}}"]
        file.write_text("\n".join([*lines, f"data: {{path: {{{text}: 1}}}}"]))
        config = load_config(file)
        assert (config.training.output_dir, config.logging.text_tokenizer) == (text, text)
        assert config.data.path == {text: 1}
    file.write_text("training: {output_dir: &a 7, seed: *a, pretrained_checkpoint: null}\nreference: {cache: ~}")
    config = load_config(file)
    assert (config.training.output_dir, config.training.seed) == ("7", 7)
    assert (config.training.pretrained_checkpoint, config.reference.cache) == (None, None)
    file.write_text("training: {output_dir: ~}")
    assert "training.output_dir: must be text, found null; an unquoted ~ is null" in refused(load_config, file)


# Options that take a text which is no path, or one that is a path in part and has a test below.
TEXT_OPTIONS = {"caption", "negative_prompt", "prompt_suffix", "classes", "set", "overrides", "layout", "caption_field"}
TEXT_OPTIONS |= {"image_field", "split", "clip_meta", "steps", "image_grid", "gpu", "vary", "precisions"}
TEXT_OPTIONS |= {"metrics", "point", "section"}
IN_PART = {"samples", "extractor", "classifier", "scorer"}


class Seen(Exception):
    pass


def options(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.nargs != 0 and not action.choices:
            yield action


def parser_of(program, monkeypatch):
    """The parser that a program parses its command line with."""

    def parse_args(parser, *_):
        raise Seen(parser)

    loader = importlib.machinery.SourceFileLoader(f"program_{program.stem}", str(program))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Seen) as seen:
        module.main(["-"])
    return seen.value.args[0]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.parent.name + "/" + program.name)
def test_every_option_that_holds_a_path_follows_the_rule(program, home, monkeypatch):
    paths = 0
    for option in options(parser_of(program, monkeypatch)):
        convert = option.type or str
        try:
            found = str(convert("~/x"))
        except (argparse.ArgumentTypeError, ValueError):
            continue
        if option.dest in TEXT_OPTIONS | IN_PART:
            continue
        assert found == f"{home}/x", f"{option.dest}: give it path_option or name_option, or name it in TEXT_OPTIONS"
        with pytest.raises(argparse.ArgumentTypeError, match=r"\$HOME is not replaced here"):
            convert("$HOME/x")
        paths += 1
    assert paths


def test_there_are_as_many_programs_as_ever():
    assert len(PROGRAMS) == 13


def test_texts_that_are_a_path_in_part_follow_the_rule(home):
    assert evaluation.named_sets(["a=~/x", "~/y.npz", "./~z"]) == {"a": f"{home}/x", "y": f"{home}/y.npz", "~z": "./~z"}
    assert "--samples: '$A': $A is not replaced" in refused(evaluation.named_sets, ["a=$A"])
    (home / "f.py").write_text("def good(images):\n    return 1\n")
    assert load_function("~/f.py:good", "--extractor")(None) == 1
    assert "--extractor: '$A/f.py': $A is not replaced" in refused(load_function, "$A/f.py:good", "--extractor")
    assert f"--scorer: {home}/clip has no config.json" in refused(check_scorer, "clip:~/clip")
    assert "--scorer: '$A': $A is not replaced" in refused(check_scorer, "clip:$A")
