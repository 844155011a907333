"""Transformer Engine may unpickle extra states of layers while checked ones are loaded, and at no other time."""

import os

import pytest
import torch

from megatron_cca.checkpoint import distributed

NAME = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
STATE = {"model0": {"_extra_state": torch.zeros(3, dtype=torch.uint8)}}


class Layer(torch.nn.Module):
    """Refuses an extra state as Transformer Engine 2.16 and later do; ``error`` comes instead of a success."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.taken = error, None

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        if os.getenv(NAME, "0") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        if self.error is not None:
            raise self.error
        self.taken = state


@pytest.fixture(params=[None, "0", "1"])
def before(request, monkeypatch):
    """What the user has set, if anything."""
    if request.param is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, request.param)
    return request.param


def test_extra_states_are_taken_and_the_environment_is_put_back(before):
    layer = Layer()
    distributed._fill([layer], STATE)
    assert torch.equal(layer.taken, STATE["model0"]["_extra_state"])
    assert os.environ.get(NAME) == before


def test_the_environment_is_put_back_after_an_error(before):
    with pytest.raises(ValueError, match="damaged"):
        distributed._fill([Layer(ValueError("damaged"))], STATE)
    assert os.environ.get(NAME) == before


def test_nothing_else_may_be_unpickled(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    with pytest.raises(RuntimeError, match="Refusing"):
        Layer().load_state_dict(STATE["model0"])
