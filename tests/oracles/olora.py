"""OLoRA in float64, from arXiv 2406.01775, algorithm 1: the first r columns of W orthonormalised one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A0 = R[:r] (r, d_in), B0 = Q[:, :r] (d_out, r) of W = Q·R with a positive diagonal of R (Gram–Schmidt)."""
    W = W.double()
    columns: list[Tensor] = []
    for j in range(r):
        rest = W[:, j]
        for _ in range(2):  # twice is enough
            for q in columns:
                rest = rest - (q @ rest) * q
        columns.append(rest / rest.norm())
    Q = torch.stack(columns, dim=1)
    return Q.T @ W, Q
