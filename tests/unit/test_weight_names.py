"""Names and things that other programs leave in checkpoints: read where the meaning is certain, else one line."""

import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cca.checkpoint.huggingface import compare_tensors, export_checkpoint, import_checkpoint, open_both
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import WeightsDescription
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors
from megatron_cca.models.llamagen.image_tokenizer import read_vq
from megatron_cca.models.weight_files import is_recomputed, unwrapped
from tests.references import huggingface, llamagen, thin
from tests.references.llamagen_vq import random_vq

KEYS = thin.LLAMAGEN_KEYS
STATE = llamagen.random_weights(thin.LLAMAGEN)
EMA = {name: value + 1 for name, value in STATE.items()}
# A small vocabulary serves where only names count.
EMU3_SIZES = {"vocab_size": 300}
EMU3 = thin.emu3_weights(**EMU3_SIZES)


def saved(path, content, **options):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def sizes_for(path):
    return KEYS if path.is_file() else None


def imported(path, output, **options):
    return import_checkpoint(path, output, sizes=sizes_for(path), progress_bar=False, **options)


def refused(path, folder, **options):
    return huggingface.refused(path, folder, sizes=sizes_for(path), **options)


def weights_of(path, folder, **options):
    """What came in, by the family's own names: in through the import and out through the export."""
    imported(path, folder / "out", **options)
    source, target = open_both(path, folder / "out", WeightsDescription(KEYS if path.is_file() else {}, **options))
    assert compare_tensors(source, target, progress_bar=False).identical
    if path.is_file():
        return torch.load(export_checkpoint(folder / "out", folder / "a.pt", progress_bar=False))["model"]
    return load_file(export_checkpoint(folder / "out", folder / "back", progress_bar=False) / "model.safetensors")


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def inside(part, state):
    """As FSDP and activation checkpointing wrap each layer by itself."""
    return {
        name.replace("layers.0.", f"layers.0.{part}.").replace("layers.1.", f"layers.1.{part}."): value
        for name, value in state.items()
    }


WRAPPED = {
    "DDP": lambda state: prefixed("module.", state),
    "compile within DDP": lambda state: prefixed("module._orig_mod.", state),
    "FSDP": lambda state: prefixed("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module", state)),
    "checkpointing": lambda state: inside("_checkpoint_wrapped_module", state),
    "Lightning": lambda state: prefixed("model.", state),
    "a name of its own": lambda state: prefixed("generator.gpt.", state),
    "buffers": lambda state: state | {"freqs_cis": torch.zeros(17, 4, 2), "layers.0.attention.kv_cache.k_cache": EVERY},
}
EVERY = torch.zeros(2, 3)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrapped_names_are_read_in_files(wrapped, ending, tmp_path):
    assert_same(weights_of(saved(tmp_path / f"w.{ending}", wrapped(STATE)), tmp_path), STATE)


EMU3_WRAPPED = {name: wrap for name, wrap in WRAPPED.items() if name != "buffers"} | {
    "frequencies": lambda state: (
        state
        | {
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": 1e6 ** -(torch.arange(0, 8, 2).float() / 8)
            for layer in range(2)
        }
    )
}


@pytest.mark.parametrize("wrapped", EMU3_WRAPPED.values(), ids=EMU3_WRAPPED.keys())
def test_wrapped_names_are_read_in_folders(wrapped, tmp_path):
    hf = thin.save_emu3(tmp_path / "hf", wrapped(EMU3), **EMU3_SIZES)
    assert_same(weights_of(hf, tmp_path), EMU3)


@pytest.mark.parametrize(
    "content",
    [
        {"module": {"module": STATE}, "optimizer": {"state": {0: {"exp_avg": EVERY}}}, "step": 3},
        {"trainer": {"state_dict": prefixed("model.", STATE)}, "epoch": 1},
        {"ema": STATE, "decay": 0.999},
        STATE | {"step": 7, "note": "text"},
        {"model": STATE, "ema": {name: value.clone() for name, value in STATE.items()}},
    ],
    ids=["DeepSpeed", "nested", "an average alone", "numbers beside", "copies alike"],
)
def test_weights_are_found_where_they_lie(content, tmp_path):
    assert_same(weights_of(saved(tmp_path / "w.pt", content), tmp_path), STATE)


@pytest.mark.parametrize(
    ("content", "places", "section"),
    [
        ({"model": STATE, "ema": EMA}, "model, ema", "ema"),
        (
            {"state_dict": prefixed("net.", STATE) | prefixed("ema.", EMA)},
            "state_dict.ema, state_dict.net",
            "state_dict.ema",
        ),
        (STATE | prefixed("ema_model.", EMA), "., ema_model", "ema_model"),
    ],
    ids=["sections", "prefixes", "beside the rest"],
)
def test_which_of_several_copies_is_asked_for(content, places, section, tmp_path):
    path = saved(tmp_path / "w.pt", content)
    message = refused(path, tmp_path)
    assert f"holds 2 sets of weights that differ ({places}); say which to take: --section " in message
    assert f"no weights of this family lie under 'x'; there are: {places}" in refused(path, tmp_path, section="x")
    assert_same(weights_of(path, tmp_path, section=section), EMA)


def test_copies_in_a_folder_are_asked_for_too(tmp_path):
    average = {name: value + 1 for name, value in EMU3.items()}
    hf = thin.save_emu3(tmp_path / "hf", EMU3 | prefixed("ema.", average), **EMU3_SIZES)
    assert "holds 2 sets of weights that differ (., ema); say which to take: --section ." in refused(hf, tmp_path)
    assert_same(weights_of(hf, tmp_path, section="ema"), average)


def test_what_lies_beside_a_prefix_is_named(tmp_path):
    path = saved(tmp_path / "w.pt", prefixed("gpt.", STATE) | {"vq.conv.weight": EVERY})
    assert "tensor vq.conv.weight is none of the weights under 'gpt'; --section gpt takes" in refused(path, tmp_path)
    assert_same(weights_of(path, tmp_path, section="gpt"), STATE)


def test_two_names_that_wrappers_alone_tell_apart_are_refused(tmp_path):
    path = saved(tmp_path / "w.pt", STATE | prefixed("module.", STATE))
    assert "have one name, " in refused(path, tmp_path)
    with pytest.raises(UserError, match=r"tensors a.b and module.a.b have one name, a.b, without their wrappers"):
        unwrapped(["a.b", "module.a.b"])
    assert unwrapped(["a._orig_mod.b", "module"]) == {"a.b": "a._orig_mod.b", "module": "module"}


def test_learnt_tensors_count_as_such():
    names = ["freqs_cis", "model.rotary_emb.inv_freq", "layers.3.attention.kv_cache.v_cache", "causal_mask"]
    assert all(is_recomputed(name) for name in names)
    assert not any(is_recomputed(name) for name in [*STATE, *EMU3])


def test_frequencies_of_another_base_are_another_model(tmp_path):
    extra = {"model.rotary_emb.inv_freq": 1e4 ** -(torch.arange(0, 8, 2).float() / 8)}
    hf = thin.save_emu3(tmp_path / "hf", EMU3 | extra, **EMU3_SIZES)
    assert "inv_freq is of the rotary base 10000, config.json says 1e+06; mend" in refused(hf, tmp_path)


def test_an_image_tokenizers_names_are_unwrapped_too(tmp_path):
    state = random_vq()
    found = read_vq(saved(tmp_path / "vq.pt", {"model": prefixed("module._orig_mod.", state)}))
    assert (found.sizes.codebook_size, found.tensors.keys()) == (40, state.keys())


HALF = {name: value.half() for name, value in STATE.items()}
MIXED = STATE | {name: value.bfloat16() for name, value in STATE.items() if value.dim() == 2}
ADVICE = "megatron-cca convert import --dtype fp32 widens them, which loses nothing"


@pytest.mark.parametrize(
    ("state", "message"),
    [(HALF, "is in torch.float16; models here are in float32 or bfloat16"), (MIXED, "they must be alike")],
    ids=["half", "mixed"],
)
def test_other_widths_are_widened_when_asked_for(state, message, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    said = refused(path, tmp_path)
    assert message in said and ADVICE in said
    found = weights_of(path, tmp_path, dtype="fp32")
    assert_same(found, {name: value.float() for name, value in state.items()})
    assert all(torch.equal(found[name].to(value.dtype), value) for name, value in state.items())
    assert saved_config(tmp_path / "out" / "iter_0000000", "").training.precision == "fp32"


def test_folders_are_widened_too_and_what_would_be_rounded_is_refused(tmp_path):
    mixed = EMU3 | {"model.norm.weight": EMU3["model.norm.weight"].half()}
    hf = thin.save_emu3(tmp_path / "hf", mixed, **EMU3_SIZES)
    assert ADVICE in refused(hf, tmp_path)
    assert_same(weights_of(hf, tmp_path, dtype="fp32"), {name: value.float() for name, value in mixed.items()})
    path = saved(tmp_path / "w.pt", STATE | {"norm.weight": STATE["norm.weight"].double()})
    assert ADVICE not in refused(path, tmp_path / "no")
    message = refused(path, tmp_path / "no", dtype="fp32")
    assert "tensor norm.weight is torch.float64, which float32 cannot hold without rounding" in message


OLD = {"_use_new_zipfile_serialization": False}


def test_torchs_former_format_is_read(tmp_path):
    path = saved(tmp_path / "old.pt", {"model": STATE, "optimizer": {}, "steps": 3}, **OLD)
    assert not path.read_bytes().startswith(b"PK")
    assert_same(weights_of(path, tmp_path), STATE)


class _Evil:
    def __reduce__(self):
        return print, ("called",)


def in_former_format(content):
    file = io.BytesIO()
    torch.save(content, file, **OLD)
    return file.getvalue()


def test_damaged_and_hostile_files_of_the_former_format_are_refused(tmp_path, capsys):
    path, whole = tmp_path / "w.pt", in_former_format(STATE | {"few": torch.zeros(123)})
    path.write_bytes(in_former_format({"norm.weight": _Evil()}))
    said = refused(path, tmp_path)
    assert "it asks for print, which no plain data needs; torch.save its state dict alone" in said
    assert capsys.readouterr().out == ""
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:20], whole[:17]):
        path.write_bytes(content)
        assert "is truncated or not what torch.save writes" in refused(path, tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "is truncated or not what torch.save writes; it is a Git LFS pointer" in refused(path, tmp_path)
    # Two billion numbers in place of 123, which torch would take memory for before it looks for them.
    swollen = whole.replace(b"K" + bytes([123]) + b"N", b"J\xff\xff\xff\x7fN")
    assert swollen != whole
    for content in (swollen, io.BytesIO(swollen)):
        with pytest.raises(EOFError, match=r"its tensors claim 8\d{9} bytes, more than its own"):
            load_tensors(content)
    path.write_bytes(swollen)
    assert "its tensors claim 8" in refused(path, tmp_path)
    path.write_bytes(in_former_format({}) + pickle.dumps(_Evil()))
    assert "it holds no tensors" in refused(path, tmp_path)


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {"model": {}}
    content["model"] |= {str(number): content for number in range(200)}
    assert "0 is no tensor" in refused(saved(tmp_path / "w.pt", content), tmp_path)
