"""Configurations, overrides and studies that may hold anything: see tests/references/fuzzing.py for what is held."""

from pathlib import Path

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cca.config.load import SECTIONS, config_from_dict, config_to_dict, load_config
from megatron_cca.lab.studies import read_study
from megatron_cca.lab.studies.study import open_study
from tests.references.fuzzing import changed, fuzzed, names, plain, spoilt

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.yaml"))]
STUDIES = [path.read_bytes() for path in sorted((EXAMPLES / "studies").glob("*.yaml"))]
DEFAULTS = config_to_dict(load_config())
KEYS = [f"{section}.{key}" for section, keys in DEFAULTS.items() for key in keys]
ALIASES = "\n".join(["a: &0 [x, x, x, x, x, x, x, x, x]", *(f"b{n}: &{n + 1} [{f'*{n}, ' * 9}]" for n in range(9))])


def as_yaml(tree):
    return yaml.safe_dump(tree).encode("utf-8", "replace")


@fuzzed("config file")
@given(spoilt(*CONFIGS) | plain.map(as_yaml))
@example(b"training: {seed: " + b"9" * 5000 + b"}")
@example(b"training: {train_iters: 2026-99-99}")
@example(b"data: {path: &a [*a]}")
@example(b"data: {path: &a {b: *a}}")
@example(b"data: &a {path: x, <<: *a}")
@example(b"? [1]\n: 2\n? [1]\n: 3\n")
@example(b"data: !!binary 'x'")
@example(b"data: !!binary '\xc3\xa9'")
@example(b"- " * 1500)
@example(b"[" * 5000)
@example(b"data: {path: {? !!binary YQ== : 1}}")
@example(b"2026-01-01: {a: 1}")
@example(b"? !!set {a}\n: 1\n")
@example(b'training: {output_dir: "\\ud800"}')
@example(ALIASES.encode())
@example(b'training: {output_dir: "a\\nb", x\\ny: 1}')
@example(b'"x\\ny": {a: 1}')
@example(b'training: {"x\\ny": 1}')
@example(b'training: {seed: "a\\nb"}')
@example(b"training: {seed: 0x" + b"f" * 9000 + b"}")
def test_no_config_file_gets_through(sandbox, content):
    path = sandbox.inside / "config.yaml"
    path.write_bytes(content)
    sandbox.check(lambda: load_config(path))


VALUES = st.sampled_from(
    ["{", "[1", "!!python/name:os.system", "*a", "2026-99-99", "9" * 5000, "&a [*a]", "1e999", ".nan"]
)
TEXTS = names | VALUES | st.builds(lambda tree: yaml.safe_dump(tree, default_flow_style=True), plain)


@fuzzed("config override")
@given(st.lists(st.tuples(st.sampled_from(KEYS) | names, TEXTS).map("=".join) | names, min_size=1, max_size=3))
@example(["training.seed=" + "9" * 5000])
@example(["data.path=&a [*a]"])
@example(["data.path=2026-99-99"])
@example(["data.path=" + "[" * 3000])
@example(["data=1", "data.path=x"])
@example(["a\nb"])
@example(["a\nb.c=1"])
@example(["data.path=[\n"])
def test_no_override_gets_through(sandbox, overrides):
    sandbox.check(lambda: load_config(None, overrides))


@fuzzed("config tree")
@given(changed(DEFAULTS) | st.dictionaries(st.sampled_from(sorted(SECTIONS)) | names, plain))
@example({"data": {"path": {"\ud800": 1.0}}})
@example({"training": {"seed": 10**5000}})
def test_no_tree_gets_through(sandbox, tree):
    sandbox.check(lambda: config_from_dict(tree))


def test_a_tree_of_any_depth_is_refused(sandbox):
    tree = {}
    for _ in range(3000):
        tree = {"data": tree}
    assert sandbox.check(lambda: config_from_dict(tree)) is None


@fuzzed("study file")
@given(spoilt(*STUDIES) | changed(yaml.safe_load(STUDIES[-1])).map(as_yaml))
@example(b"methods: {a: {tune: {x: &a [*a]}}}")
@example(b'name: "a\\n"')
def test_no_study_gets_through(sandbox, content):
    path = sandbox.inside / "study.yaml"
    path.write_bytes(content)
    sandbox.check(lambda: read_study(path))
    sandbox.check(lambda: open_study(path))
