"""Losses and differences as text: with the decimals that show them."""

from __future__ import annotations

import math

from loralign.compare.curves import Interval

HUGE = 1e6
"""From here on in powers of ten."""


def decimals(*values: float, least: int = 3) -> int:
    """`least`; more where they would hide the largest of the values, fewer from a hundred on."""
    top = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if not top:
        return least
    power = math.floor(math.log10(top))
    return min(9, max(0, least - max(0, power - 1), 1 - power))


def number(value: float, n: int, sign: str = "") -> str:
    """With n decimals; never a zero with a minus. sign: "+" for one before positive numbers, too."""
    return f"{value:{sign}.3g}" if abs(value) >= HUGE else f"{value:{sign}z.{n}f}"


def loss(value: float, least: int = 4) -> str:
    return number(value, decimals(value, least=least))


def signed(value: float, least: int = 3) -> str:
    return number(value, decimals(value, least=least), "+")


def between(mean: float, low: float, high: float, least: int = 3) -> str:
    """A difference and its interval, all with the same decimals."""
    n = decimals(mean, low, high, least=least)
    return f"{number(mean, n, '+')} ({number(low, n, '+')} … {number(high, n, '+')})"


def spread(x: Interval, least: int = 4) -> str:
    """A mean, and half of its interval where it has one."""
    if x.n == 0:
        return "–"
    n = decimals(x.mean, least=least)
    return number(x.mean, n) + (f" ± {number((x.high - x.low) / 2, n)}" if x.n > 1 else "")


def bounded(mean: float, low: float, high: float, said: str) -> str:
    """A size and its interval, which `said` names."""
    n = decimals(mean, low, high)
    return f"{number(mean, n)} ({said} {number(low, n)} … {number(high, n)})"
