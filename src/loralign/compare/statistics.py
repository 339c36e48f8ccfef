"""What a study says, as pure functions of its finished runs. Tests are in `inference.py`, words in `verdict.py`.

Losses are lower-is-better and in the unit of the task (nats for language models). Arms belong to families, which the
study file declares; `full` is the control, a family of its own that shows whether the study can see anything at all.

    final   mean over seeds, against the baseline's mean over its own, more, seeds: inference.against_baseline
    speed   q_s = log(T_arm,s(ℓ_s) / T_base,s(ℓ_s)),  ℓ_s = max(L_arm,s, L_base,s) + σ    negative: the arm is sooner

T(ℓ) is the first step with loss ≤ ℓ. At an arm's first evaluation that may have been any step since its start: of what
q may then be, the value nearest 0 is taken. σ is the standard deviation of a final loss over seeds. Both arms come to
ℓ_s, so nothing is censored later, and swapping the arms only changes the signs; σ keeps a flat end from turning noise
into time.
q is of runs with the same seed (same data order), tested by a paired t against 0 where the final losses tie,
corrected by Holm within the family.

Variances are moderated over the baseline, the control, the primary arms and the family's own: what joins another
family changes nothing here. Beside the reported runs, the finalists among its rates tell of an arm's spread.
A family errs in at most FINAL + SPEED of all studies (Bonferroni over its two questions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from loralign.compare.curves import Curve, Interval, interval, reach
from loralign.compare.inference import Sample, against_baseline, holm, moderated, paired, sample, welch
from loralign.compare.rates import Rate, finalists

FINAL, SPEED = 0.02, 0.005
CONTROL, PRIMARY = "control", "primary"


@dataclass(frozen=True)
class Gap:
    """Share of the gap between baseline and reference that an arm closes; value None: undefined, see reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline. final: baseline − arm, positive: the arm ends lower; its interval holds for the
    whole family together with 1 − FINAL. steps, seconds: geometric mean of the ratio of times to the common level, 95 %
    (seconds are not tested). p: of (final, speed), corrected within the family; None: the final losses differ."""

    final: Interval
    steps: Interval
    seconds: Interval
    p: tuple[float, float | None]

    @property
    def final_sign(self) -> int:
        """1: ends lower, −1: ends higher, 0: no difference within noise."""
        return _sign(self.final.mean) if self.p[0] < FINAL else 0

    @property
    def speed_sign(self) -> int:
        """1: sooner, −1: later, 0: no difference within noise, or not tested."""
        return _sign(1.0 - self.steps.mean) if self.p[1] is not None and self.p[1] < SPEED else 0


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


# ------------------------------------------------------------------------------------------------- arm against baseline

Arms = Mapping[str, Sequence[Curve]]


def samples(arms: Arms, rates: Sequence[Rate] = ()) -> dict[str, Sample]:
    """Final losses of every arm with at least two sound seeds, the spread of its runs in the search included."""
    found = {}
    for arm, curves in arms.items():
        finals = [c.final for c in curves if c.sound]
        if len(finals) < 2:
            continue
        found[arm] = _with_spread_of(finalists([r for r in rates if r.arm == arm]), sample(finals))
    return found


def stable(arms: Arms, baseline: str) -> dict[str, Sequence[Curve]]:
    """Without the arms that diverged on some seed: the seeds that are left say nothing of the others."""
    return {arm: curves for arm, curves in arms.items() if arm == baseline or all(c.sound for c in curves)}


def _with_spread_of(search: Sequence[Rate], s: Sample) -> Sample:
    """Pooled with the variance of the finalists' losses: each has k − 1 degrees of freedom."""
    if not search:
        return s
    k = len(search[0].losses)
    more = len(search) * (k - 1)
    if not more:
        return replace(s, k=k)
    squares = s.variance * s.df + sum(float(np.var(r.losses, ddof=1)) for r in search) * (k - 1)
    return replace(s, variance=squares / (s.df + more), df=s.df + more, k=k)


def families(arms: Sequence[str], given: Mapping[str, str], baseline: str, reference: str) -> dict[str, list[str]]:
    """Arms by family, the reference a family of its own; an arm that names none is primary."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        if arm != baseline:
            found.setdefault(CONTROL if arm == reference else given.get(arm, PRIMARY), []).append(arm)
    return found


def compare(
    arms: Arms,
    baseline: str,
    *,
    rates: Sequence[Rate] = (),
    family: Mapping[str, str] | None = None,
    reference: str = "full",
) -> dict[str, Comparison]:
    """Every other arm with at least two sound seeds against the baseline, family by family."""
    raw = samples(arms, rates)
    if baseline not in raw:
        return {}
    grouped = families(list(raw), family or {}, baseline, reference)
    found: dict[str, Comparison] = {}
    for members in grouped.values():
        shared = dict.fromkeys([baseline, *grouped.get(CONTROL, []), *grouped.get(PRIMARY, []), *members])
        quiet = dict(zip(shared, moderated([raw[a] for a in shared]), strict=True))
        found |= _family(members, arms, quiet, baseline)
    return {arm: found[arm] for arm in arms if arm in found}


def _family(members: Sequence[str], arms: Arms, quiet: Mapping[str, Sample], baseline: str) -> dict[str, Comparison]:
    final = dict(zip(members, against_baseline([quiet[a] for a in members], quiet[baseline], FINAL), strict=True))
    pairs = {a: on_common_seeds(arms[a], arms[baseline]) for a in members}
    times = {a: log_ratios(p) for a, p in pairs.items() if len(p) > 1}
    tied = [a for a in times if final[a].p >= FINAL]
    tests = dict(zip(tied, paired([sample(times[a][0], quiet[a].k) for a in tied]), strict=True))
    corrected = dict(zip(tied, holm([tests[a][1] for a in tied]), strict=True))
    found = {}
    for a in members:
        steps, seconds = (_exp(interval(t)) for t in times.get(a, ([], [])))
        d = final[a]
        found[a] = Comparison(Interval(d.mean, d.low, d.high, quiet[a].n), steps, seconds, (d.p, corrected.get(a)))
    return found


def log_ratios(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[list[float], list[float]]:
    """q over steps and q over seconds of (arm, baseline) pairs, one value a seed."""
    finals = np.array([[a.final, b.final] for a, b in pairs])
    margin = math.sqrt(float(finals.var(axis=0, ddof=1).mean()))
    levels = [max(a.final, b.final) + margin for a, b in pairs]
    steps, seconds = (
        [_log_ratio(_when(a, axis, v), _when(b, axis, v)) for (a, b), v in zip(pairs, levels, strict=True)]
        for axis in (("charged_steps", "ahead"), ("seconds", "init_s"))
    )
    return steps, seconds


def gap_closed(arm: Sample | None, base: Sample | None, reference: Sample | None) -> Gap:
    """ρ = (base − arm) / (base − reference) of mean final losses, with Fieller's 95 % interval, baseline shared:

    all ρ with (x̄ − ρȳ)² ≤ t² (v_0 + v_a − 2ρ v_0 + ρ² (v_0 + v_r));  bounded when the interval of ȳ leaves 0 out.
    The baseline's own is 0, the reference's 1.
    """
    if base is None or reference is None or arm is None:
        return Gap(None, reason="an arm, the baseline or the reference has fewer than two seeds, or diverged on one")
    t2 = float(stdtrit(welch(reference, base), 0.975)) ** 2
    x, y = base.mean - arm.mean, base.mean - reference.mean
    if y * y <= t2 * (base.error2 + reference.error2):
        return Gap(None, reason="the 95 % interval of the gap itself holds 0")
    if y < 0:
        return Gap(None, reason="the baseline ends below the reference")
    if arm is base or arm is reference:  # not one that happens to end with equal numbers
        own = float(arm is reference)
        return Gap(own, own, own)
    t2 = float(stdtrit(min(welch(reference, base), welch(arm, base)), 0.975)) ** 2
    syy = t2 * (base.error2 + reference.error2)
    a, b, c = y**2 - syy, x * y - t2 * base.error2, x**2 - t2 * (base.error2 + arm.error2)
    if a <= 0:
        return Gap(x / y, None, None, "the arm is too uncertain for an interval")
    root = math.sqrt(max(0.0, b * b - a * c))
    return Gap(x / y, (b - root) / a, (b + root) / a)


def on_common_seeds(arm: Sequence[Curve], base: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    by_seed = {c.seed: c for c in base if c.sound}
    return [(c, by_seed[c.seed]) for c in sorted(arm, key=lambda c: c.seed) if c.sound and c.seed in by_seed]


def _when(curve: Curve, axis: tuple[str, str], level: float) -> tuple[float, float]:
    """Between what two steps or seconds the level was reached: equal unless it was at the first evaluation."""
    x, begun = getattr(curve, axis[0]), getattr(curve, axis[1])
    at = reach(x, curve.losses, level).value
    return (begun, at) if at <= x[0] else (at, at)


def _log_ratio(a: tuple[float, float], b: tuple[float, float]) -> float:
    """log(T_a / T_b), of what it may be the value nearest 0."""
    least = math.log(a[0] / b[1]) if a[0] > 0 else -math.inf
    most = math.log(a[1] / b[0]) if b[0] > 0 else math.inf
    return min(max(0.0, least), most)


def _exp(log: Interval) -> Interval:
    """Geometric mean and its interval."""
    with np.errstate(over="ignore"):
        return Interval(float(np.exp(log.mean)), float(np.exp(log.low)), float(np.exp(log.high)), log.n)
