"""AdaLoRA (arXiv 2303.10512): scores by loops over numbers, the budget by its formula, the regulariser by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Slot = tuple[str, int]


def budget(t: int, T: int, b0: int, bT: int, t_i: int, t_f: int) -> int:
    """b(t), t from 0."""
    if t <= t_i:
        return b0
    if t > T - t_f:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - t_i) / (T - t_f - t_i)) ** 3)


class Averages:
    """Ī and Ū of every number of one site's A, B and c."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas, self.mean, self.spread = betas, dict[str, Tensor](), dict[str, Tensor]()

    def observe(self, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        b1, b2 = self.betas
        for name, w in values.items():
            seen = (w.double() * grads[name].double()).abs()
            self.mean[name] = b1 * self.mean.get(name, torch.zeros_like(seen)) + (1 - b1) * seen
            off = (seen - self.mean[name]).abs()
            self.spread[name] = b2 * self.spread.get(name, torch.zeros_like(seen)) + (1 - b2) * off

    def scores(self) -> list[float]:
        s = {name: self.mean[name] * self.spread[name] for name in self.mean}
        A, B, c = s["A"], s["B"], s["gate"]
        return [
            float(c[j]) + sum(map(float, B[:, j])) / len(B) + sum(map(float, A[j])) / A.shape[1] for j in range(len(c))
        ]


def dropped(scores: Mapping[str, Sequence[float]], count: int) -> set[Slot]:
    """The `count` lowest; of equals the later site's, then the later slot's."""
    order = sorted(((value, name, j) for name, found in scores.items() for j, value in enumerate(found)), key=_key)
    return {(name, j) for _, name, j in order[len(order) - count :]}


def _key(slot: tuple[float, str, int]) -> tuple[float, str, int]:
    return -slot[0], slot[1], slot[2]


def regulariser_gradients(As: Sequence[Tensor], Bs: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """Of γ/2N·Σ(‖AAᵀ − I‖ + ‖BᵀB − I‖), the A's first."""
    leaves = [X.double().clone().requires_grad_() for X in (*As, *Bs)]
    total = torch.zeros((), dtype=torch.float64)
    for k, X in enumerate(leaves):
        H = X @ X.T if k < len(As) else X.T @ X
        total = total + torch.linalg.matrix_norm(H - torch.eye(len(H), dtype=torch.float64))
    return list(torch.autograd.grad(gamma / (2 * len(As)) * total, leaves))
