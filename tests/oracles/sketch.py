"""The gradient of a layer and its leading directions in float64, formed and decomposed densely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(uses: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """G = Σ δᵀ·x over the uses of a layer: δ (T, d_out), x (T, d_in)."""
    return torch.stack([delta.double().T @ x.double() for delta, x in uses]).sum(0)


def leading(G: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k)."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def quality(U: Tensor, V: Tensor, G: Tensor) -> float:
    """Energy of G between these k directions over that of the best k: ‖UᵀGV‖² / Σ_{i≤k} σ_i²."""
    S = torch.linalg.svdvals(G.double())[: U.shape[1]]
    return float((U.double().T @ G.double() @ V.double()).square().sum() / S.square().sum())


def share(U: Tensor, V: Tensor, G: Tensor) -> float:
    """‖P_U·G + G·P_V − P_U·G·P_V‖² / ‖G‖²: what a step along U or V can reach of G."""
    G, PU, PV = G.double(), U.double() @ U.double().T, V.double() @ V.double().T
    return float((PU @ G + G @ PV - PU @ G @ PV).square().sum() / G.square().sum())


def projector(Q: Tensor) -> Tensor:
    """Onto the columns of Q, which need not be orthonormal."""
    Q = torch.linalg.qr(Q.double()).Q
    return Q @ Q.T
