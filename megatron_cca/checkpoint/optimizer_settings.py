"""A checkpoint brings an optimizer's state along, not its settings: those are the configuration's."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

# Tell parameter groups apart whatever their settings; Megatron-Core compares the settings, too, and raises where the
# learning rate has changed.
_STRUCTURE = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")
# Which parameters a group has, and how many updates it has seen.
_STATE = ("params", "step")


def keep_present_settings(state: dict, param_groups: list[dict]) -> None:
    """Write the settings that an optimizer has into the state that it is to load.

    Megatron-Core and torch take betas, epsilon and the bounds of the learning rate from the parameter groups that were
    saved, whatever a run that continues asks for.

    Args:
        state: as Megatron's optimizers save it, also several of them; changed in place.
        param_groups: of the optimizer before it loads.
    """
    present = {_structure(group): group for group in param_groups}
    for saved in _saved_groups(state):
        # One that this run has not is Megatron's to refuse.
        settings = present.get(_structure(saved), {})
        saved.update({name: value for name, value in settings.items() if name not in _STATE})


def leave_out_classes(state: dict) -> None:
    """Take the classes that an offloaded optimizer names out of its groups; only plain data is read back.

    Args:
        state: as Megatron's optimizers save it, also several of them; changed in place.
    """
    for group in _saved_groups(state):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]


def let_parts_count(optimizer) -> None:
    """Let the parts of an offloaded optimizer count on after a load.

    Before each step Megatron-Core 0.19.2 writes the whole's groups over those of the parts. A count of steps among them
    would set back the part on the GPU, and its bias correction would stand still.

    Args:
        optimizer: Megatron's, chained or not; any other kind stays as it is.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(whole := getattr(one, "optimizer", None), HybridDeviceOptimizer):
            for group in whole.param_groups:
                group.pop("step", None)


def _structure(group: dict) -> tuple:
    return tuple(group.get(name) for name in _STRUCTURE)


def _saved_groups(state: dict) -> Iterator[dict]:
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict) and name != "state":
            yield from _saved_groups(value)
