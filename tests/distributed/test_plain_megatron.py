"""Plain Megatron opens what we write: its own GPTModel, its own ``load``, Megatron-LM's own ``load_checkpoint``.

The oracle of the logits is transformers; of the optimizer's state, what the run's own next step would start from.
"""

import pytest
import torch

from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from tests.distributed.launch import run_workers
from tests.distributed.test_huggingface import in_plain_transformers
from tests.distributed.test_layout_parity import PP2, TP2
from tests.references.huggingface import SIZES, save_emu3

TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
MODEL = {
    "num_layers": SIZES["num_hidden_layers"],
    "hidden_size": SIZES["hidden_size"],
    "ffn_hidden_size": SIZES["intermediate_size"],
    "num_attention_heads": SIZES["num_attention_heads"],
    "num_query_groups": SIZES["num_key_value_heads"],
}
STEPS, SAMPLES = 2, 8


@pytest.fixture(scope="module")
def written(digit_shards, tmp_path_factory):
    """By name: an import, a run on a pipeline that was saved in the background, a LoRA run; and the run's second moment."""
    folder = tmp_path_factory.mktemp("written")
    hf = save_emu3(folder / "hf", "Emu3ForCausalLM")
    import_checkpoint(hf, folder / "import", progress_bar=False)
    overrides = [
        f"data.path={digit_shards}",
        f"training.pretrained_checkpoint={folder}/import",
        f"training.global_batch_size={SAMPLES}",
        "training.micro_batch_size=4",
        "training.train_iters=10",
        "optimizer.lr=1e-3",
        *PP2,
    ]
    for name, more in {"run": [], "lora": ["lora.dim=2"]}.items():
        own = [*overrides, f"training.output_dir={folder}/{name}", *more]
        run_workers(2, "checkpoint_workers.resume", {"overrides": own, "steps": STEPS, "save": True}, folder)
    export_checkpoint(folder / "run", folder / "back", progress_bar=False)
    return folder


def in_transformers(folder):
    return in_plain_transformers(folder, TOKENS, new_tokens=1)[0]


def worst(found, wanted):
    return (torch.tensor(found)[..., : SIZES["vocab_size"]] - wanted).abs().max().item()


@pytest.mark.parametrize(("ranks", "layout"), [(1, []), (2, TP2)])
def test_a_plain_gptmodel_has_the_logits_of_transformers(ranks, layout, written, tmp_path):
    folders = {"import": f"{written}/import/iter_0000000", "run": f"{written}/run/checkpoints/iter_0000002"}
    settings = {"overrides": layout, "folders": folders, "tokens": TOKENS.tolist(), "sizes": MODEL, "rotary_base": 1e6}
    found = run_workers(ranks, "megatron_workers.logits", settings, tmp_path)
    assert worst(found["import"], in_transformers(written / "hf")) <= 1e-5
    assert worst(found["run"], in_transformers(written / "back")) <= 1e-5
