"""The strict configuration: what is refused, in which words."""

import dataclasses

import pytest

from megatron_cca.config.load import config_from_dict, config_to_dict, load_config
from megatron_cca.errors import UserError
from megatron_cca.objectives import OBJECTIVES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.train_iter=3", "training.train_iter: unknown key; did you mean training.train_iters?"),
        ("trainin.seed=1", "trainin: unknown key; did you mean training?"),
        ("training.train_iters=two", "training.train_iters: must be a whole number, found 'two'"),
        ("training.train_iters=1.5", "training.train_iters: must be a whole number, found 1.5"),
        ("training.train_iters=true", "training.train_iters: must be a whole number, found True"),
        ("training.train_iters=0", "training.train_iters: must be 1 or more, found 0"),
        ("training.output_dir=", "training.output_dir: is empty; give a path"),
        ("training=3", "--set training=3: expected section.key=value"),
        ("objective.beta=0", "objective.beta: must be greater than 0, found 0"),
        ("objective.beta=-0.1", "objective.beta: must be greater than 0, found -0.1"),
        ("objective.beta=.nan", "objective.beta: must be finite"),
        ("objective.negative_weight=0", "objective.negative_weight: must be greater than 0, found 0"),
        ("objective.bta=1", "objective.bta: cca has no such key; did you mean objective.beta?"),
        ("objective.tau=1", "objective.tau: cca has no such key; it has beta, negative_weight, normalization"),
        ("objective.name=ccaa", "objective.name: must be gft, next_token, cca, ddo, dpo, ipo, kto, nca or unlearning"),
        ("model.num_layers=x", "model.num_layers: must be a whole number, found 'x'"),
        ("parallel.tensor_model_parallel_size=-1", "parallel.tensor_model_parallel_size: must be 1 or more"),
        ("data.path={a: 1, $b: 1}", "data.path: '$b': $b is not replaced here"),
        ("data.path={a: 0}", "data.path.a: must be greater than 0, found 0"),
        ("data.path={a: 1, b: x}", "data.path.b: must be a number, found 'x'"),
        ("data.prefetch=0", "data.prefetch: must be 1 or more, found 0"),
        ("validation.fraction=1", "validation.fraction: must be less than 1, found 1"),
        ("validation.path={a: -1}", "validation.path.a: must be greater than 0, found -1"),
        ("data.prefetch=[1", "--set data.prefetch=[1: the value is not valid YAML"),
        ("data.path={a: 1, a: 2}", "--set data.path={a: 1, a: 2}: the value is not valid YAML"),
    ],
)
def test_refused_overrides(override, message):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: 3", "training: expected keys below this section, found 3"),
        ("objective: 3", "objective: expected keys below this section, found 3"),
        (
            "objective: {name: [cca]}",
            "objective.name: must be gft, next_token, cca, ddo, dpo, ipo, kto, nca or unlearning",
        ),
        ("- a", "expected sections model, parallel"),
        ("training: {output_dir: [3]}", "training.output_dir: must be text, found [3]"),
        ("data: {path: [3]}", "data.path: must be text, found [3]"),
        ("training: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("training: [", "not valid YAML"),
        ("training: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "key", "known"),
    [
        ("dpo", "negative_weight", "beta, normalization, sft_weight"),
        ("unlearning", "beta", "negative_weight, normalization, sft_weight"),
        ("next_token", "beta", "normalization"),
    ],
)
def test_a_key_of_another_objective_is_refused_by_name(name, key, known, tmp_path):
    file = tmp_path / "config.yaml"
    message = f"^objective.{key}: {name} has no such key; it has {known}$"
    file.write_text(f"objective: {{name: {name}, {key}: 50}}")
    with pytest.raises(UserError, match=message):
        load_config(file)
    for overrides in ([f"objective.name={name}", f"objective.{key}=50"], [f"objective.{key}=50"]):
        file.write_text(f"objective: {{name: {name}}}")
        with pytest.raises(UserError, match=message):
            load_config(file, overrides)
        with pytest.raises(UserError, match=message):
            load_config(None, [*overrides[::-1], f"objective.name={name}"])


def test_another_objective_leaves_the_keys_of_the_file_behind(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("objective: {name: cca, beta: 0.3, negative_weight: 50, normalization: image}")
    assert load_config(file, ["objective.name=dpo"]).objective == OBJECTIVES["dpo"](0.3, normalization="image")
    found = load_config(file, ["objective.name=unlearning", "objective.negative_weight=2"]).objective
    assert found == OBJECTIVES["unlearning"](2.0, normalization="image")
    assert load_config(file, ["objective.name=cca"]) == load_config(file)
    # The default one, too, is another one.
    file.write_text("objective: {negative_weight: 50}")
    assert load_config(file, ["objective.name=next_token"]).objective == OBJECTIVES["next_token"]()


def test_what_former_versions_saved_for_every_objective_is_read():
    former = {"beta": 0.5, "negative_weight": 50.0, "normalization": "vocabulary"}
    for name, kind in OBJECTIVES.items():
        own = {key: value for key, value in former.items() if key in kind.__dataclass_fields__}
        assert config_from_dict({"objective": {"name": name, **former}}).objective == kind(**own)
        with pytest.raises(UserError, match=r"objective\.tau: "):
            config_from_dict({"objective": {"name": name, **former, "tau": 1.0}})
    with pytest.raises(UserError, match=r"objective\.negative_weight: dpo has no such key"):
        config_from_dict({"objective": {"name": "dpo", **former}}, typed=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {lr: 1e-5}")
    assert load_config(file, ["optimizer.adam_eps=2E-6"]).optimizer.lr == 1e-5
    assert load_config(file, ["optimizer.adam_eps=2E-6"]).optimizer.adam_eps == 2e-6


def test_overrides_win_in_order_and_null_clears(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("training: {seed: 1, pretrained_checkpoint: base}\nlogging:\n")
    config = load_config(file, ["training.seed=2", "training.seed=3", "training.pretrained_checkpoint=null"])
    assert (config.training.seed, config.training.pretrained_checkpoint) == (3, None)


def test_round_trip_through_plain_data():
    config = load_config(None, ["model.num_layers=2", "objective.beta=0.5", "data.path={a: 0.5, b: 2}"])
    assert config.data.path == {"a": 0.5, "b": 2.0}
    assert config_from_dict(config_to_dict(config)) == config


def test_the_configuration_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().training.seed = 3
