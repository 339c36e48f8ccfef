"""SD-LoRA (arXiv 2501.13198) in float64, dense: directions, weights, what distillation drops, ranks that fall."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def direction(B: Tensor, A: Tensor, epsilon: float = 0.0, norm: str = "product") -> Tensor:
    """D = B·A / √(‖B·A‖² + ε²), or by ‖B‖·‖A‖."""
    length = (B @ A).norm() if norm == "product" else B.norm() * A.norm()
    return B @ A / (length**2 + epsilon**2).sqrt()


def effective(W0: Tensor, directions: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """W0 + Σ α_k·D_k."""
    return W0 + sum((a * D for a, D in zip(alpha, directions, strict=False)), torch.zeros_like(W0))


def distilled(sites: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
    """Per site D_1 … D_t, dense: coefficients of the last in the others, one set for all sites, and the residual² as a
    share of Σ ‖D_t‖²."""
    columns = torch.cat([torch.stack([D.flatten() for D in Ds[:-1]], dim=1) for Ds in sites])
    target = torch.cat([Ds[-1].flatten() for Ds in sites])
    c = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    return c, float((target - columns @ c).square().sum() / target.square().sum())


def rank_of_task(task: int, ranks: Sequence[int], mu: int, nu: int) -> int:
    """Of task 1, 2, …: r_1 up to μ, r_μ up to ν, then r_ν."""
    return ranks[0] if task <= mu else ranks[1] if task <= nu else ranks[2]
