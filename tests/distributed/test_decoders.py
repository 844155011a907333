"""A decoder with heads of another size, norms of heads, biases: the oracle is transformers, on every layout."""

import pytest
import torch

from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from megatron_cca.config.load import load_config
from megatron_cca.models import resolve_architecture
from megatron_cca.models.architecture import padded_vocab_size
from megatron_cca.models.gpt import build_gpt
from megatron_cca.models.initialization import initialize_by_name
from megatron_cca.models.num_parameters import num_parameters
from megatron_cca.parallel.ranks import initialize_distributed
from tests.distributed.launch import run_workers
from tests.references import class_losses, decoders
from tests.references.huggingface import assert_same_bits, load_tensors
from tests.selection import mostly_full

TP2 = ["parallel.tensor_model_parallel_size=2"]
BY_RANKS = {
    1: {"one process": []},
    2: {
        "TP 2": TP2,
        "TP 2 + SP": [*TP2, "parallel.sequence_parallel=true"],
        "PP 2": ["parallel.pipeline_model_parallel_size=2"],
        "CP 2": ["parallel.context_parallel_size=2"],
    },
}
STEP = [
    *("objective.beta=0.1", "objective.negative_weight=30", "optimizer.clip_grad=0", "training.global_batch_size=4"),
    *("training.micro_batch_size=2", "optimizer.use_distributed_optimizer=false", "model.padded_vocab_size=464"),
]
LENGTH = 12
CASES = [(name, layout) for name in decoders.MODELS for layouts in BY_RANKS.values() for layout in layouts]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """By name: a folder with transformers' ``hf`` and ``other``, their imports, and ``answers.pt``."""
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in decoders.MODELS:
            folders[name] = folder = tmp_path_factory.mktemp("decoder")
            decoders.stand_in(monkeypatch, name)
            policy, reference = (
                decoders.save_decoder(folder / hf, name, seed) for seed, hf in enumerate(("hf", "other"))
            )
            for hf in ("hf", "other"):
                import_checkpoint(folder / hf, folder / f"{hf} in Megatron", progress_bar=False)
            torch.save(answers(name, policy, reference), folder / "answers.pt")
    return folders


def answers(name, policy, reference):
    """Logits of some rows, and loss and gradients of a CCA step, by transformers and autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 456, (4, LENGTH), generator=generator)
    with torch.no_grad():
        logits = policy(tokens).logits
    rows = torch.randint(0, 456, (8, LENGTH + 1), generator=generator)
    mask = torch.rand(8, LENGTH, generator=generator) < 0.6
    flags = torch.tensor([False, True, False, False])
    step = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "mask": mask, "flags": flags}

    def logps_of(model):
        def logps(places):
            chosen = model(rows[places, :-1]).logits.log_softmax(-1).gather(-1, rows[places, 1:, None])[..., 0]
            return (chosen * mask[places]).sum(1)

        return logps

    places = torch.arange(8).split(4)
    policy, reference = policy.double(), reference.double()
    loss = class_losses.loss("cca", logps_of(policy), logps_of(reference), (*places, flags), beta=0.1, weight=30.0)
    loss.backward()
    config = load_config(None, [*decoders.overrides_of(name), *STEP])
    architecture = resolve_architecture(config.model)
    gradients = {own: parameter.grad for own, parameter in policy.named_parameters()}
    padded = padded_vocab_size(architecture, config.model, 1)
    step |= {"loss": loss.item(), "gradients": decoders.in_megatron(name, architecture, gradients, padded)}
    return {"tokens": tokens, "logits": logits, **{f"step {own}": value for own, value in step.items()}}


@pytest.fixture(scope="module")
def found(imported, tmp_path_factory):
    """By case: how far the layout is from transformers."""
    results = {}
    for ranks, layouts in BY_RANKS.items():
        cases = {
            f"{name}, {layout}": {
                "checkpoint": str(folder / "hf in Megatron"),
                "reference": str(folder / "other in Megatron"),
                "answers": str(folder / "answers.pt"),
                "overrides": [*decoders.overrides_of(name), *STEP, *overrides],
            }
            for name, folder in imported.items()
            for layout, overrides in layouts.items()
        }
        results |= run_workers(ranks, "decoder_workers.differences", {"cases": cases}, tmp_path_factory.mktemp("found"))
    return results


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_and_gradients_are_transformers(found, name, layout):
    case = found[f"{name}, {layout}"]
    assert case["logits"] <= 1e-5
    assert case["cached"] <= 1e-5
    error, where = case["step"]
    assert error <= 1e-4, where


@pytest.mark.parametrize("name", decoders.MODELS)
def test_there_and_back_is_bit_for_bit(imported, name, tmp_path, monkeypatch):
    decoders.stand_in(monkeypatch, name)
    folder = imported[name]
    back = export_checkpoint(folder / "hf in Megatron", tmp_path / "back", progress_bar=False)
    assert_same_bits(load_tensors(back), load_tensors(folder / "hf"))


@pytest.mark.parametrize("name", mostly_full(["norms of heads", "biases of wide heads"], ["biases of wide heads"]))
def test_adapters_start_as_nothing_and_are_merged_on_export(imported, name, digit_shards, tmp_path, monkeypatch):
    overrides = [
        *(*decoders.overrides_of(name), *TP2, "lora.dim=4", "reference.strategy=shared", "optimizer.lr=1e-2"),
        *(f"data.path={digit_shards}", f"training.output_dir={tmp_path}/run", "training.global_batch_size=8"),
        *(f"training.pretrained_checkpoint={imported[name]}/hf in Megatron", "training.micro_batch_size=4"),
    ]
    settings = {"overrides": overrides, "steps": 2, "save": True}
    assert run_workers(2, "checkpoint_workers.resume", settings, tmp_path)["rows"][0]["worst"] == 0.0
    (tmp_path / "merged").mkdir()
    settings = {"checkpoint": str(tmp_path / "run"), "overrides": TP2, "output": str(tmp_path / "merged")}
    run_workers(2, "logits_workers.resaved", settings, tmp_path / "resaving")
    decoders.stand_in(monkeypatch, name)
    own, merged = (
        load_tensors(export_checkpoint(tmp_path / path, tmp_path / f"{path} back", progress_bar=False))
        for path in ("run", "merged")
    )
    assert_same_bits(own, merged)
    start = load_tensors(imported[name] / "hf")
    changed = {key for key in start if not torch.equal(start[key], own[key])}
    assert changed == {key for key in start if key.endswith("proj.weight")}


def test_a_new_model_begins_with_norms_of_one_and_without_biases():
    config = load_config(None, ["model.qk_layernorm=true", "model.add_qkv_bias=true"])
    initialize_distributed(config)
    (chunk,) = build_gpt(resolve_architecture(config.model), config.model, config.parallel, config.training)
    initialize_by_name(chunk, seed=1, std=0.02, num_layers=4, vocab_size=456)
    attention = chunk.decoder.layers[1].self_attention
    assert not attention.linear_qkv.bias.any()
    assert attention.linear_qkv.weight.std() > 0.01
    assert (attention.q_layernorm.weight == 1).all()
    assert (attention.k_layernorm.weight == 1).all()


@pytest.mark.parametrize("name", decoders.MODELS)
def test_every_weight_is_counted(name):
    architecture = resolve_architecture(load_config(None, decoders.overrides_of(name)).model)
    own = sum(parameter.numel() for parameter in decoders.random_decoder(name).parameters())
    assert num_parameters(architecture) == own
