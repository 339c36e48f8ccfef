"""Chain of LoRA (arXiv 2401.04151) on least squares, in float64: every link solved exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def half_inverse(C: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^−½ of a symmetric positive definite C."""
    values, E = torch.linalg.eigh(C)
    return E * values.sqrt() @ E.T, E * values.rsqrt() @ E.T


def best_link(gap: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, d_in), B (d_out, r) that minimise ½‖(BA − gap)·C^½‖²: a truncated SVD in the metric of C."""
    root, inverse = half_inverse(C)
    U, S, Vh = torch.linalg.svd(gap @ root, full_matrices=False)
    return Vh[:r] @ inverse, U[:, :r] * S[:r]


def best_losses(gap: Tensor, C: Tensor, r: int, links: int) -> list[float]:
    """½·Σ_{i > j·r} σ_i² after j = 0, 1, … links, σ: singular values of gap·C^½."""
    S = torch.linalg.svdvals(gap @ half_inverse(C)[0])
    return [float(0.5 * S[j * r :].square().sum()) for j in range(links + 1)]


def frank_wolfe(gap: Tensor, C: Tensor, radius: float, steps: int) -> tuple[list[Tensor], list[float], float]:
    """f(W) = ½‖(W − gap)·C^½‖² over ‖W‖_* ≤ radius from W = 0: W ← (1 − η)·W + η·V, V = −radius·u·vᵀ of the gradient's
    largest singular value, η = √M/(D·√(βT)). Iterates, the gaps max_V ⟨∇f, W − V⟩, and the bound of their mean,
    2·√(Mβ)·D/√T with D = 2·radius."""
    M, beta = 0.5 * float((gap @ C * gap).sum()), float(torch.linalg.eigvalsh(C)[-1])
    eta = M**0.5 / (2 * radius * (beta * steps) ** 0.5)
    W, iterates, gaps = torch.zeros_like(gap), [], []
    for _ in range(steps):
        G = (W - gap) @ C
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        gaps.append(float((G * W).sum() + radius * S[0]))
        W = (1 - eta) * W - eta * radius * torch.outer(U[:, 0], Vh[0])
        iterates.append(W)
    return iterates, gaps, 2 * (M * beta) ** 0.5 * 2 * radius / steps**0.5
