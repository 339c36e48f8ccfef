"""ResLoRA (arXiv 2402.18039) block by block: a chain of maps of one kind, every shortcut written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def blocks_before(shortcut: str, span: int, W: Sequence[Tensor], A: Sequence[Tensor]) -> list[int]:
    """m_n of every map: a chain ends where sizes change; ms adds features, of which there are as many as A has rows."""
    found = []
    for n in range(len(W)):
        m, most = 0, 1 if shortcut == "is" else span
        while m < min(most, n):
            k = n - m - 1
            if W[k].shape != W[n].shape or (shortcut == "ms" and len(A[k]) != len(A[n])):
                break
            m += 1
        found.append(m)
    return found


def outputs(
    shortcut: str,
    span: int,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    s: Sequence[float],
    x: Tensor,
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """(output of the last map, inputs of all maps); `between` makes the next input of a map's output."""
    inputs: list[Tensor] = []
    before = blocks_before(shortcut, span, W, A)
    for n in range(len(W)):
        inputs.append(x)
        m = before[n]
        if shortcut == "bs":
            update = sum((x @ A[n - k].T @ B[n - k].T for k in range(m + 1)), torch.zeros_like(x @ W[n].T))
        elif shortcut == "is":
            update = (x + inputs[n - m]) @ A[n].T @ B[n].T
        else:
            update = sum((inputs[n - k] @ A[n - k].T for k in range(m + 1)), torch.zeros_like(x @ A[n].T)) @ B[n].T
        h = x @ W[n].T + s[n] * update
        x = between(h)
    return h, inputs


def merged_factor(shortcut: str, m: int, n: int, norms: Sequence[float]) -> float:
    """What B_n is multiplied by: norms are the mean ‖x‖ (is) or ‖A·x‖ (ms) of every map, m its blocks before."""
    if shortcut == "is":
        return 1 + norms[n - 1] / norms[n] if m else 2.0
    return 1 + sum(norms[n - k] / norms[n] for k in range(1, m + 1))
