"""RAC-LoRA (arXiv 2410.08305), equations 3 and 4, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_step(W: Tensor, G: Tensor, lr: float, *, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """W after one exact link with A, or else B, frozen."""
    if A is not None:
        return W - lr * G @ A.T @ torch.linalg.pinv(A @ A.T) @ A
    assert B is not None
    return W - lr * B @ torch.linalg.pinv(B.T @ B) @ B.T @ G


def contraction(lr: float, r: int, d: int) -> float:
    """E f(W⁺)/f(W) of f = ½‖W − W*‖², d: the frozen factor's long side."""
    return 1 - (2 * lr - lr**2) * r / d
