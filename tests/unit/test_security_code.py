"""SECURITY.md's promises about the sources: none of them calls what runs code from files, a shell or the network."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for place in ("megatron_cca", "tools", "examples", "benchmarks") for path in ROOT.glob(f"{place}/**/*.py")
)
SOURCES += [ROOT / "examples/pretrain_cca_emu3.sh"]  # Python to Python
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "urllib", "requests", "http"}
FORBIDDEN_MODULES |= {"huggingface_hub", "ftplib", "telnetlib", "xmlrpc", "code", "codeop"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_CALLS |= {
    "socket.socket",
    "socket.create_connection",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "np.fromstring",
}
# What the programs start themselves: lists of arguments, never a shell.
PROGRAMS = {"subprocess.run", "subprocess.Popen", "subprocess.check_call", "subprocess.check_output", "subprocess.call"}
# The environment that launchers and tests set; a secret would be another variable.
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"}
VARIABLES |= {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHELASTIC_RESTART_COUNT"}
VARIABLES |= {"GROUP_WORLD_SIZE", "HOME"}

# (file, what it does): why it may.
ALLOWED = {
    ("megatron_cca/io/pickles.py", "pickle"): "the one reader of pickles, by lists of what they may call",
    (
        "megatron_cca/checkpoint/saver.py",
        "pickle",
    ): "between a rank and its forked child, through their memory",
    ("examples/cluster/agent.py", "os.environ of name"): "sets torchrun's own variables, which its head lists",
    (
        "megatron_cca/lab/scaling/program.py",
        "os.environ of PARENT",
    ): "a process number that the sweep hands to its jobs",
    (
        "megatron_cca/megatron_compat/checkpoints.py",
        "os.environ of _TE_MAY_UNPICKLE",
    ): "lets Transformer Engine read what was checked, and is put back",
    ("benchmarks/gpu_parts/channel.py", "os.environ of VARIABLE"): "the file with its task, which its parent wrote",
    ("benchmarks/gpu_parts/process.py", "os.environ of 'PYTHONPATH'"): "what it starts imports the same modules",
    ("megatron_cca/reporting.py", "os.environ of _PEER_WAIT"): "how long a rank waits, a number of seconds",
    ("megatron_cca/io/paths.py", "os.environ of name"): "where libraries keep their caches, of a list of names",
    ("megatron_cca/config/load.py", "yaml.load"): "a loader that extends yaml.SafeLoader",
    (
        "megatron_cca/lab/evaluation/classifiers.py",
        "exec_module",
    ): "FILE.py:FUNCTION is the user's own code, named as such",
}


def dotted(node):
    """ "torch.load" for what is written so, else the last name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call, name):
    """The value of a keyword argument as it is written; None where it is not given."""
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def breaches(tree):
    """What a source does that only :data:`ALLOWED` may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.partition(".")[0]
                for alias in node.names
                if alias.name.partition(".")[0] in FORBIDDEN_MODULES
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call):
            yield from called(node)
        elif isinstance(node, ast.Subscript) and dotted(node.value) == "os.environ":
            yield from unknown_variable(node.slice)


def called(call):
    name, last = dotted(call.func), dotted(call.func).rpartition(".")[2]
    if name in FORBIDDEN_CALLS or last in ("extractall", "unpack_archive", "exec_module"):
        yield name if name in FORBIDDEN_CALLS else last
    if name == "yaml.load" and keyword(call, "Loader") not in ("yaml.SafeLoader", "yaml.CSafeLoader"):
        yield name
    if name == "torch.load" and keyword(call, "weights_only") != "True":
        yield name
    if name in ("np.load", "numpy.load", "np.lib.format.read_array") and keyword(call, "allow_pickle") != "False":
        yield name
    if keyword(call, "shell") not in (None, "False") or keyword(call, "trust_remote_code") not in (None, "False"):
        yield f"{name} with a shell or remote code"
    if name in PROGRAMS and call.args and isinstance(call.args[0], ast.JoinedStr | ast.Constant | ast.BinOp):
        yield f"{name} of a string"
    if last == "from_pretrained" and "CLIP" in name and keyword(call, "local_files_only") != "True":
        yield f"{name} that may fetch"
    if name in ("os.environ.get", "os.environ.setdefault", "os.getenv"):
        yield from unknown_variable(call.args[0])


def unknown_variable(name):
    if not isinstance(name, ast.Constant) or name.value not in VARIABLES:
        yield f"os.environ of {ast.unparse(name)}"


def test_no_source_does_what_is_not_safe():
    names = {str(path.relative_to(ROOT)): path for path in SOURCES}
    found = [
        f"{name}: {what}"
        for name, path in names.items()
        for what in breaches(ast.parse(path.read_text()))
        if (name, what) not in ALLOWED
    ]
    assert not found, "\n".join(found)
    assert len(names) > 200


def test_every_exception_is_one():
    for name, what in ALLOWED:
        assert what in breaches(ast.parse((ROOT / name).read_text())), (
            f"{name} does not do {what}; forget the exception"
        )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "os.system(name)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(f'ls {name}', shell=True)",
        "subprocess.run('ls ' + name)",
        "archive.extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "os.environ['WANDB_API_KEY']",
        "os.environ.get('HF_TOKEN')",
        "os.environ.get(name)",
    ],
)
def test_what_is_not_safe_is_found(source):
    assert list(breaches(ast.parse(source)))
