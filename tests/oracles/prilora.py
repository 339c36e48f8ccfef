"""PRILoRA (arXiv 2401.11316): ranks by exact fractions, importance and pruning entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor


def ranks(layers: int, first: int, last: int) -> list[int]:
    exact = [first + Fraction((last - first) * k, layers - 1) for k in range(layers)]
    return [int(r + Fraction(1, 2)) for r in exact]


def norms(batches: Sequence[Tensor]) -> list[float]:
    """n̄ after these steps' inputs (tokens, d_in)."""
    n = [0.0] * batches[0].shape[1]
    for X in batches:
        n = [0.9 * old + 0.1 * sum(float(v) ** 2 for v in X[:, k]) ** 0.5 for k, old in enumerate(n)]
    return n


def pruned(A: Tensor, n: Sequence[float], share: float) -> list[set[int]]:
    """The columns that each row loses."""
    found = []
    for row in A.tolist():
        order = sorted(range(len(row)), key=lambda k: (abs(row[k]) * n[k], k))
        found.append(set(order[: round(share * len(row))]))
    return found
