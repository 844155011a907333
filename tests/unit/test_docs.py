"""The documentation. Oracle: the code that it speaks of."""

import ast
import importlib.util
import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from megatron_cca.config import Config
from megatron_cca.objectives import OBJECTIVES, Objective

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FRONT = [ROOT / "README.md", *PAGES]
SECTIONS = {field.name: field.default_factory for field in fields(Config)}
PROGRAMS = {path.name: path for path in (ROOT / "tools").glob("*.py")}
SUBCOMMANDS = {
    "convert_checkpoint.py": ("import", "export", "verify"),
    "plan.py": ("search", "dry-run", "calibrate"),
    "tokenize_images.py": ("run", "inspect"),
}


def hook(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, config=ROOT / "mkdocs.yml"):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config]
    return subprocess.run([*command, "--site-dir", folder], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    answer = build(folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "WARNING" not in answer.stderr
    return folder


@pytest.mark.full
def test_the_site_builds_without_a_warning(site):
    assert {page.stem for page in site.glob("*.html")} >= {page.stem for page in PAGES}


@pytest.mark.full
@pytest.mark.parametrize("link", ["missing.md", "data.md#missing"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, link):
    for name in ("docs", "mkdocs.yml"):
        subprocess.run(["cp", "-r", ROOT / name, tmp_path / name], check=True)
    with (tmp_path / "docs" / "studies.md").open("a") as page:
        page.write(f"\n[nowhere]({link})\n")
    assert build(tmp_path / "site", tmp_path / "mkdocs.yml").returncode != 0


def public_names():
    """Each function and class of the package that begins without "_", as its full dotted name."""
    for file in sorted((ROOT / "megatron_cca").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body if file.stem != "__main__" else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{module}.{node.name}"


@pytest.mark.full
def test_every_public_name_has_an_entry(site):
    entries = {
        name
        for page in (site / "api").rglob("*.html")
        for name in re.findall(r'id="(megatron_cca[\w.]*)"', page.read_text())
    }
    names = set(public_names())
    assert len(names) > 800
    assert not names - entries
    roles = [
        page.name for page in site.rglob("*.html") if re.search(r":(class|func|data|meth):<code>", page.read_text())
    ]
    assert not roles, "a docstring's mark is left in front of its name"


@pytest.mark.full
def test_formulas_need_no_script_and_no_network(site):
    for page in site.glob("*.html"):
        text = page.read_text()
        assert "arithmatex" not in text, f"{page.name}: a formula is left as TeX"
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', text), page.name
    assert (site / "concepts.html").read_text().count("<math") > 30


def test_the_configuration_reference_is_current():
    assert (DOCS / "configuration.md").read_text() == hook("configuration").page(), "run `make docs`, and commit it"


def test_the_page_of_programs_is_current():
    assert (DOCS / "programs.md").read_text() == hook("programs").page(), "run `make docs`, and commit it"


def test_the_configuration_reference_has_every_key():
    text = (DOCS / "configuration.md").read_text()
    sections = {f"## {name}": section() for name, section in SECTIONS.items()}
    sections |= {"## objective": Objective, **{f"### {name}": kind() for name, kind in OBJECTIVES.items()}}
    common = [field.name for field in fields(Objective)]
    for name, section in sections.items():
        table = re.split(r"\n##+ ", text.partition(f"\n{name}\n")[2])[0]
        # An objective's own keys come before those that it inherits.
        keys = [field.name for field in sorted(fields(section), key=lambda field: field.kw_only)]
        own = [key for key in keys if key not in common] if name.startswith("###") else keys
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == own, name


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "at_least"), [("concepts.md", 4), ("scaling.md", 3)])
def test_what_the_docs_say_in_python_is_true(page, at_least, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = code_blocks((DOCS / page).read_text(), "python")
    assert len(blocks) >= at_least and any("assert" in block for block in blocks)
    for block in blocks:
        exec(block, names)  # noqa: S102 - our own documentation


@cache
def printed():
    """Every text in the source that might be printed, with a wildcard for each value in it."""
    sources = [*ROOT.glob("megatron_cca/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "examples/pretrain_cca_emu3.sh"]
    texts = [(ROOT / "Makefile").read_text()]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def occurs(message):
    """Whether a message of the documentation, in which … stands for anything, is one that the code prints."""
    parts = [part for part in re.split("…", message) if part.strip(" :;,.")]
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    return any(pattern.search(text) for text in printed())


MESSAGES = [
    line for block in code_blocks((DOCS / "troubleshooting.md").read_text(), "text") for line in block.splitlines()
]


def test_quoted_messages_are_printed_by_the_code():
    missing = [message for message in MESSAGES if not occurs(message)]
    assert not missing, "\n".join(missing)


def test_a_message_that_nobody_prints_is_found():
    assert len(MESSAGES) > 30
    assert not occurs("no progress for … hours")


@cache
def options(program, subcommand):
    path = PROGRAMS.get(program, ROOT / "examples" / program)
    told = io.StringIO()
    arguments = [str(path), *([subcommand] if subcommand else []), "--help"]
    with mock.patch.object(sys, "argv", arguments), redirect_stdout(told), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    return set(re.findall(r"--[a-z][a-z-]+", told.getvalue()))


def commands(text):
    """Program, subcommand and options of every command line that starts one of our programs."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    in_tables = re.findall(r"`((?:torchrun|python|bash) [^`]+)`", text)
    for line in [*lines, *in_tables]:
        called = re.search(r"\b(?:tools|examples)/([a-z_]+\.(?:py|sh))\b(.*)", line)
        if called is None or not line.startswith((" ", "torchrun", "python", "bash")) or called[1] == "run.py":
            continue
        arguments = called[2].partition("#")[0]
        words = arguments.split()
        # plan.py searches where nothing else is named.
        default = "search" if called[1] == "plan.py" else None
        subcommand = words[0] if words and words[0] in SUBCOMMANDS.get(called[1], ()) else default
        yield called[1], subcommand, set(re.findall(r"(?<=\s)--[a-z][a-z-]+", arguments))


# Of other programs, that our pages speak of.
FOREIGN = {"--constraint", "--max-restarts", "--shutdown-timeout", "--signals-to-handle"}
MEGATRON_LM = {
    "--dist-ckpt-strictness",
    "--exit-on-missing-checkpoint",
    "--finetune",
    "--load",
    "--no-load-optim",
    "--no-load-rng",
    "--override-opt-param-scheduler",
    "--position-embedding-type",
    "--pretrained-checkpoint",
    "--tokenizer-type",
    "--use-checkpoint-args",
    "--use-distributed-optimizer",
    "--vocab-size",
}


def test_options_that_are_shown_exist():
    known = FOREIGN | MEGATRON_LM
    for program in [*PROGRAMS, "pretrain_cca_emu3.sh"]:
        for subcommand in SUBCOMMANDS.get(program, (None,)):
            known |= options(program, subcommand)
    for page in FRONT:
        for program, subcommand, given in commands(page.read_text()):
            assert given <= options(program, subcommand), f"{page.name}: {program} {subcommand or ''}"
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-z-]+)", page.read_text()):
            assert option in known, f"{page.name}: {option}"


# Endings of files, and the README's example of a typing error.
NO_KEYS = {"py", "md", "json", "jsonl", "yaml", "train_iter"}


def test_keys_that_are_named_exist():
    known = {section: {field.name for field in fields(default())} for section, default in SECTIONS.items()}
    missing = [
        f"{page.name}: {section}.{key}"
        for page in FRONT
        for section, key in re.findall(rf"\b({'|'.join(SECTIONS)})\.([a-z]\w+)(?=[`=: ])", page.read_text())
        if key not in NO_KEYS and key not in known[section]
    ]
    assert not missing, "\n".join(missing)


def test_files_that_are_named_exist():
    named = r"`((?:tools|tests|benchmarks|examples|docker|megatron_cca)/[\w./-]+)`"
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(named, page.read_text())
        if not (ROOT / name).exists()
    ]
    assert not missing, "\n".join(missing)
