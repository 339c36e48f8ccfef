"""RM-LoRA (arXiv 2407.12074): the regulariser as a loss, its gradient by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def regulariser(As: list[Tensor], Bs: list[Tensor], c: float) -> Tensor:
    """c·mean over all tensors of ‖AAᵀ − I‖ and ‖BᵀB − I‖."""
    terms = [torch.linalg.matrix_norm(A @ A.T - torch.eye(A.shape[0], dtype=A.dtype)) for A in As]
    terms += [torch.linalg.matrix_norm(B.T @ B - torch.eye(B.shape[1], dtype=B.dtype)) for B in Bs]
    return c * torch.stack(terms).mean()


def gradients(As: list[Tensor], Bs: list[Tensor], c: float) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in (*As, *Bs)]
    made = torch.autograd.grad(regulariser(leaves[: len(As)], leaves[len(As) :], c), leaves)
    return list(made[: len(As)]), list(made[len(As) :])
