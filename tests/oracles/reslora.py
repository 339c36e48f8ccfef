"""ResLoRA (arXiv 2402.18039) block by block: a chain of maps of one kind, every shortcut written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs(
    shortcut: str,
    span: int,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    s: float,
    x: Tensor,
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """(output of the last map, inputs of all maps); `between` makes the next input of a map's output."""
    inputs: list[Tensor] = []
    for n in range(len(W)):
        inputs.append(x)
        m = min(span, n)
        if shortcut == "bs":
            update = sum((x @ A[n - k].T @ B[n - k].T for k in range(m + 1)), torch.zeros_like(x @ W[n].T))
        elif shortcut == "is":
            update = (x + inputs[max(n - 1, 0)]) @ A[n].T @ B[n].T
        else:
            update = sum((inputs[n - k] @ A[n - k].T for k in range(m + 1)), torch.zeros_like(x @ A[n].T)) @ B[n].T
        h = x @ W[n].T + s * update
        x = between(h)
    return h, inputs


def merged_factor(shortcut: str, span: int, n: int, norms: Sequence[float]) -> float:
    """What B_n is multiplied by: norms are the mean ‖x‖ (is) or ‖A·x‖ (ms) of every map."""
    if shortcut == "is":
        return 2.0 if n == 0 else 1 + norms[n - 1] / norms[n]
    return 1 + sum(norms[n - k] / norms[n] for k in range(1, min(span, n) + 1))
