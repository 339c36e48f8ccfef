"""Curves of single runs: what a start is charged, intervals over seeds, and when a target was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

INF = math.inf


@dataclass(frozen=True)
class Curve:
    """One run at an arm's best rate. losses: on test rows at `steps`; seconds: since the trial began, init included.

    step_tokens: of one training step. With it, init_tokens are charged as steps that were taken before the first one.
    final: the loss when all steps are spent. best: at the evaluation where the arm's validation loss was lowest.
    """

    arm: str
    lr: float
    seed: int
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    final: float
    best: float
    init_s: float = 0.0
    init_tokens: int = 0
    peak_bytes: int = 0
    step_s: float = 0.0
    trainable: int = 0
    exported_rank: int = 0
    diverged: bool = False
    step_tokens: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measured at the end beside the loss (accuracy …)."""
    ranks: Mapping[str, int] | None = None
    """By module at the end, where they are known."""
    begun_slots: int | None = None
    """Of all modules before the first step, where a rule decides about them."""

    @property
    def sound(self) -> bool:
        return not self.diverged and math.isfinite(self.final)

    @property
    def ahead(self) -> float:
        """Steps that the tokens of the start are worth."""
        return self.init_tokens / self.step_tokens if self.step_tokens else 0.0

    @property
    def charged_steps(self) -> tuple[float, ...]:
        """steps + init_tokens / step_tokens: what came before training is paid for."""
        return tuple(s + self.ahead for s in self.steps)


@dataclass(frozen=True)
class Interval:
    """mean (low … high), n values; one value alone has the interval −inf … inf, none has mean nan."""

    mean: float
    low: float
    high: float
    n: int

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high


@dataclass(frozen=True)
class Reach:
    """When a target was reached; reached=False: not up to `value`, a lower bound."""

    value: float
    reached: bool

    def __str__(self) -> str:
        return f"{'' if self.reached else '> '}{self.value:.0f}"


# ----------------------------------------------------------------------------------------------------------- intervals


def interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """mean ± t_{n−1} · sd / √n."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, -INF, INF, x.size)
    half = float(stdtrit(x.size - 1, 0.5 + level / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, x.size)


# ------------------------------------------------------------------------------------------------------------- targets


def loss_at(x: Sequence[float], losses: Sequence[float], where: float) -> float:
    """The loss at x, straight between evaluations; outside of them the nearest one's."""
    return float(np.interp(where, x, losses))


def reach(x: Sequence[float], losses: Sequence[float], target: float) -> Reach:
    """First x at which the curve, straight between its points, is ≤ target; x[0] where it starts below."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0 or not math.isfinite(losses[i - 1]):
                return Reach(float(x[i]), True)
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return Reach(float(x[i - 1] + part * (x[i] - x[i - 1])), True)
    return Reach(float(x[-1]) if len(x) else 0.0, False)


def median_reach(times: Sequence[Reach]) -> Reach:
    """Kaplan–Meier median, the middle where S(t) = ½ on a stretch; a bound where half or more never arrived."""
    alive, at_half = 1.0, None
    ordered = sorted(times, key=lambda r: (r.value, not r.reached))
    for i, time in enumerate(ordered):
        if at_half is not None:
            return Reach((at_half + time.value) / 2, time.reached)
        if not time.reached:
            continue
        alive *= 1 - 1 / (len(ordered) - i)
        if abs(alive - 0.5) < 1e-12:
            at_half = time.value
        elif alive < 0.5:
            return time
    return Reach(max((r.value for r in ordered), default=0.0), False)


def to_target(curves: Sequence[Curve], target: float) -> tuple[Reach, Reach]:
    """Median steps and seconds to the target over seeds. A diverged run counts as never, up to the longest run."""
    found = []
    for axis in ("charged_steps", "seconds"):
        horizon = max((float(getattr(c, axis)[-1]) for c in curves if c.steps), default=0.0)
        times = [reach(getattr(c, axis), c.losses, target) if c.sound else Reach(horizon, False) for c in curves]
        found.append(median_reach(times))
    return found[0], found[1]
