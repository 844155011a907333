"""Plain Megatron opens what we write: its own GPTModel, its own ``load``, Megatron-LM's own ``load_checkpoint``.

Oracles: transformers' logits, and the optimizer and the schedule of the run that saved. The command lines of
Megatron-LM are those of docs/checkpoints.md.
"""

import re

import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint, importing
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.megatron_compat import extra_state_keys
from tests.distributed.launch import ROOT, run_workers
from tests.distributed.test_huggingface import in_plain_transformers
from tests.distributed.test_layout_parity import PP2, TP2
from tests.references.huggingface import SIZES, assert_same_bits, load_tensors, save_emu3

TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
MODEL = {
    "num_layers": SIZES["num_hidden_layers"],
    "hidden_size": SIZES["hidden_size"],
    "ffn_hidden_size": SIZES["intermediate_size"],
    "num_attention_heads": SIZES["num_attention_heads"],
    "num_query_groups": SIZES["num_key_value_heads"],
}
STEPS, SAMPLES = 2, 8
SCHEDULE = [
    "training.train_iters=10",
    "optimizer.lr=1e-3",
    "optimizer.min_lr=1e-4",
    "optimizer.lr_warmup_iters=3",
    "optimizer.lr_decay_style=cosine",
    "optimizer.weight_decay=0.1",
]
# The values of this model and this schedule for the documented ones of Emu3, and what one process on a CPU has not.
SMALLER = {
    "--tensor-model-parallel-size": "1",
    "--micro-batch-size": "4",
    "--global-batch-size": str(SAMPLES),
    "--train-iters": "10",
    "--lr": "1e-3",
    "--min-lr": "1e-4",
    "--lr-warmup-iters": "3",
    "--vocab-size": str(SIZES["vocab_size"]),
}
LEFT_OUT = {"--bf16", "--sequence-parallel"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A Hugging Face folder and its import."""
    folder = tmp_path_factory.mktemp("imported")
    hf = save_emu3(folder / "hf", "Emu3ForCausalLM")
    import_checkpoint(hf, folder / "import", progress_bar=False)
    return hf, folder / "import"


@pytest.fixture(scope="module")
def run(imported, digit_shards, tmp_path_factory):
    """A run on a pipeline, saved in the background, and what its optimizer and its schedule were."""
    return trained(imported[1], digit_shards, tmp_path_factory.mktemp("run"))


def trained(start, shards, folder, *more, older=False):
    overrides = [
        f"data.path={shards}",
        f"training.output_dir={folder}/run",
        f"training.pretrained_checkpoint={start}",
        f"training.global_batch_size={SAMPLES}",
        "training.micro_batch_size=4",
        *SCHEDULE,
        *PP2,
        *more,
    ]
    settings = {"overrides": overrides, "steps": STEPS}
    found = run_workers(2, "megatron_workers.trained", {**settings, "older": older}, folder)
    return folder / "run" / layout.FOLDER, {**found, "settings": settings}


def in_transformers(folder):
    return in_plain_transformers(folder, TOKENS, new_tokens=1)[0]


def worst(found, wanted):
    return (torch.tensor(found)[..., : SIZES["vocab_size"]] - wanted).abs().max().item()


def in_plain_megatron(ranks, overrides, folders, answers):
    settings = {"overrides": overrides, "tokens": TOKENS.tolist(), "sizes": MODEL, "rotary_base": 1e6}
    folders = {name: str(layout.resolve(folder, name)) for name, folder in folders.items()}
    return run_workers(ranks, "megatron_workers.logits", {**settings, "folders": folders}, answers)


@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (2, TP2)])
def test_a_plain_gptmodel_has_the_logits_of_transformers(ranks, overrides, imported, run, tmp_path):
    hf, checkpoint = imported
    found = in_plain_megatron(ranks, overrides, {"import": checkpoint, "run": run[0]}, tmp_path)
    assert worst(found["import"], in_transformers(hf)) <= 1e-5
    export_checkpoint(run[0], tmp_path / "back", progress_bar=False)
    assert worst(found["run"], in_transformers(tmp_path / "back")) <= 1e-5


def test_transformer_engines_layers_find_all_that_they_ask_for(imported, run):
    """The oracle is a GPTModel of Transformer Engine 2.11's layers, whose sharded state named these keys."""
    for folder in (imported[1], run[0]):
        assert objects_in(folder) == {"common_state/shard_0_1", *asked_by_engine()}


def test_norms_of_queries_and_keys_are_found_too(digit_shards, tmp_path):
    """The oracle is the same."""
    folder, _ = trained("null", digit_shards, tmp_path, "model.qk_layernorm=true")
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm")
    assert objects_in(folder) == {"common_state/shard_0_1", *asked_by_engine(*norms)}
    assert set(extra_state_keys(4, qk_layernorm=True)) == asked_by_engine(*norms)


def asked_by_engine(*norms):
    projections = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    names = (*projections, *norms)
    asked = {f"decoder.layers.{name}._extra_state/shard_{layer}_4" for name in names for layer in range(4)}
    return asked | {"decoder.final_layernorm._extra_state/shard_0_1"}


def objects_in(folder):
    return StoredTensors(layout.resolve(folder, "checkpoint"), "checkpoint").objects


def documented(title, **folders):
    """Megatron-LM's command line below a line of the documentation, with these folders and this model's values."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    command = re.search(rf"{title}.*\n\n((?:    .*\n)+)", page)[1]
    values = {**SMALLER, **{f"--{name.replace('_', '-')}": str(path) for name, path in folders.items()}}
    words = command.replace("\\\n", " ").partition("pretrain_gpt.py")[2].split()
    words = [values.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return [word for word in words if word not in LEFT_OUT]


def test_megatron_lm_loads_by_the_documented_command_lines(imported, run, tmp_path):
    checkpoint, kept = run[0], {name: run[1][name] for name in ("second_moment", "learning_rate")}
    anew = documented("the weights alone", pretrained_checkpoint=imported[1], load=tmp_path / "new")
    on = documented("To go on where a run of ours stopped", load=checkpoint)
    settings = {"overrides": [], "tokens": TOKENS.tolist(), "cases": {"import": anew, "run": on}}
    found = run_workers(1, "megatron_workers.loaded_by_megatron_lm", settings, tmp_path)
    plain = in_plain_megatron(1, [], {"import": imported[1], "run": checkpoint}, tmp_path)
    assert found["import"].pop("logits") == plain["import"] and found["run"].pop("logits") == plain["run"]
    assert (found["import"]["iteration"], found["import"]["second_moment"]) == (0, 0.0)
    counted = {"iteration": STEPS, "step": STEPS, "samples": STEPS * SAMPLES, "scheduled": STEPS * SAMPLES}
    assert found["run"] == pytest.approx({**counted, **kept}, rel=1e-12)
    # On the layout that saved it Megatron-LM would also look for the state of random number generators.
    settings |= {"overrides": PP2, "cases": {"run": [*on, "--pipeline-model-parallel-size", "2"]}}
    again = run_workers(2, "megatron_workers.loaded_by_megatron_lm", settings, tmp_path)["run"]
    assert again == pytest.approx(found["run"], rel=1e-12)


def test_a_lora_run_is_refused_and_not_loaded_without_its_adapters(imported, digit_shards, tmp_path):
    checkpoint, _ = trained(imported[1], digit_shards, tmp_path, "lora.dim=2")
    found = in_plain_megatron(1, [], {"lora": checkpoint}, tmp_path)
    assert "Missing key in checkpoint state_dict: decoder.layers" in found["lora"]


def test_checkpoints_without_what_plain_megatron_asks_for_are_still_read(
    imported, run, digit_shards, tmp_path, monkeypatch
):
    """Those of older versions: an import to start from, and a run to go on with."""
    monkeypatch.setattr(importing, "_objects", lambda config: {})
    import_checkpoint(imported[0], tmp_path / "import", progress_bar=False)
    older, there = trained(tmp_path / "import", digit_shards, tmp_path, older=True)
    assert "Missing key" in in_plain_megatron(1, [], {"older": tmp_path / "import"}, tmp_path)["older"]
    resumed = [run_workers(2, "checkpoint_workers.resume", found["settings"], tmp_path) for found in (there, run[1])]
    assert resumed[0] == resumed[1] and resumed[0]["before"] == STEPS
    for checkpoint, name in ((older, "older"), (run[0], "newer")):
        export_checkpoint(checkpoint, tmp_path / name, progress_bar=False)
    assert_same_bits(load_tensors(tmp_path / "older"), load_tensors(tmp_path / "newer"))
