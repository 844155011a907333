"""What plain Megatron makes of checkpoints of ours; each function returns plain data."""

from __future__ import annotations

import contextlib
import os
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cca.checkpoint import distributed, saver
from megatron_cca.config.load import load_config
from megatron_cca.platform import cpu
from megatron_cca.training.saving import begin_save
from tests.distributed.ranks import split_anew
from tests.distributed.workers import start, take_steps

# What a CPU lacks.
_ON_A_CPU = [
    "--transformer-impl=local",
    "--distributed-backend=gloo",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
]


def trained(settings):
    """Train for some steps and save; what Megatron-LM should find. ``older`` saves nothing for it."""
    run = start(settings["overrides"])
    take_steps(run, settings["steps"])
    with patch.object(saver, "state_to_save", _without_more if settings["older"] else saver.state_to_save):
        ended = [*begin_save(run), *run.saver.finish()]
    assert [saved.problem for saved in ended] == [None]
    return {"second_moment": _second_moment(run.optimizer), "learning_rate": run.optimizer.param_groups[0]["lr"]}


def _without_more(chunks, optimizer, config, iteration):
    return distributed.state_dict(chunks, optimizer, is_loading=False)


def logits(settings):
    """By checkpoint: a plain GPTModel's logits of ``settings["tokens"]``, or why it has none."""
    split_anew(load_config(None, settings["overrides"]))
    return {name: _logits(folder, settings) for name, folder in settings["folders"].items()}


def _logits(folder, settings):
    config = TransformerConfig(
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        layernorm_epsilon=1e-5,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **settings["sizes"],
    )
    model = _gpt(config, 512, settings["rotary_base"])
    try:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    model.load_state_dict(state["model"])
    return _forward(model, settings["tokens"])


def _gpt(config, vocab_size, rotary_base):
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocab_size,
        max_sequence_length=128,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()


@torch.no_grad()
def _forward(model, tokens):
    tokens = torch.tensor(tokens)
    length = tokens.size(1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    found = model(tokens, torch.arange(length).expand_as(tokens), future)
    return gather_from_tensor_model_parallel_region(found).tolist()


def loaded_by_megatron_lm(settings):
    """By case: what Megatron-LM's own ``load_checkpoint`` makes of a command line."""
    split_anew(load_config(None, settings["overrides"]))
    answers = {}
    for name, words in settings["cases"].items():
        with _megatron_lm([*words, *_ON_A_CPU]) as (args, checkpointing):
            answers[name] = _loaded(args, checkpointing, settings["tokens"])
    return answers


@contextlib.contextmanager
def _megatron_lm(words):
    """Megatron-LM started with a command line; forgotten at the end."""
    from megatron.training import checkpointing, global_vars
    from megatron.training.arguments import parse_and_validate_args

    environment = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    with (
        patch.object(sys, "argv", ["pretrain_gpt.py", *words]),
        patch.dict(os.environ, environment),
        patch.object(checkpointing, "torch", cpu._TorchOnCpu()),
    ):
        try:
            yield parse_and_validate_args(), checkpointing
        finally:
            global_vars.destroy_global_vars()
            unset_num_microbatches_calculator()


def _loaded(args, checkpointing, tokens):
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.training import get_megatron_optimizer_config, get_optimizer_param_scheduler

    config = core_transformer_config_from_args(args)
    config.use_cpu_initialization = True
    model = _gpt(config, args.padded_vocab_size, args.rotary_base)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=args.use_distributed_optimizer)
    chunks = [DistributedDataParallel(config, ddp_config, model)]
    options, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(options, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    scheduler = get_optimizer_param_scheduler(optimizer)
    iteration, _ = checkpointing.load_checkpoint(chunks, optimizer, scheduler)
    found = {
        "iteration": iteration,
        "samples": args.consumed_train_samples,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "step": optimizer.param_groups[0].get("step"),
        "scheduled": scheduler.num_steps,
        "second_moment": _second_moment(optimizer),
    }
    return found if args.pipeline_model_parallel_size > 1 else {**found, "logits": _forward(model.eval(), tokens)}


def _second_moment(optimizer):
    """The sum of Adam's second moment over all parameters of all ranks."""
    states = optimizer.chained_optimizers[0].optimizer.state.values()
    total = torch.tensor(sum(state["exp_avg_sq"].double().sum().item() for state in states), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()
