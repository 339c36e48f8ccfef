"""Riemannian preconditioned LoRA (arXiv 2402.02347) in float64: one pair, inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    eye = damping * torch.eye(A.shape[0], dtype=A.dtype)
    return torch.linalg.inv(B.T @ B + eye) @ gA, gB @ torch.linalg.inv(A @ A.T + eye)
