"""The search for each arm's learning rate, as pure functions of its trials: choice, edges, fairness, sensitivity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loralign.types import LoralignError


@dataclass(frozen=True)
class Rate:
    """One rate of an arm. loss: the last one on validation rows; further: the same on a finalist's seeds."""

    arm: str
    lr: float
    loss: float
    diverged: bool = False
    pruned: bool = False
    further: tuple[float, ...] = ()

    @property
    def finished(self) -> bool:
        return not self.diverged and not self.pruned and math.isfinite(self.mean)

    @property
    def losses(self) -> tuple[float, ...]:
        return (self.loss, *self.further)

    @property
    def mean(self) -> float:
        """Over its seeds; infinite where one of them diverged."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Sensitivity:
    """decades: width in log10(lr) of the range around the best rate within `tolerance` of the best loss; open: the
    range goes on beyond the grid. excess: mean loss of the finished neighbours minus the best, None without any."""

    decades: float
    open: bool
    excess: float | None
    tolerance: float


def check_equal_trials(counts: Mapping[str, int]) -> None:
    """Refuse a comparison in which one arm was searched less or more than the others."""
    usual = max(Counter(counts.values()).items(), key=lambda item: (item[1], item[0]))[0] if counts else 0
    odd = [f"{arm!r} had {n}" for arm, n in counts.items() if n != usual]
    if odd:
        raise LoralignError(f"arms need the same number of rate trials: {', '.join(odd)}, the others {usual}")


def finalists(trials: Iterable[Rate]) -> list[Rate]:
    """The finished rates on the most seeds."""
    finished = [t for t in trials if t.finished]
    most = max((len(t.losses) for t in finished), default=0)
    return [t for t in finished if len(t.losses) == most]


def choose_rate(trials: Iterable[Rate]) -> Rate | None:
    """The lowest rate whose mean is within one standard error of the lowest mean; None where none finished.

    Only rates on the most seeds are judged. The standard error is a mean's, from the spread within the rates that are
    judged, pooled: 0 on one seed, where the lowest loss decides, of equals the lower rate.
    """
    judged = finalists(trials)
    if not judged:
        return None
    limit = min(t.mean for t in judged) + standard_error(judged)
    return min((t for t in judged if t.mean <= limit), key=lambda t: t.lr)


def standard_error(judged: Sequence[Rate]) -> float:
    """Of a mean over k seeds, √(mean variance over rates / k); 0 on one seed."""
    k = len(judged[0].losses)
    if k < 2:
        return 0.0
    squares = sum(sum((x - t.mean) ** 2 for x in t.losses) / (k - 1) for t in judged)
    return math.sqrt(squares / len(judged) / k)


def edge(best: float | None, grid: Iterable[Rate]) -> str | None:
    """Where the best rate is the first ("low") or last ("high") of its grid, so that a better one may lie outside.

    An outermost rate that was given up says nothing of its end: the rate beside it counts as outermost, too.
    """
    rates = sorted(grid, key=lambda r: r.lr)
    low, high = 0, len(rates) - 1
    low += len(rates) > 2 and rates[0].pruned
    high -= len(rates) > 2 and rates[-1].pruned
    if best is None or best <= rates[low].lr:
        return "low"
    return "high" if best >= rates[high].lr else None


def sensitivity(trials: Iterable[Rate], tolerance: float = 0.05) -> Sensitivity | None:
    """How much the rate matters; straight lines in (log10 lr, loss), a trial that did not finish ends the range."""
    ordered = sorted(trials, key=lambda t: t.lr)
    best = choose_rate(ordered)
    if best is None:
        return None
    at = ordered.index(best)
    sides = [_side(ordered[at:], best.mean + tolerance), _side(ordered[at::-1], best.mean + tolerance)]
    near = [t.mean - best.mean for t in ordered[max(0, at - 1) : at + 2] if t.finished and t is not best]
    excess = sum(near) / len(near) if near else None
    return Sensitivity(sum(s[0] for s in sides), any(s[1] for s in sides), excess, tolerance)


def _side(outwards: Sequence[Rate], limit: float) -> tuple[float, bool]:
    """Decades from the first rate until the loss passes the limit, and whether the grid ended before."""
    width = 0.0
    for inner, outer in pairwise(outwards):
        if not outer.finished:
            return width, False
        decades = abs(math.log10(outer.lr / inner.lr))
        if outer.mean > limit:
            return width + decades * (limit - inner.mean) / (outer.mean - inner.mean), False
        width += decades
    return width, True
