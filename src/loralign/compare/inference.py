"""Tests and estimates of a study's final losses, as pure functions of numbers; what they are applied to: statistics.py.

A sample is one arm's final losses over seeds: n values with variance s², and one rate that was chosen on k seeds. The
arms' means are compared with the shared baseline's (Dunnett's setting), every arm with its own variance (Welch):

    t_i = (ȳ_0 − ȳ_i) / √(v_0 + v_i),    v = s̃² (1/n + κ/k),    κ = RATE_CHOICE

κ stands for the choice of the rate. Where two rates truly differ by δ, the worse one is taken with p = Φ(−δ√k/(√2 σ)),
so that two names for one method end up apart with a variance of at most 2 · 0.3 σ²/k; taking the lower of rates within
one standard error raises that to 2 · 0.8 at worst (p = Φ((1 − δ√k/σ)/√2)), for one δ only. RATE_CHOICE lies between;
tests/test_inference_sizes.py measures what that leaves of the nominal level.

Variances are moderated (Smyth 2004, limma's eBayes): s²_i ~ σ²_i χ²/d_i and 1/σ²_i ~ χ²_{d0}/(d0 s0²) give

    s̃²_i = (d0 s0² + d_i s²_i) / (d0 + d_i)    with min(d0 + d_i, Σd) degrees of freedom,

d0 and s0² by the moments of log s². The tests of a family are corrected by a step-down maximum over its arms (Westfall
and Young 1993), its null distribution by a parametric bootstrap of the means and variances above; arms of different
freedom are made comparable by their own t's tail. An arm's p depends on its own family alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma, stdtr, stdtrit

RATE_CHOICE = 0.7
DRAWS = 20_000
TINY = 1e-5
"""Of the median variance: no arm counts as quieter than this."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """n final losses: mean, variance, its degrees of freedom; k: seeds on which the rate was chosen."""

    mean: float
    variance: float
    df: float
    n: int
    k: int = 1

    @property
    def error2(self) -> float:
        """v, the variance of the mean, the choice of the rate included."""
        return self.variance * (1 / self.n + RATE_CHOICE / self.k)


def sample(values: Sequence[float], k: int = 1) -> Sample:
    x = np.asarray(values, dtype=float)
    return Sample(float(x.mean()), float(x.var(ddof=1)), x.size - 1, x.size, k)


# ----------------------------------------------------------------------------------------------------------- variances


def moderated(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with s̃² and its degrees of freedom; where all are equal to the bit, variances stay 0."""
    s2, d = np.array([s.variance for s in samples]), np.array([float(s.df) for s in samples])
    if len(samples) < 2 or not s2.any():
        return list(samples)
    s2 = np.maximum(s2, TINY * float(np.median(s2[s2 > 0])))
    d0, s02 = _prior(s2, d)
    free = np.minimum(d0 + d, d.sum())
    new = np.full(len(s2), s02) if math.isinf(d0) else (d0 * s02 + d * s2) / (d0 + d)
    return [replace(s, variance=float(v), df=float(f)) for s, v, f in zip(samples, new, free, strict=True)]


def _prior(s2: Array, d: Array) -> tuple[float, float]:
    """d0 and s0² by the mean and variance of log s²; d0 infinite, s0² pooled where chance alone spreads them so."""
    e = np.log(s2) - digamma(d / 2) + np.log(d / 2)
    excess = float(e.var(ddof=1) - polygamma(1, d / 2).mean())
    if excess <= 0:
        return math.inf, float((d * s2).sum() / d.sum())
    half = trigamma_inverse(excess)
    return 2 * half, float(np.exp(e.mean() + digamma(half) - math.log(half)))


def trigamma_inverse(y: float) -> float:
    """x > 0 with ψ′(x) = y, by Newton's method on 1/ψ′."""
    if y > 1e7:
        return 1 / math.sqrt(y)
    x = 0.5 + 1 / y
    for _ in range(60):
        tri = float(polygamma(1, x))
        step = tri * (1 - tri / y) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-10:
            break
    return x


# --------------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Difference:
    """baseline − arm: mean, simultaneous interval, p corrected within the family."""

    mean: float
    low: float
    high: float
    p: float


def against_baseline(arms: Sequence[Sample], base: Sample, level: float) -> list[Difference]:
    """One family: every arm's difference, p by step-down maxima, intervals that hold together with 1 − level."""
    if not arms:
        return []
    error = np.array([math.sqrt(a.error2 + base.error2) for a in arms])
    mean = np.array([base.mean - a.mean for a in arms])
    df = np.array([welch(a, base) for a in arms])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    seen = 2 * stdtr(df, -t)
    null = _null(arms, base, df)
    p = _step_down(seen, null)
    half = stdtrit(df, 1 - float(np.quantile(null.min(axis=1), level)) / 2) * error
    lines = zip(mean, half, p, strict=True)
    return [Difference(float(m), float(m - h), float(m + h), float(q)) for m, h, q in lines]


def welch(a: Sample, b: Sample) -> float:
    """Satterthwaite's degrees of freedom of ȳ_b − ȳ_a."""
    total = a.error2 + b.error2
    return total**2 / (a.error2**2 / a.df + b.error2**2 / b.df) if total else float(a.df + b.df)


def _null(arms: Sequence[Sample], base: Sample, df: Array) -> Array:
    """(DRAWS, arms) tail probabilities of t where nothing differs, the baseline's mean and variance shared."""
    draw = np.random.default_rng(0)
    variance = np.array([base.error2, *(a.error2 for a in arms)])
    free = np.array([float(base.df), *(float(a.df) for a in arms)])
    means = draw.standard_normal((DRAWS, len(variance))) * np.sqrt(variance)
    found = variance * draw.chisquare(free, (DRAWS, len(free))) / free
    total = found[:, :1] + found[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(total > 0, np.abs(means[:, :1] - means[:, 1:]) / np.sqrt(total), 0.0)
    return 2 * np.asarray(stdtr(df, -t))


def _step_down(seen: Array, null: Array) -> Array:
    """p of the j-th smallest: how often the smallest of it and all larger ones is as small; never falling in j."""
    order = np.argsort(seen, kind="stable")
    least = np.minimum.accumulate(null[:, order[::-1]], axis=1)[:, ::-1]
    raw = (1 + (least <= seen[order]).sum(axis=0)) / (1 + len(null))
    adjusted = np.empty(len(seen))
    adjusted[order] = np.maximum.accumulate(np.where(seen[order] == 0, 0.0, raw))
    return adjusted


def paired(differences: Sequence[Sample]) -> list[tuple[float, float]]:
    """t's error and two-sided p of mean 0 for samples of differences within seeds.

    All of them hold the same runs of the baseline, so many arms know no more of its spread than one: each keeps its own
    degrees of freedom, and its own variance where the moderated one is smaller.
    """
    found = []
    for own, quiet in zip(differences, moderated(differences), strict=True):
        d = replace(own, variance=max(own.variance, quiet.variance))
        error = math.sqrt(d.error2)
        p = 2 * float(stdtr(d.df, -abs(d.mean) / error)) if error else float(d.mean == 0)
        found.append((error, p))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: max over smaller p_(j) of (m − j) · p_(j), at most 1; in the order given."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted
