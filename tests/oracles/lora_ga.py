"""LoRA-GA in float64, straight from arXiv 2407.05000: slow, dense, obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(
    G: Tensor, r: int, gamma: float, s: float, direction: str = "ArB2r", scale: str = "stable"
) -> tuple[Tensor, Tensor]:
    """A0 (r, d_in), B0 (d_out, r) of algorithm 1; canonical signs: the largest entry of a vector is positive."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    V = Vh.T
    U = U * torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    V = V * torch.sign(V.gather(0, V.abs().argmax(0, keepdim=True)))
    first, second = list(range(r)), list(range(r, 2 * r))
    in_A, in_B = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))),
    }[direction]
    c = {"stable": G.shape[0] ** 0.25 / gamma**0.5, "gd": 1 / s, "unit": 1.0}[scale]
    return c * V[:, in_A].T, c * U[:, in_B]


def zeta(d_out: int, s: float, gamma: float, scale: str = "stable") -> float:
    """Size of the first step of W_eff relative to full fine-tuning's: −λ·ζ·G_2r."""
    return {"stable": s**2 * d_out**0.5 / gamma, "gd": 1.0, "unit": s**2}[scale]


def top(G: Tensor, k: int) -> Tensor:
    """Best rank-k approximation of G."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]
