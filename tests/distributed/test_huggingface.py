"""Emu3 trained and back in transformers, and the tool that converts: the oracle is transformers itself."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from megatron_cca.errors import UserError
from tests.distributed.launch import LIMIT, ROOT, end_job, ended, run_tool, run_workers, start_job, start_tool, torchrun
from tests.distributed.test_layout_parity import TP2
from tests.references.huggingface import assert_same_bits, edit_tensors, load_tensors, save_emu3
from tests.selection import mostly_full

TOOL = ROOT / "tools" / "convert_checkpoint.py"
PROMPTS = torch.randint(0, 456, (3, 20), generator=torch.Generator().manual_seed(0))
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=["original repository", "transformers"])
def imported(request, tmp_path_factory):
    """A Hugging Face folder and its import."""
    folder = tmp_path_factory.mktemp("imported")
    hf = save_emu3(folder / "hf", request.param)
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return hf, folder / "megatron"


def in_plain_transformers(folder, tokens=PROMPTS, new_tokens=NEW_TOKENS):
    """Logits of the prompts, and their greedy continuation, by nothing but transformers."""
    from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration

    composite = "text_config" in json.loads((folder / "config.json").read_text())
    cls = Emu3ForConditionalGeneration if composite else Emu3ForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    continued = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    return logits, continued


def in_megatron(checkpoint, folder):
    """The same by Megatron's model, in one process."""
    settings = {"checkpoint": str(checkpoint), "tokens": PROMPTS.tolist(), "new_tokens": NEW_TOKENS}
    return run_workers(1, "logits_workers.continuations", {**settings, "layouts": {"alone": []}}, folder)["alone"]


@pytest.mark.parametrize("form", mostly_full(["original repository", "transformers"], ["original repository"]))
def test_a_fine_tuned_model_speaks_alike_in_plain_transformers(form, digit_shards, tmp_path):
    hf = save_emu3(tmp_path / "hf", form)
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    overrides = [
        f"data.path={digit_shards}",
        f"training.output_dir={tmp_path}/run",
        f"training.pretrained_checkpoint={tmp_path}/megatron",
        "training.global_batch_size=8",
        "training.micro_batch_size=4",
        "optimizer.lr=1e-3",
        *TP2,
    ]
    rows = run_workers(2, "checkpoint_workers.resume", {"overrides": overrides, "steps": 5, "save": True}, tmp_path)[
        "rows"
    ]
    assert rows[0]["worst"] == 0.0
    back = export_checkpoint(tmp_path / "run", tmp_path / "back", progress_bar=False)
    before, after = load_tensors(hf), load_tensors(back)
    assert before.keys() == after.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before if "proj" in name and "vq" not in name)
    logits, continued = in_plain_transformers(back)
    found = in_megatron(tmp_path / "run", tmp_path)
    assert (torch.tensor(found["logits"]) - logits).abs().max() <= 1e-5
    assert found["tokens"] == continued.tolist()
    assert continued.tolist() != in_plain_transformers(hf)[1].tolist()


def test_a_run_that_started_here_is_exported_too(digit_shards, tmp_path):
    overrides = [f"data.path={digit_shards}", f"training.output_dir={tmp_path}/run", "training.global_batch_size=32"]
    run_workers(1, "checkpoint_workers.resume", {"overrides": overrides, "steps": 1, "save": True}, tmp_path)
    back = export_checkpoint(tmp_path / "run", tmp_path / "back", progress_bar=False)
    logits, continued = in_plain_transformers(back)
    found = in_megatron(tmp_path / "run", tmp_path)
    assert (torch.tensor(found["logits"]) - logits).abs().max() <= 1e-5
    assert found["tokens"] == continued.tolist()


# The tool.


def convert(*arguments, cwd):
    return run_tool(TOOL, *arguments, cwd=cwd)


def test_the_tool_imports_verifies_and_exports(tmp_path):
    hf = save_emu3(tmp_path / "hf", "transformers", dtype=torch.bfloat16)
    done = convert("import", "--hf", hf, "--output", "megatron", cwd=tmp_path)
    expected = "wrote megatron/iter_0000000; use it as training.pretrained_checkpoint=megatron\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    done = convert("export", "--checkpoint", "megatron", "--output", "back", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote back\n", "")
    assert_same_bits(load_tensors(tmp_path / "back"), load_tensors(hf))
    done = convert("verify", "--hf", "back", "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    count = len(load_tensors(hf))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == f"tensors: {count} of {count} identical bit for bit"
    assert lines[1].startswith("logits:  2 x 64 x 456 in fp32, greatest difference ")
    assert lines[1].endswith("top-1 agreement 100.0%")
    assert lines[2] == "verdict: the same model"


def test_verify_finds_a_single_changed_number(imported, tmp_path):
    hf, checkpoint = imported
    name = "model.layers.1.self_attn.k_proj.weight"
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in hf.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    found = load_file(changed / "model.safetensors")
    on_disk = name if name in found else f"text_model.{name}"
    found[on_disk].view(-1)[3] *= 1.5
    save_file(found, changed / "model.safetensors", metadata={"format": "pt"})
    done = convert("verify", "--hf", changed, "--checkpoint", checkpoint, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert f"  {on_disk}: 1 of 2048 elements differ, the first in row " in done.stdout
    assert done.stdout.endswith("verdict: NOT the same model\n")


def test_verify_of_logits_that_are_all_zero_has_a_verdict(tmp_path):
    hf = save_emu3(tmp_path / "hf", "Emu3ForCausalLM")
    import_checkpoint(hf, tmp_path / "megatron", progress_bar=False)
    edit_tensors(hf, lambda found: found["lm_head.weight"].zero_())
    done = convert("verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "(inf of the largest logit)" in done.stdout
    assert done.stdout.endswith("verdict: NOT the same model\n")


@pytest.fixture
def verify(tmp_path):
    """The arguments of a verification that finds the same model on both sides."""
    hf, checkpoint = save_emu3(tmp_path / "hf", "Emu3ForCausalLM"), tmp_path / "megatron"
    import_checkpoint(hf, checkpoint, progress_bar=False)
    return ["verify", "--hf", hf, "--checkpoint", checkpoint, "--device", "cpu"]


@pytest.mark.parametrize(
    ("ranks", "status", "file", "line"),
    [
        (2, 0, "out", "verdict: the same model\n"),
        (
            3,
            2,
            "err",
            "parallel.tensor_model_parallel_size: 3 does not divide num_attention_heads 4; possible: 1, 2, 4\n",
        ),
    ],
)
def test_verify_takes_any_number_of_ranks_that_can_split_the_model(ranks, status, file, line, verify, tmp_path):
    jobs = start_job(ranks, TOOL, *verify, cwd=tmp_path)
    jobs[0].join(LIMIT)
    assert jobs[0].exitcode == status, (tmp_path / "rank0.err").read_text()
    end_job(jobs)
    assert (tmp_path / f"rank0.{file}").read_text().endswith(line)


@pytest.mark.full
def test_torchrun_verifies(verify, tmp_path):
    done = torchrun(2, TOOL, *verify, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("verdict: the same model\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--hf", "nowhere", "--output", "out"], "--hf: no folder at nowhere"),
        (["export", "--checkpoint", "nowhere", "--output", "out"], "--checkpoint: no checkpoint at nowhere"),
        (["verify", "--hf", ".", "--checkpoint", ".", "--rows", "0"], "--rows: must be 1 or more, found 0"),
        (["verify", "--hf", ".", "--checkpoint", "."], "--hf: . has no config.json"),
    ],
)
def test_the_tool_refuses_in_one_line(arguments, message, tmp_path):
    done = convert(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron_cca: error: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SLOW = f"""
import runpy, sys, time
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.megatron_checkpoint import MegatronCheckpoint

def slow(self, name, start, stop):
    if "layers.3" in name:
        print("midway", flush=True)
        time.sleep(60)
    return original(self, name, start, stop)

cls = HuggingFaceCheckpoint if sys.argv[1] == "import" else MegatronCheckpoint
original, cls.read = cls.read, slow
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


def stopped_midway(verb, start, output, sign, folder):
    """What the tool prints and how it ends when a signal reaches it in the middle."""
    options = ["--hf" if verb == "import" else "--checkpoint", start, "--output", output]
    (folder / "slow.py").write_text(SLOW)
    job = start_tool(folder / "slow.py", verb, *options, cwd=folder, log=folder / "log")
    said, deadline = folder / "log.out", time.monotonic() + LIMIT
    while not said.exists() or said.read_text() != "midway\n":
        assert job.is_alive() and time.monotonic() < deadline, (folder / "log.err").read_text()
        time.sleep(0.01)
    os.kill(job.pid, sign)
    (status,) = ended([job], 30)
    return status, (folder / "log.err").read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["import", "export"])
def test_an_interrupted_conversion_says_so_and_leaves_nothing(verb, sign, imported, tmp_path):
    (tmp_path / "job").mkdir()
    status, told = stopped_midway(verb, imported[verb == "export"], tmp_path / "output", sign, tmp_path / "job")
    assert (status, told) == (130, "megatron_cca: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_killed_conversion_does_not_look_whole_and_can_be_repeated(verb, imported, tmp_path):
    start, output = imported[verb == "export"], tmp_path / "output"
    assert stopped_midway(verb, start, output, signal.SIGKILL, tmp_path)[0] == -signal.SIGKILL
    assert any(path.stat().st_size > 10_000 for path in output.rglob("*") if path.is_file())
    assert not (output / "config.json").exists()
    with pytest.raises(UserError):
        layout.resolve(output, "checkpoint")
    if verb == "import":
        folder = import_checkpoint(start, output, progress_bar=False)
        assert sorted(path.name for path in output.iterdir()) == ["iter_0000000", layout.LATEST]
        assert layout.resolve(output, "checkpoint") == folder
    else:
        export_checkpoint(start, output, progress_bar=False)
        assert_same_bits(load_tensors(output), load_tensors(imported[0]))
        assert not (output / ".partial").exists()
