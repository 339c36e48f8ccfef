"""ALoRA (arXiv 2403.16187): importance of slots of a linear model, ½‖y − (W0 + Σ u_j)x‖², by forming every model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def importance(W0: Tensor, parts: Sequence[Tensor], x: Tensor, y: Tensor) -> list[float]:
    """−S(M∖j) + S(M_j), S the negative loss; parts: u_j = s·b_j·a_j."""

    def S(kept: Sequence[int]) -> float:
        W = W0 + sum((parts[k] for k in kept), 0 * W0)
        return -0.5 * float((y - x @ W.T).square().sum())

    every = range(len(parts))
    return [-S([k for k in every if k != j]) + S([j]) for j in every]
