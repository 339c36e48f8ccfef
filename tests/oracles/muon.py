"""Muon (Jordan et al. 2024; scale of arXiv 2502.16982) on one matrix in float64: singular values, no Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(X: Tensor, steps: int = 5) -> Tensor:
    """The quintic iteration on singular values."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / X.norm() if X.norm() > 0 else S
    for _ in range(steps):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ torch.diag(S) @ Vh


class Muon:
    def __init__(self, lr: float, momentum: float = 0.95) -> None:
        self.lr, self.mu, self.m = lr, momentum, torch.zeros(())

    def step(self, g: Tensor) -> Tensor:
        self.m = self.mu * self.m + (1 - self.mu) * g
        n = (1 - self.mu) * g + self.mu * self.m
        return -self.lr * 0.2 * max(g.shape) ** 0.5 * newton_schulz(n)
