"""The spectral step (SPECTRAL.md) on one factor in float64: undamped momentum with look-ahead, by singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.muon import newton_schulz


class Spectral:
    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.mu, self.m = lr, momentum, torch.zeros(())

    def step(self, g: Tensor) -> Tensor:
        self.m = self.mu * self.m + g
        return -self.lr * 0.2 * max(g.shape) ** 0.5 * newton_schulz(g + self.mu * self.m)
