"""ReLoRA's learning-rate multiplier (Guitaricet/relora, training_utils.py), as the spec states it."""

from __future__ import annotations

from math import cos, pi


def cosine(t: int, total: int, warm_up: int, least: float) -> float:
    if t < warm_up:
        return t / warm_up
    return least + (1 - least) * 0.5 * (1 + cos(pi * (t - warm_up) / (total - warm_up)))


def jagged(t: int, total: int, warm_up: int, least: float, every: int, again: int) -> float:
    k = t % every
    if t >= every and k < again:
        return k / again * cosine(t - k + again, total, warm_up, least)
    return cosine(t, total, warm_up, least)
