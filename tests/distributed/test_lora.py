"""LoRA on every layout, resumed anywhere, sampled, exported: the oracle is one process, and weights merged by hand.

fp32; relative tolerance 1e-5 on every loss and 1e-4 on every gradient norm.
"""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import (
    compare_logits,
    compare_tensors,
    export_checkpoint,
    import_checkpoint,
    open_both,
)
from megatron_cca.checkpoint.huggingface.megatron_checkpoint import MegatronCheckpoint
from megatron_cca.errors import UserError
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import (
    CCA,
    CP2,
    FULL,
    LOSS_RTOL,
    NORM_RTOL,
    PP2,
    TP2,
    TP2_SP,
    VPP2,
    column,
)
from tests.references.huggingface import assert_same_bits, load_tensors, save_emu3
from tests.references.merged import merged_by_hand, opened, whole
from tests.references.resealed import reseal
from tests.selection import Computed, mostly_full

STEPS, BEFORE = 4, 2
LORA = ["lora.dim=4", "lora.alpha=8"]
BY_RANKS = {
    1: {"one process": [], "full recompute": FULL, "shared reference": ["reference.strategy=shared"]},
    2: {
        "TP 2": TP2,
        "TP 2 + SP": TP2_SP,
        "TP 2 + SP, full recompute": [*TP2_SP, *FULL],
        "PP 2": PP2,
        "PP 2, full recompute": [*PP2, *FULL],
        "PP 2, shared reference": [*PP2, "reference.strategy=shared"],
        "DP 2": [],
        "DP 2, plain optimizer": ["optimizer.use_distributed_optimizer=false"],
        "CP 2": CP2,
    },
    4: {"TP 2 + SP x PP 2 x VPP 2": [*TP2_SP, *VPP2]},
}


LAYOUTS = {name: (ranks, own) for ranks, layouts in BY_RANKS.items() for name, own in layouts.items()}
KEPT = {*BY_RANKS[1], *BY_RANKS[4], "TP 2 + SP, full recompute", "PP 2, shared reference", "DP 2", "CP 2"}


@pytest.fixture(scope="module")
def found(digit_shards, tmp_path_factory):
    common, folder = [*CCA, *LORA, f"data.path={digit_shards}"], tmp_path_factory.mktemp("found")

    def train_on(name):
        ranks, own = LAYOUTS[name]
        return run_workers(ranks, "traces", {"common": common, "layouts": {name: own}, "steps": STEPS}, folder)

    return Computed(train_on)


def assert_same_trace(ours, theirs):
    assert len(ours) == len(theirs)
    torch.testing.assert_close(column(ours, "loss"), column(theirs, "loss"), rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=NORM_RTOL, atol=0)


@pytest.mark.parametrize("name", mostly_full(LAYOUTS, KEPT))
def test_every_layout_gives_the_same_trace(found, name):
    assert_same_trace(found[name], found["one process"])
    assert found[name][0]["worst"] == 0.0
    assert found[name][1]["worst"] > 0.0


def train(ranks, overrides, folder, data, steps, *extra, save=False):
    common = [*CCA, *LORA, f"data.path={data}", f"training.output_dir={folder}/run", *extra]
    settings = {"overrides": [*common, *overrides], "steps": steps, "save": save}
    return run_workers(ranks, "checkpoint_workers.resume", settings, folder)["rows"]


@pytest.fixture(scope="module")
def interrupted(digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    train(2, TP2_SP, folder, digit_shards, BEFORE, save=True)
    return folder


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, []), (2, []), (2, PP2), (2, TP2)], ids=["one process", "DP 2", "PP 2", "TP 2"]
)
def test_resumed_on_any_layout_equals_uninterrupted(ranks, overrides, found, interrupted, digit_shards):
    rows = train(ranks, overrides, interrupted, digit_shards, STEPS - BEFORE)
    assert_same_trace(rows, found["one process"][BEFORE:])


def test_a_new_run_starts_from_what_was_trained(interrupted, digit_shards, tmp_path):
    common = [*CCA, f"data.path={digit_shards}", f"training.pretrained_checkpoint={interrupted}/run"]
    settings = {"common": common, "layouts": {"all weights": [], "new adapters": LORA}, "steps": 2}
    for name, rows in run_workers(1, "traces", settings, tmp_path).items():
        assert rows[0]["worst"] == 0.0 < rows[1]["worst"], name


def test_it_is_sampled_alike_under_tensor_parallelism(interrupted, tmp_path):
    settings = {"checkpoint": str(interrupted / "run"), "options": {"guidance_scale": 0.5, "batch_size": 2}}
    alone = run_workers(1, "logits_workers.sampled", {**settings, "layouts": {"codes": []}}, tmp_path)
    assert run_workers(2, "logits_workers.sampled", {**settings, "layouts": {"codes": TP2}}, tmp_path) == alone


@pytest.fixture(scope="module", params=mostly_full(["fp32", "bf16"], ["bf16"]))
def trained(request, digit_shards, tmp_path_factory):
    """An import, the folder of a LoRA run from it on TP 2 + SP, and its overrides."""
    folder = tmp_path_factory.mktemp("trained")
    precision = f"training.precision={request.param}"
    dtype = torch.float32 if request.param == "fp32" else torch.bfloat16
    hf = save_emu3(folder / "hf", "Emu3ForCausalLM", dtype=dtype)
    import_checkpoint(hf, folder / "start", progress_bar=False)
    overrides = [
        *(f"data.path={digit_shards}", f"training.output_dir={folder}/run", precision),
        *(f"training.pretrained_checkpoint={folder}/start", *LORA, "optimizer.lr=1e-2", "optimizer.weight_decay=0.1"),
        *("training.global_batch_size=8", "training.micro_batch_size=4"),
    ]
    settings = {"overrides": [*overrides, *TP2_SP], "steps": BEFORE, "save": True}
    rows = run_workers(2, "checkpoint_workers.resume", settings, folder)["rows"]
    assert rows[0]["worst"] == 0.0
    return folder, precision


def test_training_leaves_the_frozen_weights_as_they_were(trained):
    folder, _ = trained
    before, after = opened(folder / "start"), opened(folder / "run")
    own = [name for name in after.names() if name.startswith(("decoder", "embedding", "output_layer"))]
    added = {name for name in own if ".adapter." in name}
    assert set(own) - added == set(before.names())
    assert_same_bits(*({name: whole(stored, name) for name in before.names()} for stored in (after, before)))
    assert len(added) == 8
    assert all(whole(after, name).abs().min(dim=0).values.max() > 0 for name in added)


def test_loading_merges_on_any_layout(trained, tmp_path):
    folder, precision = trained
    save_file(merged_by_hand(folder / "start", folder / "run", scale=2), tmp_path / "expected.safetensors")
    common = {"checkpoint": str(folder / "run"), "expected": str(tmp_path / "expected.safetensors")}
    for ranks, layouts in ((1, [[]]), (2, [TP2, PP2, VPP2])):
        settings = {**common, "layouts": [[*overrides, precision] for overrides in layouts]}
        run_workers(ranks, "logits_workers.assert_loaded_weights", settings, tmp_path)


def test_an_export_has_the_merged_weights_and_verifies(trained, tmp_path):
    folder, precision = trained
    back = export_checkpoint(folder / "run", tmp_path / "back", progress_bar=False)
    settings = {"checkpoint": str(folder / "run"), "overrides": [*TP2, precision], "output": str(tmp_path / "merged")}
    (tmp_path / "merged").mkdir()
    run_workers(2, "logits_workers.resaved", settings, tmp_path / "answers")
    expected = load_tensors(export_checkpoint(tmp_path / "merged", tmp_path / "expected", progress_bar=False))
    assert_same_bits(load_tensors(back), expected)
    start = load_tensors(folder / "hf")
    assert {name for name in start if torch.equal(start[name], expected[name])} == {
        name for name in start if "proj" not in name
    }
    assert compare_tensors(*open_both(back, folder / "run"), progress_bar=False).identical
    assert compare_logits(*open_both(back, folder / "run"), progress_bar=False).agree
    assert not compare_tensors(*open_both(folder / "hf", folder / "run"), progress_bar=False).identical
    assert not compare_logits(*open_both(folder / "hf", folder / "run"), progress_bar=False).agree


def test_an_export_in_small_pieces_is_the_same(trained, tmp_path, monkeypatch):
    folder, _ = trained
    at_once = load_tensors(export_checkpoint(folder / "run", tmp_path / "at once", progress_bar=False))
    monkeypatch.setattr("megatron_cca.models.weight_files.row_ranges.__defaults__", (1000,))
    in_pieces = load_tensors(export_checkpoint(folder / "run", tmp_path / "in pieces", progress_bar=False))
    assert_same_bits(in_pieces, at_once)
    merged = MegatronCheckpoint(folder / "run", "--checkpoint").stored
    name = "decoder.layers.mlp.linear_fc2.weight"
    block = merged.read_block(name, (1, 3, 5), (2, 20, 16))
    assert_same_bits({name: block}, {name: merged.read(name, 1, 0, 20)[None, 3:, 5:16]})


def _of_a_lora_run(summary):
    """As if a run had written it: of an import nothing is believed but its sizes."""
    summary = {key: value for key, value in summary.items() if key != "imported_from"}
    return {**summary, "config": {**summary["config"], "lora": {"dim": 5}}}


def test_an_export_refuses_adapters_that_do_not_fit(trained, tmp_path):
    folder, _ = trained
    for source, message in (
        (
            "run",
            r"--checkpoint: tensor decoder.*adapter.linear_in.weight in .* has shape .*lora.dim 5 want \[\d+, 5, \d+\]",
        ),
        ("start", "--checkpoint: .* lacks tensor decoder.*adapter.linear_in.weight; choose another checkpoint"),
    ):
        checkpoint = shutil.copytree(layout.resolve(folder / source, "checkpoint"), tmp_path / source)
        reseal(checkpoint, _of_a_lora_run)
        with pytest.raises(UserError, match=message):
            export_checkpoint(checkpoint, tmp_path / "back", progress_bar=False)
