"""XGBLoRA (arXiv 2410.19694): boosters of rank 1 at randomly chosen layers, on separable quadratics."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def left(spectrum: Sequence[float], boosters: int) -> float:
    """½·Σ_{i > t} σ_i² after t exact boosters (Eckart–Young)."""
    return 0.5 * sum(s * s for s in sorted(spectrum, reverse=True)[boosters:])


def expected(spectrum: Sequence[float], layers: int, part: int, rounds: int) -> float:
    """E f after so many rounds, `part` of `layers` layers of one spectrum drawn uniformly in each."""
    p = part / layers
    return layers * sum(comb(rounds, m) * p**m * (1 - p) ** (rounds - m) * left(spectrum, m) for m in range(rounds + 1))
