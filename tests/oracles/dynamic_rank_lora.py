"""Dynamic-rank LoRA (arXiv 2405.17357): components formed one by one, the law by its fraction, R by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(A: Tensor, B: Tensor, c: Tensor) -> list[float]:
    """‖c_j b_j a_jᵀ‖ over the norm of their sum, every product formed."""
    A, B, c = A.double(), B.double(), c.double()
    parts = [c[j] * torch.outer(B[:, j], A[j]) for j in range(len(c))]
    whole = torch.linalg.matrix_norm(torch.stack(parts).sum(0))
    return [float(torch.linalg.matrix_norm(p) / (whole + 1e-8)) for p in parts]


def pruned(t: int, T: int, b0: int, bT: int, first: float = 0.15, last: float = 0.5) -> int:
    x = min(max((t - first * T) / (T * (1 - first - last)), 0.0), 1.0)
    return int(b0 * ((b0 - bT) / b0 * x**3) + 1e-9)


def variance_gradients(As: Sequence[Tensor], Bs: Sequence[Tensor], eta: float) -> list[Tensor]:
    """Of η/(2·Σr)·Σ(Var a_j + Var b_j), unbiased; the A's first."""
    leaves = [X.double().clone().requires_grad_() for X in (*As, *Bs)]
    total = torch.zeros((), dtype=torch.float64)
    for k, X in enumerate(leaves):
        total = total + X.var(dim=1 if k < len(As) else 0, unbiased=True).sum()
    return list(torch.autograd.grad(eta / (2 * sum(len(A) for A in As)) * total, leaves))
