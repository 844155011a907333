"""Density, coverage, the Vendi score and CMMD, in float64 on features that are already extracted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Rows of a matrix of distances that are held at the same time.
_ROWS = 1000
# Bandwidth and scale of the authors' code (google-research/cmmd).
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0


def density_and_coverage(ours: Tensor, theirs: Tensor, neighborhood: int) -> tuple[float, float]:
    """Return density and coverage (arXiv 2002.09797) of samples among real images.

    A real image's ball reaches to its k-th nearest other real image. Density is the mean number of balls that hold a
    sample, over k. Coverage is the share of balls with a sample in them.

    Args:
        ours, theirs: features ``[N, D]`` of samples and ``[M, D]`` of real images.
        neighborhood: k, less than M.
    """
    ours, theirs = ours.double(), theirs.double()
    inside, covered = 0, 0
    for real in theirs.split(_ROWS):
        # The nearest is the image itself.
        radius = _distances(real, theirs).kthvalue(neighborhood + 1, dim=1, keepdim=True).values
        hits = _distances(real, ours) < radius
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return inside / (neighborhood * len(ours)), covered / len(theirs)


def vendi_score(ours: Tensor) -> float:
    """Return the Vendi score (arXiv 2210.02410) of features ``[N, D]`` with the cosine kernel.

    It is the effective number of different images: 1 if all are the same, N if all are orthogonal.
    """
    rows = normalize(ours.double(), dim=1)
    # Both products have the same eigenvalues besides 0.
    kernel = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(kernel / len(rows))
    values = values[values > 0]
    return float((-(values * values.log()).sum()).exp())


def cmmd(ours: Tensor, theirs: Tensor) -> float:
    """Return CMMD (arXiv 2401.09603): 1000 times the squared MMD of CLIP's embeddings with an RBF kernel.

    The kernel is exp(-d^2 / 200). As in the authors' code, the estimate has the diagonal.

    Args:
        ours, theirs: embeddings of length 1, ``[N, D]`` and ``[M, D]``.
    """
    ours, theirs = ours.double(), theirs.double()
    return _CMMD_SCALE * (_kernel(ours, ours) + _kernel(theirs, theirs) - 2 * _kernel(ours, theirs))


def _kernel(left: Tensor, right: Tensor) -> float:
    total = sum(
        float((-_distances(rows, right).square() / (2 * _CMMD_SIGMA**2)).exp().sum()) for rows in left.split(_ROWS)
    )
    return total / (len(left) * len(right))


def _distances(left: Tensor, right: Tensor) -> Tensor:
    # Differences, not a product: equal rows then have distance 0 exactly.
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
