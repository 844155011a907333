"""Master weights in a checkpoint: those that are none are refused, and every kind that is right is taken."""

import pytest
import torch

from megatron_cca.checkpoint.stored_tensors import Piece, StoredTensors, check_master_weights, save_pieces
from megatron_cca.errors import UserError

NAMES = {"decoder.final_layernorm.weight": (8,), "decoder.layers.mlp.linear_fc1.weight": (2, 6, 8)}


def masters():
    """A norm near 1, and weights of all sizes."""
    torch.manual_seed(0)
    norm, wide = (torch.randn(shape) for shape in NAMES.values())
    return dict(zip(NAMES, (1 + norm / 100, wide * 10 ** (3 * torch.randn(wide.shape).clamp(-3, 1))), strict=True))


def remainders(master):
    """What FusedAdam keeps of a master weight, as Megatron-Core saves it: the lower 16 bits as an integer, in fp32."""
    return (master.view(torch.int32) & 0xFFFF).to(torch.int16).float()


def as_fp16(master):
    """What FusedAdam keeps with master weights in fp16, which share one scale."""
    scale = master.abs().max() / (torch.finfo(torch.float16).max / 2)
    return (master / scale).half().float() * scale


def stored(folder, weights, states, prefix="optimizer.state.param."):
    tensors = {**weights, **{f"{prefix}{name}": tensor for name, tensor in states.items()}}
    save_pieces(
        folder,
        [
            Piece(name, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), tensor.dtype, tensor.clone)
            for name, tensor in tensors.items()
        ],
    )
    return StoredTensors(folder, "training.output_dir")


def mapped(change, tensors):
    return {name: change(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("keep", [torch.clone, as_fp16])
def test_master_weights_that_round_to_the_weights_are_taken(keep, tmp_path):
    found = masters()
    check_master_weights(stored(tmp_path, mapped(torch.Tensor.bfloat16, found), mapped(keep, found)))


def test_the_master_weights_of_fp32_are_the_weights(tmp_path):
    check_master_weights(stored(tmp_path, masters(), masters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_remainders_are_refused_and_the_weights_said_to_be_whole(dtype, tmp_path):
    found = masters()
    states = mapped(lambda master: remainders(master).to(dtype), found)
    with pytest.raises(UserError) as error:
        check_master_weights(stored(tmp_path, mapped(torch.Tensor.bfloat16, found), states))
    text = str(error.value)
    assert text.startswith(
        f"training.output_dir: {tmp_path} cannot be resumed: its master weights are not those of its"
    )
    assert f"training.pretrained_checkpoint={tmp_path}" in text and "reference.checkpoint" in text and "\n" not in text


def test_the_first_weights_of_a_run_in_fp32_are_refused(tmp_path):
    first = {name: torch.ones(shape) for name, shape in NAMES.items()}
    with pytest.raises(UserError, match="cannot be resumed"):
        check_master_weights(stored(tmp_path, masters(), first))


@pytest.mark.parametrize("is_right", [True, False])
def test_adapters_that_are_still_zero_say_nothing(is_right, tmp_path):
    found = {"decoder.a": torch.randn(2, 8), "decoder.b": torch.zeros(4)}
    reader = stored(tmp_path, mapped(torch.Tensor.bfloat16, found), found if is_right else mapped(remainders, found))
    if is_right:
        check_master_weights(reader)
    else:
        with pytest.raises(UserError, match="cannot be resumed"):
            check_master_weights(reader)


def test_a_checkpoint_without_master_weights_is_not_looked_at(tmp_path):
    """An import has none, and an optimizer that is not distributed keeps its own under another name."""
    check_master_weights(stored(tmp_path, masters(), mapped(remainders, masters()), "optimizer.state.fp32_param."))
