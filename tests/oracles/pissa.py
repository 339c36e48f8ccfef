"""PiSSA in float64, from arXiv 2404.02948, eq. 2–4: the r largest singular triples of W, shared between the factors."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A0 (r, d_in), B0 (d_out, r); s·B0·A0 is the best rank-r W. The largest entry of each column of B0 is positive."""
    U, S, Vh = torch.linalg.svd(W.double())
    A, B = torch.zeros(r, W.shape[1], dtype=torch.float64), torch.zeros(W.shape[0], r, dtype=torch.float64)
    for i in range(r):
        u, v = U[:, i], Vh[i]
        sign = torch.sign(u[u.abs().argmax()])
        A[i], B[:, i] = (S[i] / s) ** 0.5 * sign * v, (S[i] / s) ** 0.5 * sign * u
    return A, B
