"""One GPU: an imported Emu3 gives transformers' logits, whatever layers it is loaded into."""

from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from megatron_cca.checkpoint.huggingface import import_checkpoint
    from tests.references.huggingface import save_emu3

    folder = tmp_path_factory.mktemp("imported")
    hf = save_emu3(folder / "hf", "original repository")
    import_checkpoint(hf, folder / "megatron", progress_bar=False)
    return hf, folder / "megatron"


def test_verify_finds_the_same_model(imported):
    from megatron_cca.checkpoint.huggingface import compare_logits, open_both

    found = compare_logits(*open_both(*imported), progress_bar=False)
    assert found.agree
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize(("implementation", "tolerance"), [("local", 1e-4), ("transformer_engine", 1e-2)])
def test_an_import_loads_into_either_layers(implementation, tolerance, imported):
    """Transformer Engine's layers have extra states that no import holds; its float32 products are TF32's."""
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    from transformers import Emu3ForCausalLM

    from megatron_cca.checkpoint import distributed, layout
    from megatron_cca.checkpoint.summary import saved_config
    from megatron_cca.models import resolve_architecture
    from megatron_cca.models.gpt import build_gpt
    from megatron_cca.parallel.ranks import initialize_distributed

    hf, checkpoint = imported
    folder = layout.resolve(checkpoint, "checkpoint")
    config = saved_config(folder, "checkpoint")
    initialize_distributed(config)
    architecture = resolve_architecture(config.model)
    model = replace(config.model, transformer_impl=implementation, hidden_dropout=0.0, attention_dropout=0.0)
    chunks = build_gpt(architecture, model, config.parallel, config.training)
    distributed.load_weights(folder, chunks, "checkpoint")
    tokens = torch.randint(0, 456, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand_as(tokens)
    with torch.no_grad():
        theirs = Emu3ForCausalLM.from_pretrained(hf, dtype=torch.float32)(input_ids=tokens).logits
        ours = chunks[0].eval()(tokens.cuda(), positions.cuda(), None)[..., :456].cpu()
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
