"""Which devices compute products in FP8."""

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.models.layers import engine_is_available


def check_fp8_device(recipe: str) -> None:
    """Refuse FP8 on a device that does not support it.

    Args:
        recipe: ``tensorwise``, ``delayed`` or ``blockwise``.

    Raises:
        UserError: FP8 is not supported. Says what is missing.
    """
    if not engine_is_available():
        raise UserError(
            "fp8 needs a GPU of the Ada, Hopper or Blackwell generation and the package transformer-engine "
            "(pip install 'megatron-cca[gpu]'); use bf16 here"
        )
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available

    is_available = is_fp8_block_scaling_available if recipe == "blockwise" else is_fp8_available
    available, reason = is_available(return_reason=True)
    if not available:
        raise UserError(f"fp8 with recipe {recipe} is not for {platform.device_name()}: {reason} Use bf16 here")
