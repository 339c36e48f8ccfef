"""Delta-LoRA (arXiv 2309.02411) literally: W itself moves by λ·s·(B⁺A⁺ − BA) after every step t > K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def literal(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    gradient: Callable[[Tensor], Tensor],
    *,
    steps: int,
    boost: float,
    wait: int,
    lr: float,
    weight_decay: float,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(W_eff, A, B, W) after each step; gradient: W_eff -> G. A and B move by torch's AdamW."""
    W, A, B = W0.clone(), nn.Parameter(A.clone()), nn.Parameter(B.clone())
    adam = torch.optim.AdamW([A, B], lr=lr, weight_decay=weight_decay, foreach=False)
    trace = []
    for t in range(steps):
        G = gradient(W + s * B.detach() @ A.detach())
        A.grad, B.grad = s * B.detach().T @ G, s * G @ A.detach().T
        before = (B @ A).detach()
        adam.step()
        if t > wait:
            W = W + boost * s * ((B @ A).detach() - before)
        trace.append((W + s * (B @ A).detach(), A.detach().clone(), B.detach().clone(), W.clone()))
    return trace
