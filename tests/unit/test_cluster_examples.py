"""``examples/cluster``: linted, and held against what Slurm, Kubernetes, Kubeflow and torchrun know."""

import copy
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_cca.config.load import load_config
from tests.references.pytorchjob_schema import KINDS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
# Of sbatch 22.05 (`sbatch --help`), those that later versions have as well.
SBATCH = """
    account array bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous core-spec
    cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
    exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hold ignore-pbs input job-name licenses mail-type mail-user
    mcs-label mem mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks
    ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe
    parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation signal
    sockets-per-node spread-job switches test-only thread-spec threads-per-core time time-min tmp uid use-min-nodes
    verbose wait wait-all-nodes wckey wrap
"""


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "pip install -e '.[dev]' brings it"
    done = subprocess.run([shellcheck, "--severity=style", *SCRIPTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


def test_sbatch_knows_every_directive():
    lines = [line for line in (CLUSTER / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    found = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)
    assert set(found) <= set(SBATCH.split())
    assert found["signal"].startswith("B:USR1@")
    assert "requeue" in found
    # sbatch stops reading directives at the first command.
    script = (CLUSTER / "slurm.sh").read_text()
    assert script.rindex("#SBATCH") < script.index("set -euo pipefail")


def manifest():
    return {one["kind"]: one for one in yaml.safe_load_all((CLUSTER / "pytorchjob.yaml").read_text())}


def check(resource):
    jsonschema.Draft202012Validator(KINDS[resource["kind"]]).validate(resource)


def test_kubernetes_knows_every_key():
    resources = manifest()
    assert set(resources) == set(KINDS)
    for resource in resources.values():
        check(resource)


MASTER = ("spec", "pytorchReplicaSpecs", "Master")
POD = (*MASTER, "template", "spec")


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "apiVersion", "kubeflow.org/v2"),
        (("spec",), "nprocPerNode", 8),
        (("spec", "runPolicy"), "backofLimit", 3),
        (MASTER, "restartPolicy", "Sometimes"),
        (MASTER, "replicas", "1"),
        (POD, "terminationGracePeriod", 600),
        (POD, "containers", []),
        ((*POD, "containers", 0), "enviroment", []),
        ((*POD, "containers", 0, "resources", "limits"), "memory", "1 TB"),
        ((*POD, "containers", 0, "env", 0), "value", 1),
        ((*POD, "volumes", 0), "persistentVolumeClaim", {"claim": "megatron-cca"}),
    ],
)
def test_the_schema_refuses_what_kubernetes_would_not_take_or_drop(place, key, value):
    job = copy.deepcopy(manifest()["PyTorchJob"])
    part = job
    for step in place:
        part = part[step]
    part[key] = value
    with pytest.raises(jsonschema.ValidationError):
        check(job)


def test_the_parts_of_the_manifest_fit_together():
    resources = manifest()
    spec = resources["PyTorchJob"]["spec"]
    name = resources["PyTorchJob"]["metadata"]["name"]
    master, worker = spec["pytorchReplicaSpecs"]["Master"], spec["pytorchReplicaSpecs"]["Worker"]
    assert master["template"] == worker["template"]
    assert (master["replicas"], master["restartPolicy"], worker["restartPolicy"]) == (1, "ExitCode", "ExitCode")
    pod = master["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert container["name"] == "pytorch"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    assert variables["PET_RDZV_ENDPOINT"] == f"{name}-master-0:{container['ports'][0]['containerPort']}"
    assert pod["terminationGracePeriodSeconds"] > int(variables["PET_SHUTDOWN_TIMEOUT"])
    for file in container["command"][1:]:
        assert (ROOT / file).is_file()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert (
        volumes["data"]["persistentVolumeClaim"]["claimName"] == resources["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert volumes["config"]["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    (file,) = resources["ConfigMap"]["data"]
    assert container["args"] == ["--config", f"{mounted}/{file}"]
    assert str(pod["securityContext"]["runAsUser"]) in re.findall(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())


def test_torchrun_knows_the_manifests_variables():
    from torch.distributed.run import get_args_parser

    known = {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    (container,) = manifest()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    named = {one["name"] for one in container["env"] if one["name"].startswith("PET_")}
    assert named <= known
    assert {name for name in agent().DEFAULTS if name.startswith("PET_")} <= known


def test_the_manifests_configuration_is_the_examples(tmp_path):
    (tmp_path / "config.yaml").write_text(manifest()["ConfigMap"]["data"]["config.yaml"])
    overrides = [
        "data.path=/data/shards/train",
        "training.output_dir=/data/runs/emu3_8b_cca",
        "training.pretrained_checkpoint=/data/checkpoints/emu3_8b",
    ]
    assert load_config(tmp_path / "config.yaml") == load_config(ROOT / "examples" / "emu3_8b_cca.yaml", overrides)


def agent():
    specification = importlib.util.spec_from_file_location("agent", CLUSTER / "agent.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("exit_code", "status"),
    [(2, 2), (1, 128), (130, 130), (138, 138), (143, 143), (-signal.SIGKILL, 137), (-signal.SIGTERM, 143)],
)
def test_the_agent_says_by_its_status_what_another_attempt_may_cure(exit_code, status):
    assert agent()._status(exit_code) == status
    # Kubeflow's ExitCode policy makes a pod anew from 128 on.
    assert (status >= 128) == (exit_code != 2)


def test_the_agent_refuses_in_one_line(tmp_path):
    command = [sys.executable, CLUSTER / "agent.py", "--nproc_per_node", "gpu", "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert "torchrun: Cuda is not available. (on machines without GPUs --nproc_per_node takes a number)" in last
    assert "Traceback" not in done.stderr
