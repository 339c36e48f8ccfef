"""The ranks that an arm ended with, module by module, and the slots that its rule left: means over reported seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from loralign.compare.curves import Curve


@dataclass(frozen=True)
class Ranks:
    """Of an arm whose modules need not end alike. begun, ended: slots of all modules; begun is None without a rule."""

    begun: float | None
    ended: float
    by_module: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.ended:.0f}" if self.begun is None else f"{self.begun:.0f} → {self.ended:.0f}"


def ranks_of(curves: Sequence[Curve]) -> Ranks | None:
    """None where nothing is known, or where every module keeps one rank and no rule decides about it."""
    sound = [c for c in curves if c.sound and c.ranks]
    known = [c.ranks for c in sound if c.ranks]
    if not known:
        return None
    begun = [c.begun_slots for c in sound if c.begun_slots is not None]
    if not begun and len({r for ranks in known for r in ranks.values()}) == 1:
        return None
    modules = dict.fromkeys(name for ranks in known for name in ranks)
    mean = {m: fmean(ranks.get(m, 0) for ranks in known) for m in modules}
    return Ranks(fmean(begun) if begun else None, sum(mean.values()), mean)


def highest(ranks: Mapping[str, Ranks]) -> float:
    """Of any module of any arm, at least 1: where a map's scale ends."""
    return max(1.0, *(v for r in ranks.values() for v in r.by_module.values()))
