"""What a study says, as pure functions of its finished runs. Rates are judged in `rates.py`, words are in `verdict.py`.

Losses are lower-is-better and in the unit of the task (nats for language models). Every other arm is tested against the
baseline twice, by differences between runs of the same seed (same data order):

    final   d_s = L_base,s − L_arm,s                                                 positive: the arm ends lower
    speed   q_s = log(T_arm,s(ℓ_s) / T_base,s(ℓ_s)),  ℓ_s = max(L_arm,s, L_base,s) + σ    negative: the arm is sooner

T(ℓ) is the first step with loss ≤ ℓ, σ the standard deviation of a final loss over seeds. Both arms come to ℓ_s, so
nothing is censored, and swapping the arms only changes the signs; σ keeps a flat end from turning noise into time.
Either way the test is Student's t with

    t = mean / (s √(1/n + κ)),   s = max(the arm's own sd, median of that sd over arms),   κ = RATE_CHOICE = 0.3

κ stands for the choice of the rate: it was made once per arm, on one noisy seed, and more seeds do not make it better.
Where two rates truly differ by u·s, the worse one is taken with p = Φ(−u), so that two names for one method end up
apart with variance 2p(1−p)u²s² ≤ 0.3 s² (largest at u = 1.3). A plain paired t-test (κ = 0) calls them different in
5–20 % of simulated studies, the more the more seeds. Holm corrects all tests of a study together, family-wise at ALPHA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

ALPHA = 0.025
RATE_CHOICE = 0.3
INF = math.inf


@dataclass(frozen=True)
class Curve:
    """One run at an arm's best rate. losses: on test rows at `steps`; seconds: since the trial began, init included.

    step_tokens: of one training step. With it, init_tokens are charged as steps that were taken before the first one.
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

    @property
    def sound(self) -> bool:
        return not self.diverged and math.isfinite(self.final)

    @property
    def charged_steps(self) -> tuple[float, ...]:
        """steps + init_tokens / step_tokens: what came before training is paid for."""
        ahead = self.init_tokens / self.step_tokens if self.step_tokens else 0.0
        return tuple(s + ahead for s in self.steps)


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


@dataclass(frozen=True)
class Gap:
    """Share of the gap between baseline and reference that an arm closes; value None: undefined, see reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline. final: mean of d. steps, seconds: geometric mean of the ratio of times to the common
    level (seconds are not tested). p: of (final, speed), corrected by Holm over the study; intervals are not."""

    final: Interval
    steps: Interval
    seconds: Interval
    p: tuple[float, float]

    @property
    def final_sign(self) -> int:
        """1: ends lower, −1: ends higher, 0: no difference within noise."""
        return _sign(self.final.mean) if self.p[0] < ALPHA else 0

    @property
    def speed_sign(self) -> int:
        """1: sooner, −1: later, 0: no difference within noise."""
        return _sign(1.0 - self.steps.mean) if self.p[1] < ALPHA else 0


# ------------------------------------------------------------------------------------------------- intervals and tests


def interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """mean ± t_{n−1} · sd / √n."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, -INF, INF, x.size)
    half = float(stdtrit(x.size - 1, 0.5 + level / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, x.size)


def paired_tests(samples: Sequence[ArrayLike]) -> list[tuple[Interval, float]]:
    """95 % interval and two-sided p of mean 0 for each arm's differences, by the t of the module docstring.

    Degrees of freedom Σ(n_i − 1) / (1 + (m − 1)/4): m arms, whose differences share the baseline (correlation ½).
    """
    arms = [np.asarray(x, dtype=float) for x in samples]
    own = [float(x.std(ddof=1)) for x in arms]
    df = sum(x.size - 1 for x in arms) / (1 + (len(arms) - 1) / 4)
    found = []
    for x, sd in zip(arms, own, strict=True):
        mean, error = float(x.mean()), max(sd, float(np.median(own))) * math.sqrt(1 / x.size + RATE_CHOICE)
        p = 2 * float(stdtr(df, -abs(mean) / error)) if error else float(mean == 0)
        half = float(stdtrit(df, 0.975)) * error
        found.append((Interval(mean, mean - half, mean + half, x.size), p))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: max over smaller p_(j) of (m − j) · p_(j), at most 1; in the order given."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


# ------------------------------------------------------------------------------------------------------------ targets


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


# ------------------------------------------------------------------------------------------------- arm against baseline


def compare(arms: Mapping[str, Sequence[Curve]], baseline: str) -> dict[str, Comparison]:
    """Every other arm that shares at least two sound seeds with the baseline; all p corrected together."""
    paired = {arm: _on_common_seeds(c, arms[baseline]) for arm, c in arms.items() if arm != baseline}
    found = {arm: differences(pairs) for arm, pairs in paired.items() if len(pairs) > 1}
    if not found:
        return {}
    final, steps, seconds = (paired_tests([d[i] for d in found.values()]) for i in range(3))
    p = holm([p for _, p in (*final, *steps)])
    return {
        arm: Comparison(final[i][0], _exp(steps[i][0]), _exp(seconds[i][0]), (p[i], p[len(found) + i]))
        for i, arm in enumerate(found)
    }


def differences(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[list[float], list[float], list[float]]:
    """d, q over steps and q over seconds of (arm, baseline) pairs, one value a seed."""
    finals = np.array([[a.final, b.final] for a, b in pairs])
    margin = math.sqrt(float(finals.var(axis=0, ddof=1).mean()))
    steps = [_log_ratio(a, b, a.charged_steps, b.charged_steps, margin) for a, b in pairs]
    seconds = [_log_ratio(a, b, a.seconds, b.seconds, margin) for a, b in pairs]
    return [b.final - a.final for a, b in pairs], steps, seconds


def gap_closed(arm: Sequence[Curve], base: Sequence[Curve], reference: Sequence[Curve]) -> Gap:
    """ρ = (base − arm) / (base − reference) of mean final losses, with Fieller's 95 % interval over common seeds:

    all ρ with (x̄ − ρȳ)² ≤ t² (s_xx − 2ρ s_xy + ρ² s_yy) (1/n + κ);  bounded when the interval of ȳ leaves 0 out.
    """
    trios = [(a, b, r) for a, b in _on_common_seeds(arm, base) for r in reference if r.seed == a.seed and r.sound]
    if not base or not reference:
        return Gap(None, reason="the study has no such pair of arms")
    if len(trios) < 2:
        return Gap(None, reason="fewer than two common seeds")
    x, y = (np.array([t[1].final - t[i].final for t in trios]) for i in (0, 2))
    whole = paired_tests([y])[0][0]
    if 0.0 in whole:
        return Gap(None, reason="the 95 % interval of the gap itself holds 0")
    if whole.mean < 0:
        return Gap(None, reason="the baseline ends below the reference")
    scale = float(stdtrit(len(trios) - 1, 0.975)) ** 2 * (1 / len(trios) + RATE_CHOICE)
    sxx, sxy, _, syy = (float(v) * scale for v in np.cov(x, y).flat)
    mx, my = float(x.mean()), float(y.mean())
    a, b, c = my**2 - syy, mx * my - sxy, mx**2 - sxx
    root = math.sqrt(max(0.0, b * b - a * c))
    return Gap(mx / my, (b - root) / a, (b + root) / a)


def _on_common_seeds(arm: Sequence[Curve], base: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    by_seed = {c.seed: c for c in base if c.sound}
    return [(c, by_seed[c.seed]) for c in sorted(arm, key=lambda c: c.seed) if c.sound and c.seed in by_seed]


def _log_ratio(a: Curve, b: Curve, x_a: Sequence[float], x_b: Sequence[float], margin: float) -> float:
    level = max(a.final, b.final) + margin
    first = min((v for v in (*x_a, *x_b) if v > 0), default=1.0)
    t_a, t_b = (max(reach(x, c.losses, level).value, first) for x, c in ((x_a, a), (x_b, b)))
    return math.log(t_a / t_b)


def _exp(log: Interval) -> Interval:
    """Geometric mean and its interval."""
    with np.errstate(over="ignore"):
        return Interval(float(np.exp(log.mean)), float(np.exp(log.low)), float(np.exp(log.high)), log.n)
