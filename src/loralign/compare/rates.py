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
    """One trial of the search for an arm's learning rate. loss: the last one on validation rows."""

    arm: str
    lr: float
    loss: float
    diverged: bool = False
    pruned: bool = False

    @property
    def finished(self) -> bool:
        return not self.diverged and not self.pruned and math.isfinite(self.loss)


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


def choose_rate(trials: Iterable[Rate]) -> Rate | None:
    """The finished, finite trial with the lowest validation loss, of equals the lower rate; None without any."""
    return min((t for t in trials if t.finished), key=lambda t: (t.loss, t.lr), default=None)


def edge(best: float | None, grid: Iterable[float]) -> str | None:
    """Where the best rate is the first ("low") or last ("high") of its grid, so that a better one may lie outside."""
    rates = sorted(grid)
    if best is None or best <= rates[0]:
        return "low"
    return "high" if best >= rates[-1] else None


def sensitivity(trials: Iterable[Rate], tolerance: float = 0.05) -> Sensitivity | None:
    """How much the rate matters; straight lines in (log10 lr, loss), a trial that did not finish ends the range."""
    ordered = sorted(trials, key=lambda t: t.lr)
    best = choose_rate(ordered)
    if best is None:
        return None
    at = ordered.index(best)
    sides = [_side(ordered[at:], best.loss + tolerance), _side(ordered[at::-1], best.loss + tolerance)]
    near = [t.loss - best.loss for t in ordered[max(0, at - 1) : at + 2] if t.finished and t is not best]
    excess = sum(near) / len(near) if near else None
    return Sensitivity(sum(s[0] for s in sides), any(s[1] for s in sides), excess, tolerance)


def _side(outwards: Sequence[Rate], limit: float) -> tuple[float, bool]:
    """Decades from the first rate until the loss passes the limit, and whether the grid ended before."""
    width = 0.0
    for inner, outer in pairwise(outwards):
        if not outer.finished:
            return width, False
        decades = abs(math.log10(outer.lr / inner.lr))
        if outer.loss > limit:
            return width + decades * (limit - inner.loss) / (outer.loss - inner.loss), False
        width += decades
    return width, True
