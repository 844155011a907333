"""What a run's attention costs where Transformer Engine has no fused kernel for it; no torch, no Megatron."""

from __future__ import annotations

from megatron_cca.config import Config
from megatron_cca.errors import UserError
from megatron_cca.models import resolve_architecture
from megatron_cca.models.attention import has_engine_attention, keeps_scores, unfused_because
from megatron_cca.training.reference_settings import settings_by_key
from megatron_cca.training.shapes import fixed_row_length, rows_per_microbatch

_GIB = 2**30


def check_attention(config: Config) -> None:
    """Refuse context parallelism where the core attention would be Transformer Engine's unfused one.

    Raises:
        UserError: names the key and what would be right.
    """
    if config.parallel.context_parallel_size == 1:
        return
    architecture = resolve_architecture(config.model)
    for key, one in settings_by_key(config).items():
        if keeps_scores(config.model, architecture, one.precision):
            raise UserError(
                f"model.transformer_impl: Transformer Engine has no fused attention for "
                f"{unfused_because(architecture.kv_channels, one.precision)}, and without it no context "
                f"parallelism ({key} is {one.precision}); use auto"
            )


def attention_lines(config: Config, *, has_engine: bool) -> list[str]:
    """Say whose core attention the models of a run have and why, with the bytes of scores that it keeps.

    Args:
        config: of the run.
        has_engine: whether Transformer Engine is installed and has a GPU.

    Returns:
        A line for each precision of the run; none where the layers are all local for want of a choice.
    """
    lines = []
    for one in settings_by_key(config).values():
        line = _line(config, one.precision) if has_engine else None
        if line is not None and line not in lines:
            lines.append(line)
    return lines


def _line(config: Config, precision: str) -> str:
    architecture, impl = resolve_architecture(config.model), config.model.transformer_impl
    if impl == "local":
        return "layers: local; attention: torch's (model.transformer_impl is local)"
    channels = architecture.kv_channels
    reason = unfused_because(channels, precision)
    if not has_engine_attention(impl, channels, precision):
        return f"layers: Transformer Engine's; attention: torch's, for want of a fused one there for {reason}"
    if reason is None:
        return "layers and attention: Transformer Engine's"
    scores = scores_bytes(config, precision)
    return (
        f"layers and attention: Transformer Engine's, which is not fused for {reason}: a microbatch's scores take "
        f"{scores / _GIB:.2f} GiB on each rank until its backward pass; model.transformer_impl=auto keeps none"
    )


def scores_bytes(config: Config, precision: str) -> float:
    """Bytes of the scores ``[rows, heads, S, S]`` of all layers that a rank has, of one microbatch of full length."""
    architecture, parallel = resolve_architecture(config.model), config.parallel
    length = fixed_row_length(config) or architecture.max_position_embeddings
    heads = architecture.num_attention_heads / parallel.tensor_model_parallel_size
    layers = architecture.num_layers / parallel.pipeline_model_parallel_size
    return (4 if precision == "fp32" else 2) * rows_per_microbatch(config) * heads * layers * length**2
