"""Common subspaces in float64: the mean projector of the sources, formed and decomposed densely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def consensus(bases: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Leading k eigenvectors (m, k) and eigenvalues of the mean of U_j·U_jᵀ; orthonormal U_j (m, ℓ_j)."""
    mean = torch.stack([U.double() @ U.double().T for U in bases]).mean(0)
    values, vectors = torch.linalg.eigh(mean)
    return vectors.flip(1)[:, :k], values.flip(0)[:k]


def normalised_stack(sources: Sequence[Tensor], k: int) -> Tensor:
    """Leading left vectors of [X_1/‖X_1‖ … X_J/‖X_J‖], the measure that is *not* agreement."""
    stack = torch.cat([X.double() / X.double().norm() for X in sources], dim=1)
    return torch.linalg.svd(stack, full_matrices=False).U[:, :k]


def null_level(g: float, sources: int) -> float:
    """Upper edge of the consensus spectrum of J random subspaces of relative dimension g."""
    J = sources
    return (1 + (J - 2) * g + 2 * ((J - 1) * g * (1 - g)) ** 0.5) / J


def frozen_B_limit(M: Tensor, B: Tensor) -> Tensor:
    """s·B·A after training A alone: P_B·M."""
    Q = torch.linalg.qr(B.double()).Q
    return Q @ (Q.T @ M.double())
