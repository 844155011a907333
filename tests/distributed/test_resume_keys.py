"""Each key that may change when a run continues: its new value is seen in numbers, or it is refused by name."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cca.config import Config
from megatron_cca.config.load import load_config
from megatron_cca.errors import UserError
from megatron_cca.keys import OnResume, effects
from megatron_cca.training.checks import check_run
from megatron_cca.training.kernel_checks import check_devices
from tests.distributed.launch import run_workers
from tests.distributed.test_layout_parity import CCA, LOSS_RTOL, NORM_RTOL, PP2, TP2, column
from tests.references import token_shards
from tests.selection import Computed, mostly_full

BEFORE, AFTER, ITERS, LR = 4, 3, 16, 2e-3
SECTIONS = ("optimizer", "training", "validation", "faults", "logging")
KEYS = [f"{section}.{one.name}" for section in SECTIONS for one in dataclasses.fields(getattr(Config(), section))]
SCHEDULE = ["optimizer.lr_warmup_iters=3", "optimizer.lr_decay_style=cosine", f"training.train_iters={ITERS}"]
OTHERS = ["logging.tensorboard=false", "validation.path={data}", "validation.iters=1"]
LAYOUTS = {
    "one process": (1, []),
    "DP 2": (2, ["training.micro_batch_size=2"]),
    "TP 2": (2, TP2),
    "PP 2": (2, PP2),
}

# The same as changing an optimizer by hand after it was loaded.
BY_HAND = {
    "optimizer.adam_beta1": 0.1,
    "optimizer.adam_beta2": 0.5,
    "optimizer.adam_eps": 1e-2,
    "optimizer.weight_decay": 0.9,
    "optimizer.clip_grad": 0.01,
}


def cosine(step, *, iters=ITERS, largest=LR, least=0.0):
    return least + (largest - least) * (1 + math.cos(math.pi * (step - 3) / (iters - 3))) / 2


# The new value, and the learning rate of step k (from 0): by then k + 1 steps of the schedule have begun.
RATES = {
    "optimizer.lr": (5e-3, lambda step: cosine(step, largest=5e-3)),
    "optimizer.min_lr": (1e-3, lambda step: cosine(step, least=1e-3)),
    "optimizer.lr_decay_style": ("linear", lambda step: LR * (1 - (step - 3) / (ITERS - 3))),
    "optimizer.lr_warmup_iters": (8, lambda step: LR * step / 8),
    "training.train_iters": (30, lambda step: cosine(step, iters=30)),
}

OVERLAP = {"optimizer.overlap_grad_reduce": True}
FULL, SELECTIVE = ({"training.recompute_granularity": kind} for kind in ("full", "selective"))
# The same numbers as without it. The new value, what else it needs, and where it says anything.
SAME = {
    "optimizer.num_distributed_optimizer_instances": (2, {}, "DP 2"),
    "optimizer.overlap_grad_reduce": (True, {}, "DP 2"),
    "optimizer.overlap_param_gather": (True, OVERLAP, "DP 2"),
    "optimizer.ddp_bucket_size": (2000, OVERLAP, "DP 2"),
    "optimizer.average_in_collective": (True, {}, "DP 2"),
    "optimizer.pad_buckets_for_high_nccl_busbw": (True, {}, "DP 2"),
    "training.micro_batch_size": (1, {}, "one process"),
    "training.logps_chunk_size": (7, {}, "one process"),
    "training.recompute_granularity": ("full", {}, "one process"),
    "training.recompute_modules": (["core_attn", "mlp"], SELECTIVE, "one process"),
    "training.recompute_method": ("block", FULL, "one process"),
    "training.recompute_num_layers": (2, FULL, "one process"),
}

# How the run is set up.
SET_UP = {
    "training.async_save": (False, "in background", [True, False]),
    "training.distributed_timeout_minutes": (3, "minutes", [10, 3]),
    # Another folder is another run: nothing to continue.
    "training.output_dir": ("{folder}/elsewhere", "before", [BEFORE, 0]),
}


@dataclass(frozen=True)
class Whole:
    """What the whole of a run leaves behind, before a key is changed and after.

    Attributes:
        value: the new one.
        look: at what the run left.
        found: before and after; None where they differ somehow.
        common: what else is set in both.
        faults: steps whose gradients are NaN in both.
    """

    value: Any
    look: Callable[[dict], Any]
    found: list | None = None
    common: dict = field(default_factory=dict)
    faults: tuple = ()


def validated(found):
    return [row["step"] + 1 for row in found["rows"] if "validation_loss" in row]


def last_validation(found):
    return found["rows"][-1]["validation_loss"]


def ended(found):
    return found["ended"].split(":")[0]


def has_alarm(found):
    return "alarm" in found["events"]


AT_END, DRAWN, SKIP = {"validation.interval": 16}, {"logging.sample_interval": 16}, {"faults.non_finite": "skip"}
WHOLE = {
    "training.save_interval": Whole(5, lambda found: found["saved"], [[4, 16], [4, 5, 10, 15, 16]]),
    "training.keep_last": Whole(1, lambda found: found["saved"], [[4, 16], [16]]),
    "training.keep_every": Whole(2, lambda found: found["saved"], [[16], [4, 16]], {"training.keep_last": 1}),
    "validation.interval": Whole(4, validated, [[], [8, 12, 16]]),
    "validation.iters": Whole(3, last_validation, None, AT_END),
    "validation.path": Whole("{more}", last_validation, None, AT_END),
    "faults.hang_timeout_seconds": Whole(0.0, lambda found: found["watchdog"], [True, False]),
    "faults.non_finite": Whole("skip", ended, ["step 6", "finished"], {}, (6,)),
    "faults.max_skipped_steps": Whole(1, ended, ["finished", "step 7"], SKIP, (6, 7)),
    "faults.loss_spike": Whole(1e-9, has_alarm, [False, True], {"objective.name": "cca"}),
    "faults.positive_log_ratio_floor": Whole(1e3, has_alarm, [False, True]),
    "faults.on_alarm": Whole("stop", ended, ["finished", "step 13"], {"faults.positive_log_ratio_floor": 1e3}),
    "logging.tensorboard": Whole(True, lambda found: found["tensorboard"], [False, True]),
    "logging.wandb": Whole("images", lambda found: found["trackers"], [[], ["wandb"]]),
    "logging.mlflow": Whole("images", lambda found: found["trackers"], [[], ["mlflow"]]),
    "logging.progress_bar": Whole(False, lambda found: found["no bar"], [[None], [True]]),
    "logging.sample_interval": Whole(
        8, lambda found: [*found["pictures"]], [[], ["step_0000008.png", "step_0000016.png"]]
    ),
    "logging.sample_prompts": Whole("{prompts}", lambda found: found["pictures"], None, DRAWN),
    "logging.sample_grid": Whole([2, 4], lambda found: found["pictures"], None, DRAWN),
    "logging.text_tokenizer": Whole("{data}", lambda found: found["tokenizers"], None, DRAWN),
    "logging.image_tokenizer": Whole("{data}", lambda found: found["tokenizers"], None, DRAWN),
}

# They need what this machine lacks, and are refused with its key.
LACKING = {
    "optimizer.use_precision_aware_optimizer": (True, {}),
    "optimizer.main_grads_dtype": ("bf16", {}),
    "optimizer.main_params_dtype": ("fp16", {}),
    "optimizer.exp_avg_dtype": ("bf16", {}),
    "optimizer.exp_avg_sq_dtype": ("bf16", {}),
    "optimizer.optimizer_cpu_offload": (True, {}),
    # Of no use without what this machine has no GPU for.
    "optimizer.optimizer_offload_fraction": (0.5, {"optimizer.optimizer_cpu_offload": True}),
    "optimizer.overlap_cpu_optimizer_d2h_h2d": (True, {}),
}
REFUSED = {
    "optimizer.use_distributed_optimizer": False,
    "training.seed": 5,
    "training.global_batch_size": 16,
    "training.precision": "bf16",
    "training.fp8_format": "e4m3",
    "training.fp8_recipe": "delayed",
    "training.fp8_amax_history_len": 4,
    "training.fp8_amax_compute_algo": "most_recent",
    "training.pretrained_checkpoint": "{base}",
    "validation.fraction": 0.5,
    "validation.partner_path": "{more}",
    "validation.seed": 1,
}


def overrides(values, places):
    """``--set`` arguments, with what stands in braces filled in."""
    words = {key: value.format(**places) if isinstance(value, str) else value for key, value in values.items()}
    # Text is taken as typed: quotes would be part of it.
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in words.items()]


@pytest.fixture(scope="module")
def places(digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    more = token_shards.write(folder / "more", token_shards.random_samples(64))
    (folder / "prompts.txt").write_text("a handwritten seven\nthe digit one\n")
    named = {"data": digit_shards, "more": more, "prompts": folder / "prompts.txt", "folder": folder}
    return {name: str(place) for name, place in named.items()}


# How a run begins: its layout, and what is set besides.
KINDS = {
    "sharded": ("DP 2", []),
    "plain": ("one process", ["optimizer.use_distributed_optimizer=false"]),
    "bf16": ("DP 2", ["training.precision=bf16"]),
}


class Bases(Computed):
    """By kind: the folder of a run that has taken BEFORE steps, and the overrides that it was given."""

    def __init__(self, places):
        super().__init__(self._train)
        self.places = places

    def _train(self, kind):
        layout, extra = KINDS[kind]
        ranks, more = LAYOUTS[layout]
        folder = f"{self.places['folder']}/{kind}"
        common = [*CCA, "model.num_layers=2", *SCHEDULE, *(line.format(**self.places) for line in OTHERS), *extra]
        common += [f"data.path={self.places['data']}", f"training.output_dir={folder}"]
        settings = {"overrides": [*common, *more], "steps": BEFORE, "save": True}
        run_workers(ranks, "checkpoint_workers.resume", settings, Path(folder).parent)
        return {kind: (folder, common)}


@pytest.fixture(scope="module")
def bases(places):
    return Bases(places)


def continued(bases, kind, layout, cases):
    """By name: what a run that continues on a layout does, with its values changed or the optimizer changed by hand."""
    ranks, more = LAYOUTS[layout]
    _, common = bases[kind]
    settings = {
        "common": [*common, *more],
        "cases": {name: (overrides(values, bases.places), by_hand) for name, (values, by_hand) in cases.items()},
        "steps": AFTER,
    }
    return run_workers(ranks, "resume_workers.resumed_steps", settings, Path(bases.places["folder"]))


def same_rows(found, expected):
    for name, tolerance in (("loss", LOSS_RTOL), ("grad_norm", NORM_RTOL), ("learning_rate", 1e-12)):
        torch.testing.assert_close(column(found, name), column(expected, name), rtol=tolerance, atol=0)


@pytest.fixture(scope="module")
def optimized(bases):
    """By kind of optimizer, layout and keys of BY_HAND and RATES: unchanged, and each of the keys changed."""

    def compute(which):
        kind, layout, keys = which
        cases = {"as it was": ({}, {})}
        cases |= {key: ({key: BY_HAND[key]}, {}) for key in keys if key in BY_HAND}
        cases |= {f"{key} by hand": ({}, {key: BY_HAND[key]}) for key in keys if key in BY_HAND}
        cases |= {key: ({key: RATES[key][0]}, {}) for key in keys if key in RATES}
        return {which: continued(bases, kind, layout, cases)}

    return Computed(compute)


@pytest.fixture(scope="module")
def others(bases):
    """By layout: unchanged, and each key of SAME and SET_UP changed."""

    def compute(layout):
        cases = {"as it was": ({}, {})}
        cases |= {key: ({key: value, **more}, {}) for key, (value, more, where) in SAME.items() if where == layout}
        cases |= {key: ({key: value}, {}) for key, (value, *_) in SET_UP.items()}
        return {layout: continued(bases, "sharded", layout, cases)}

    return Computed(compute)


@pytest.fixture(scope="module")
def wholes(bases):
    """What the whole of each run of WHOLE leaves behind, before and after the change."""

    def compute(_):
        cases = {}
        for key, one in WHOLE.items():
            cases[f"{key} before"] = (overrides(one.common, bases.places), one.faults)
            cases[key] = (overrides({**one.common, key: one.value}, bases.places), one.faults)
        folder, common = bases["sharded"]
        settings = {"common": common, "cases": cases, "base": folder, "folder": f"{bases.places['folder']}/whole"}
        return {None: run_workers(1, "resume_workers.resumed_runs", settings, Path(bases.places["folder"]))}

    return Computed(compute)


def refusal(bases, values):
    """Why a run with these values is refused before anything is loaded."""
    _, common = bases["sharded"]
    config = load_config(None, [*common, *overrides(values, {**bases.places, "base": bases["plain"][0]})])
    with pytest.raises(UserError) as error:
        check_run(config, 1)
        check_devices(config)
    return str(error.value)


CHECKED = {*BY_HAND, *RATES, *SAME, *SET_UP, *WHOLE, *LACKING, *REFUSED, "optimizer.grad_reduce_in_fp32"}
# Megatron-Core would take the one from the checkpoint, and raise where the other has changed.
FEW = ("optimizer.adam_beta2", "optimizer.lr")
QUICK = {*FEW, *LACKING, *REFUSED}


@pytest.mark.parametrize("key", mostly_full(KEYS, lambda key: key in QUICK or key not in CHECKED))
def test_a_changed_key_takes_effect_or_is_refused(key, bases, request):
    """A key that nobody has declared fails here."""
    assert key in CHECKED, f"show here what a new value of {key} does on a resume, as config/schema.py declares it"
    assert (effects(Config())[key].resume is OnResume.REFUSED) == (key in REFUSED)
    if key in BY_HAND or key in RATES:
        keys = FEW if key in FEW else (*BY_HAND, *RATES)
        check_optimized(key, request.getfixturevalue("optimized")["sharded", "one process", keys])
    elif key in SAME:
        found = request.getfixturevalue("others")[SAME[key][2]]
        same_rows(found[key]["rows"], found["as it was"]["rows"])
    elif key in SET_UP:
        _, name, expected = SET_UP[key]
        found = request.getfixturevalue("others")["one process"]
        assert [found["as it was"][name], found[key][name]] == expected
    elif key in WHOLE:
        one, found = WHOLE[key], request.getfixturevalue("wholes")[None]
        before, after = one.look(found[f"{key} before"]), one.look(found[key])
        assert before != after
        assert one.found in (None, [before, after])
    elif key in LACKING:
        value, more = LACKING[key]
        assert refusal(bases, {key: value, **more}).startswith(tuple(f"{name}: " for name in (key, *more)))
    elif key in REFUSED:
        assert refusal(bases, {key: REFUSED[key]}).startswith(f"{key}: ")
    else:
        cases = {"as it was": ({}, {}), key: ({key: False}, {})}
        found = continued(bases, "bf16", "one process", cases)
        assert column(found[key]["rows"], "loss")[-1] != column(found["as it was"]["rows"], "loss")[-1]


def check_optimized(key, found):
    assert found[key]["before"] == BEFORE
    before, after = found["as it was"]["rows"], found[key]["rows"]
    # The first loss is of the weights that were saved.
    assert before[0]["loss"] == after[0]["loss"]
    assert before[-1]["loss"] != after[-1]["loss"]
    if key in BY_HAND:
        assert after == found[f"{key} by hand"]["rows"]
    else:
        expected = torch.tensor([RATES[key][1](step) for step in range(BEFORE, BEFORE + AFTER)], dtype=torch.float64)
        torch.testing.assert_close(column(after, "learning_rate"), expected, rtol=1e-12, atol=0)


ACROSS = [
    *(("sharded", layout, (*BY_HAND, *RATES)) for layout in ("DP 2", "TP 2", "PP 2")),
    *(("plain", layout, (*BY_HAND, *RATES)) for layout in ("one process", "PP 2")),
    ("bf16", "TP 2", FEW),
    ("sharded", "PP 2", FEW),
]


@pytest.mark.parametrize(("kind", "layout", "keys"), mostly_full(ACROSS, lambda case: case == ACROSS[-1]))
def test_optimizer_settings_take_effect_across_layouts(kind, layout, keys, optimized):
    found = optimized[kind, layout, keys]
    for key in keys:
        check_optimized(key, found)
        if kind != "bf16":
            same_rows(found[key]["rows"], optimized["sharded", "one process", keys][key]["rows"])
