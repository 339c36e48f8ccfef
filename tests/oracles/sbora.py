"""SBoRA (arXiv 2407.05413) as what it is: full fine-tuning of r columns (rows) of W, the other ones constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def columns(
    W0: Tensor,
    chosen: Tensor,
    gradient: Callable[[Tensor], Tensor],
    make: Callable[[list[nn.Parameter]], Any],
    steps: int,
) -> Tensor:
    """W after `steps` steps of the optimizer that `make` builds over W0[:, chosen]; gradient: W -> dL/dW."""
    part = nn.Parameter(W0[:, chosen].clone())
    optimizer = make([part])
    W = W0.clone()
    for _ in range(steps):
        part.grad = gradient(W)[:, chosen]
        optimizer.step()
        W[:, chosen] = part.detach()
    return W


def rows(
    W0: Tensor,
    chosen: Tensor,
    gradient: Callable[[Tensor], Tensor],
    make: Callable[[list[nn.Parameter]], Any],
    steps: int,
) -> Tensor:
    """The same of W0[chosen]."""
    return columns(W0.T.contiguous(), chosen, lambda W: gradient(W.T).T, make, steps).T


def trained_numbers(shapes: list[tuple[int, int]], r: int, layers: int) -> dict[str, int]:
    """shapes: (d_out, d_in) of one layer's targets."""
    out, into = (layers * r * sum(s[k] for s in shapes) for k in (0, 1))
    return {"lora": out + into, "sbora-fa": out, "sbora-fb": into}


def projector(chosen: Tensor, size: int) -> Tensor:
    """Diagonal (size, size) with ones at the chosen places."""
    return torch.zeros(size, dtype=torch.float64).index_fill(0, chosen, 1.0).diag()
