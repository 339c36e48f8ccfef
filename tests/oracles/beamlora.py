"""BeamLoRA (arXiv 2502.13604): the cut by a loop over slots, the threshold by its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def p(t: float, end: float, p0: float = 0.95) -> float:
    eta = (1 - p0) * (1 + math.cos(math.pi * t / end)) / 2 if t < end else 0.0
    return 1 - eta


def shares(c: Sequence[float], tau: float) -> list[float]:
    top = max(c)
    e = [math.exp((x - top) / tau) for x in c]
    return [len(c) * x / sum(e) for x in e]


def overwritten(phi: Mapping[str, Sequence[float]], cut: float) -> set[tuple[str, int]]:
    slots = sorted(((-v, name, j) for name, found in phi.items() for j, v in enumerate(found)))
    whole, mass, kept = -sum(s[0] for s in slots), 0.0, set()
    for value, name, j in slots:
        mass -= value
        if mass > cut * whole * (1 + 1e-12):
            break
        kept.add((name, j))
    return {(name, j) for _, name, j in slots} - kept
