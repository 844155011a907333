"""Load weights into built models: into Megatron's of any layout, or into either side's model one layer at a time.

The second way computes fp32 logits of models that do not fit in memory. The models of transformers and of Megatron are
built without weights. Each part gets its weights just before it runs, and loses them afterwards. Megatron's sharding
tells which block of a global tensor a weight is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.checkpoint.huggingface.importing import gathered_rows
from megatron_cca.checkpoint.huggingface.source import HuggingFaceCheckpoint
from megatron_cca.checkpoint.huggingface.target import MegatronCheckpoint
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.config import Config, ParallelConfig
from megatron_cca.errors import error_context
from megatron_cca.models.gpt import build_gpt, sharded_tensors
from megatron_cca.models.weight_map import MappedTensor

Fill = Callable[[str, torch.nn.Module], None]


@torch.no_grad()
def load_weights(source: HuggingFaceCheckpoint, chunks: Sequence[torch.nn.Module]) -> None:
    """Load weights into this rank's model chunks, one tensor at a time. Rows that pad the vocabulary become zeros.

    Args:
        source: a checkpoint of the same sizes as the chunks.
        chunks: chunks from :func:`megatron_cca.models.gpt.build_gpt`, in any precision.

    Raises:
        UserError: a file is damaged.
    """
    tensors = {(tensor.key, tensor.layer): tensor for tensor in source.format.weights.tensors(source.architecture)}
    for chunk in chunks:
        for shard in sharded_tensors(chunk.sharded_state_dict()):
            layer = shard.global_offset[0] if shard.prepend_axis_num else None
            _fill(shard, source, tensors[shard.key, layer])


def _fill(shard: ShardedTensor, source: HuggingFaceCheckpoint, tensor: MappedTensor) -> None:
    offset = shard.global_offset[shard.prepend_axis_num :]
    rows, *columns = shard.local_shape
    start = offset[0]
    stop = min(start + rows, tensor.num_rows)
    found = gathered_rows(source, tensor, start, stop) if start < stop else None
    shard.data.zero_()
    if found is not None:
        part = found[:, offset[1] : offset[1] + columns[0]] if columns else found
        shard.data.view(rows, *columns)[: stop - start] = part.to(shard.data.device)


@torch.no_grad()
def transformers_logits(source: HuggingFaceCheckpoint, tokens: Tensor, *, progress_bar: bool = True) -> Tensor:
    """Return float32 logits ``[B, S, V]`` of transformers' decoder on the CPU, for int64 ``tokens`` ``[B, S]``."""
    with error_context(f"{source.option}: {source.folder}"):
        model = source.format.transformers_model(source.config)

    def fill(prefix: str, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters():
            whole = f"{prefix}.{name}"
            parameter.copy_(source.read(whole, 0, parameter.size(0)))

    parts = _parts(model, "model.embed_tokens", "model.layers", "model.norm", "lm_head")
    with _streamed(model, parts, fill, "cpu", "transformers' logits", progress_bar):
        return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def megatron_logits(checkpoint: MegatronCheckpoint, tokens: Tensor, *, progress_bar: bool = True) -> Tensor:
    """Return float32 logits ``[B, S, V]`` of Megatron's GPTModel for int64 ``tokens`` ``[B, S]``.

    The model is tensor-parallel over all ranks. Process groups must have the layout of :func:`verification_config`.
    """
    config = verification_config(checkpoint)
    with torch.device("meta"):
        (model,) = build_gpt(checkpoint.architecture, config.model, config.parallel, config.training)

    def fill(prefix: str, module: torch.nn.Module) -> None:
        state = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(f"{prefix}.")}
        for shard in sharded_tensors(state):
            _fill_shard(shard, checkpoint.stored)

    parts = _parts(model, "embedding", "decoder.layers", "decoder.final_layernorm", "output_layer")
    tokens = tokens.to(platform.device())
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    shown = progress_bar and dist.get_rank() == 0
    with _streamed(model.eval(), parts, fill, platform.device(), "Megatron's logits", shown):
        logits = model(tokens, positions, None)
    return gather_from_tensor_model_parallel_region(logits)[..., : checkpoint.architecture.vocabulary.size].cpu()


def verification_config(checkpoint: MegatronCheckpoint) -> Config:
    """Return a configuration of the checkpoint's model in fp32, without dropout, tensor-parallel over all ranks.

    It uses Megatron's local layers. Transformer Engine multiplies float32 in TF32, which can hide a wrong weight.
    """
    saved, ranks = checkpoint.config, int(os.environ.get("WORLD_SIZE", "1"))
    return replace(
        saved,
        model=replace(saved.model, transformer_impl="local", hidden_dropout=0.0, attention_dropout=0.0),
        parallel=ParallelConfig(tensor_model_parallel_size=ranks),
        # The other ranks wait while rank 0 compares tensors.
        training=replace(saved.training, precision="fp32", recompute_granularity=None, distributed_timeout_minutes=60),
    )


def _fill_shard(shard: ShardedTensor, stored: StoredTensors) -> None:
    """Load this rank's part of a global tensor into a weight. Rows after the stored vocabulary padding become zeros."""
    sizes = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
    low, ends = shard.global_offset, stored.shape(shard.key)
    high = [max(a, min(a + size, end)) for a, size, end in zip(low, sizes, ends, strict=True)]
    shard.data.zero_()
    if all(a < b for a, b in zip(low, high, strict=True)):
        inside = tuple(slice(0, b - a) for a, b in zip(low, high, strict=True))
        shard.data.view(sizes)[inside] = stored.read_block(shard.key, low, high).to(shard.data.device)


def _parts(model: torch.nn.Module, *names: str) -> list[str]:
    parts = []
    for name in names:
        module = model.get_submodule(name)
        is_list = isinstance(module, torch.nn.ModuleList)
        parts += [f"{name}.{index}" for index in range(len(module))] if is_list else [name]
    return parts


@contextmanager
def _streamed(
    model: torch.nn.Module, parts: list[str], fill: Fill, device: torch.device | str, what: str, progress_bar: bool
) -> Iterator[None]:
    """Load each part just before it runs, and empty it just after, within the block. A bar counts the parts."""
    with tqdm(total=len(parts), desc=what, unit="part", disable=None if progress_bar else True) as bar:
        for name in parts:
            module = model.get_submodule(name)

            def fill_it(module: torch.nn.Module, *_unused, name: str = name) -> None:
                module.to_empty(device=device)
                fill(name, module)

            def empty_it(module: torch.nn.Module, *_unused) -> None:
                module.to("meta")
                bar.update()

            module.register_forward_pre_hook(fill_it)
            module.register_forward_hook(empty_it)
        yield
