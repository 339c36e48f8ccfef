"""Which slots live: exact counts over all sites by a stable order, and how many, as functions of the step.

Scores are (r,) by site. Sites count in the order of their names; of equal scores the earlier site's, then the earlier
slot's counts as the higher, so that ties are cut at the exact count and alike on every process.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from loralign.types import LoralignError, WorkFailed

Slots = dict[str, tuple[int, ...]]
NOT_FINITE = "the scores of the slots are not finite: the run has diverged, lower the learning rate"


class BySite(Mapping[str, Tensor]):
    """(r,) by site, as rows of one tensor in the order of the sites' names."""

    def __init__(self, sizes: Mapping[str, int], flat: Tensor) -> None:
        self.sizes, self.flat = sizes, flat

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def _parts(self) -> dict[str, Tensor]:
        return dict(zip(self.sizes, self.flat.split(list(self.sizes.values())), strict=True))


def in_order(scores: Mapping[str, Tensor]) -> BySite:
    """As one tensor, on the CPU; the host waits once."""
    if isinstance(scores, BySite):
        return BySite(scores.sizes, scores.flat.detach().cpu())
    names = sorted(scores)
    sizes = {name: scores[name].shape[0] for name in names}
    return BySite(sizes, torch.cat([scores[name] for name in names]).detach().cpu())


def cut(scores: Mapping[str, Tensor], kept: Callable[[Tensor], int]) -> Slots:
    """The slots after the first so many, the highest score first. kept: of all scores in this order."""
    known = in_order(scores)
    flat = known.flat.double()
    if not bool(flat.isfinite().all()):
        raise WorkFailed(NOT_FINITE)
    values, order = flat.sort(descending=True, stable=True)
    places = order[kept(values) :].sort().values.tolist()
    found: Slots = {}
    start, begin = 0, 0
    for name, size in known.sizes.items():
        end = bisect_left(places, start + size, begin)
        if end > begin:
            found[name] = tuple([k - start for k in places[begin:end]])
        start, begin = start + size, end
    return found


def by_site(slots: Sequence[tuple[str, int]]) -> Slots:
    found: dict[str, list[int]] = {}
    for name, j in slots:
        found.setdefault(name, []).append(j)
    return {name: tuple(sorted(at)) for name, at in sorted(found.items())}


def lowest(scores: Mapping[str, Tensor], count: int) -> Slots:
    """The `count` slots of lowest score, by site."""
    return cut(scores, lambda values: len(values) - count)


@lru_cache
def widened(r: int, ratio: float) -> int:
    """⌈ratio·r⌉, exactly."""
    return math.ceil(Fraction(str(ratio)) * r)


@lru_cache
def narrowed(R: int, ratio: float) -> int:
    """The r of which `widened` makes R."""
    return math.floor(R / Fraction(str(ratio)))


@dataclass(frozen=True)
class Window:
    """The course of a budget: untouched until `start`, settled from `stop` on. t: 0-based optimizer steps of `total`.

    An event is due at every `interval`-th step within the window, and at `stop`.
    """

    start: int
    stop: int
    interval: int
    total: int

    def due(self, t: int) -> bool:
        return t == self.stop or (self.start < t < self.stop and t % self.interval == 0)

    def progress(self, t: int) -> float:
        """0 until the start, 1 from the stop on."""
        return min(max((t - self.start) / (self.stop - self.start), 0.0), 1.0)


@lru_cache
def window(total: int, first: float, last: float, interval: int | None) -> Window:
    """first, last: shares of `total` before and after the window (at least one step after it). interval: in optimizer
    steps; None: 500 of them in a run. Raises LoralignError, with the mend, where nothing is left between them."""
    if why := too_short(total, first, last):
        raise LoralignError(why)
    start, stop = round(first * total), total - max(1, round(last * total))
    return Window(start, stop, interval or max(1, total // 500), total)


def too_short(total: int, first: float, last: float) -> str:
    """Why a run of so many steps has no room for the window; "" where it has."""
    if total - max(1, round(last * total)) > round(first * total):
        return ""
    return (
        f"its budget shrinks between {first:.0%} and {1 - last:.0%} of the run, and {total} optimizer steps leave no "
        "step in between: train longer, or lower the shares at both ends"
    )


def cubic_budget(t: int, window: Window, b0: int, bT: int) -> int:
    """AdaLoRA's b(t) = ⌊bT + (b0 − bT)·(1 − x)³⌋, x the progress in the window."""
    if t <= window.start:
        return b0
    return bT if t >= window.stop else int(bT + (b0 - bT) * (1 - window.progress(t)) ** 3)


def cubic_pruned(t: int, window: Window, b0: int, bT: int) -> int:
    """Dynamic-rank LoRA's count of pruned slots, ⌊(b0 − bT)·x³⌋, as a budget b0 − it."""
    return b0 - int((b0 - bT) * window.progress(t) ** 3)
