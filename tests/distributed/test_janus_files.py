"""Janus-Pro's folders on ranks: the logits of their codes by Megatron and by transformers."""

import pytest

from megatron_cca.checkpoint.huggingface import import_checkpoint
from tests.distributed.launch import LIMIT, ROOT, end_job, run_tool, start_job
from tests.references.huggingface import edit_tensors, load_tensors
from tests.references.janus import CODES, save_janus

TOOL = ROOT / "tools" / "convert_checkpoint.py"


def imported(folder, form):
    hf = save_janus(folder / "hf", form, num_key_value_heads=2)
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return hf


@pytest.mark.parametrize("form", ["transformers", "original, pickled"])
def test_verify_compares_the_logits_of_codes(form, tmp_path):
    hf = imported(tmp_path, form)
    done = run_tool(TOOL, "verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors, logits, verdict = done.stdout.splitlines()
    assert tensors.endswith("identical bit for bit")
    assert logits.startswith(f"logits:  2 x 64 x {CODES} in fp32, greatest difference ")
    assert logits.endswith("top-1 agreement 100.0%")
    assert verdict == "verdict: the same model"


@pytest.mark.parametrize("name", ["generation_aligner.hidden_layers.0.bias", "generation_head.proj_out.weight"])
def test_verify_finds_a_change_in_what_draws_images(name, tmp_path):
    hf = imported(tmp_path, "transformers")
    edit_tensors(hf, lambda found: found[f"model.{name}"].view(-1)[3].add_(1))
    done = run_tool(TOOL, "verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu", cwd=tmp_path)
    count = len(load_tensors(hf))
    assert f"  model.{name}: 1 of " in done.stdout
    assert f"tensors: {count - 1} of {count} identical bit for bit" in done.stdout
    assert "top-1 agreement 100.0%" not in done.stdout
    assert done.stdout.endswith("verdict: NOT the same model\n")


def test_verify_splits_the_model_over_ranks(tmp_path):
    hf = imported(tmp_path, "original")
    arguments = ["verify", "--hf", hf, "--checkpoint", "megatron", "--device", "cpu"]
    jobs = start_job(2, TOOL, *arguments, cwd=tmp_path)
    jobs[0].join(LIMIT)
    assert jobs[0].exitcode == 0, (tmp_path / "rank0.err").read_text()
    end_job(jobs)
    assert (tmp_path / "rank0.out").read_text().endswith("verdict: the same model\n")
