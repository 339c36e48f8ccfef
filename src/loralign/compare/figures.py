"""What the figures of a study show, whoever draws them: colours, mean curves with bands, limits of the axes.

One look per arm in every figure: the baseline in ink, the reference grey and dashed, the others a colour each, of which
the first seven are Okabe and Ito's, which colour-blind readers tell apart; beyond the eighteenth, dashes repeat them.
Loss axes leave out the first steep fall, so that the differences at the end stay visible.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loralign.compare.curves import Curve, loss_at
from loralign.compare.rates import Rate, choose_rate
from loralign.compare.spec import BASELINE, REFERENCE

COLOURS = (
    ("#0072B2", "#4AA3DF"), ("#D55E00", "#F0884A"), ("#009E73", "#35C39A"), ("#C2649A", "#E39AC4"),
    ("#C98A00", "#EDB33E"), ("#3D9BD6", "#8CCBF2"), ("#8C6D31", "#C9A868"), ("#6A4FB3", "#A58FE6"),
    ("#B3123F", "#F06A86"), ("#6B8E23", "#A7C957"), ("#148F93", "#4FCBC9"), ("#D1495B", "#F28B95"),
    ("#3E5C9A", "#8AA4E0"), ("#A65628", "#DD9A6B"), ("#4C7A5A", "#8DBB9A"), ("#8E44AD", "#C98BE0"),
    ("#7A7A1F", "#C4C45A"), ("#B0578D", "#DE94C0"),
)  # fmt: skip
"""On a light page, on a dark one."""
INK, GREY = ("#1A1C1F", "#F2F2F0"), ("#777777", "#9A9C9F")
MARKERS = ("^", "D", "v", "P", "X", "p", "h")
DASHES = ("-", "--", ":", "-.")
STEEP = 0.15
"""Share of the run whose losses may lie above the axis."""
Axis = Literal["charged_steps", "seconds"]


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every figure of a study; dark: its colour on a dark page."""

    colour: str
    dark: str
    dash: str
    marker: str


Look = Mapping[str, Style]


@dataclass(frozen=True)
class Band:
    """Mean over an arm's sound seeds at every evaluation, and the lowest and highest of them."""

    arm: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def styles(arms: Sequence[str], baseline: str = BASELINE, reference: str = REFERENCE) -> dict[str, Style]:
    """By arm, in the order of the study: the same in every figure of it."""
    found = {baseline: Style(*INK, "-", "o"), reference: Style(*GREY, "--", "s")}
    for i, arm in enumerate(a for a in arms if a not in (baseline, reference)):
        light, dark = COLOURS[i % len(COLOURS)]
        found[arm] = Style(light, dark, DASHES[i // len(COLOURS) % 4], MARKERS[i % 7])
    return found


def bands(curves: Sequence[Curve], axis: Axis, budget: float = math.inf) -> list[Band]:
    """Of every arm with a sound run, from the lowest final loss to the highest. budget: of charged steps, where a curve
    ends that trained on although its start was not paid for by then."""
    found = []
    for arm in dict.fromkeys(c.arm for c in curves):
        runs = [_until(c, axis, budget) for c in curves if c.arm == arm and c.sound]
        if not runs:
            continue
        points = min(len(y) for _, y in runs)
        x = np.mean([x[:points] for x, _ in runs], axis=0)
        y = np.array([y[:points] for _, y in runs])
        found.append(Band(arm, *(tuple(map(float, v)) for v in (x, y.mean(0), y.min(0), y.max(0)))))
    return sorted(found, key=lambda b: b.mean[-1])


def _until(c: Curve, axis: Axis, budget: float) -> tuple[Sequence[float], Sequence[float]]:
    x, paid = getattr(c, axis), c.charged_steps
    if paid[-1] <= budget:
        return x, c.losses
    kept = sum(p < budget for p in paid)
    return (*x[:kept], loss_at(paid, x, budget)), (*c.losses[:kept], loss_at(paid, c.losses, budget))


# ---------------------------------------------------------------------------------------------------------------- names

THIN, BROAD, BROADEST = frozenset("fijlrtI.,:;!|'`()[]{}/\\ -"), frozenset("<>+=~#&MOQGDNHU"), frozenset("mWw@%…")


def width(text: str, size: float) -> float:
    """Pixels of a line, about: in the widest of the usual sans-serif faces. size: of the letters, in pixels."""
    return size * sum(map(_em, text))


def _em(letter: str) -> float:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0.0
    if letter in BROADEST or unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    return 0.41 if letter in THIN else 0.84 if letter in BROAD else 0.7 if letter.isupper() else 0.635


def fitted(name: str, room: float, size: float = 12.5) -> str:
    """A name that fits into so many pixels: what is left out is in its middle, for names often differ at their ends."""
    if width(name, size) <= room:
        return name
    head, tail = 0, len(name)
    left = room - width("…", size)
    while head < tail:
        from_end = 5 * (len(name) - tail) < 2 * (head + len(name) - tail)
        letter = name[tail - 1] if from_end else name[head]
        left -= width(letter, size)
        if left < 0:
            break
        head, tail = (head, tail - 1) if from_end else (head + 1, tail)
    return f"{name[:head].rstrip()}…{name[tail:].lstrip()}"


# --------------------------------------------------------------------------------------------------------------- limits

LEAST_SPAN = 1e-3
"""Of a loss axis, as a share of its losses: less could not be told from the labels."""


def _spanned(low: float, top: float) -> tuple[float, float]:
    missing = max(0.0, LEAST_SPAN * max(abs(low), abs(top)) - (top - low)) / 2
    return low - missing - 1e-9, top + missing + 1e-9


def loss_limits(found: Sequence[Band]) -> tuple[float, float]:
    """Of the loss axis: from the lowest seed to where three of four arms are after the steep part, and all end."""
    tops = sorted(max(b.mean[int(STEEP * len(b.mean)) :]) for b in found)
    top = max(tops[(3 * len(tops) - 1) // 4], *(b.mean[-1] for b in found), tops[0])
    low = min(min(b.low) for b in found)
    return _spanned(low - 0.05 * (top - low), top)


def best_rates(rates: Sequence[Rate]) -> dict[str, Rate]:
    """By arm, those that have one."""
    arms = dict.fromkeys(r.arm for r in rates)
    return {arm: best for arm in arms if (best := choose_rate(r for r in rates if r.arm == arm))}


def line_of(rates: Sequence[Rate], arm: str) -> list[Rate]:
    """An arm's finished rates from low to high."""
    return sorted((r for r in rates if r.arm == arm and r.finished), key=lambda r: r.lr)


def rate_limits(rates: Sequence[Rate], best: Mapping[str, Rate]) -> tuple[float, float]:
    """Losses to show: three quarters of all and those beside every arm's best, unless they are far away."""
    losses = sorted(r.mean for r in rates if r.finished)
    usual = max(losses[(3 * len(losses) - 1) // 4], *(b.mean for b in best.values()), losses[0])
    beside = [usual]
    for arm, found in best.items():
        line = line_of(rates, arm)
        at = line.index(found)
        beside += [r.mean for r in line[max(0, at - 1) : at + 2]]
    far = losses[0] + 3 * (usual - losses[0])
    low, top = losses[0], max((b for b in beside if b <= far), default=usual)
    return _spanned(low - 0.06 * (top - low), top + 0.06 * (top - low))
