"""The grids of codes that a model can take: any with few enough tokens, or a single one."""

from __future__ import annotations

from megatron_cca.models.architecture import Architecture, grid_side


def only_grid(architecture: Architecture) -> tuple[int, int] | None:
    """Return height and width of the only grid that a model has positions for. None where it takes any grid."""
    if architecture.position_embedding != "rope_2d":
        return None
    side = grid_side(architecture)
    return side, side


def grid_misfit(architecture: Architecture, frames: int, height: int, width: int) -> str | None:
    """Return why a model cannot take images of such a grid, and what would help. None if it can."""
    own = only_grid(architecture)
    if own is None or (frames, height, width) == (1, *own):
        return None
    found = f"{height} x {width} codes" if frames == 1 else f"{frames} frames of {height} x {width} codes"
    wanted = f"{found}, the model takes {own[0]} x {own[1]} alone"
    if frames == 1 and height == width:
        return f"{wanted}; model.max_position_embeddings {architecture.prefix_tokens + height * width} is for such"
    return wanted
