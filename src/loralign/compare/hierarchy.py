"""All arms at once: effects shrunken towards each other, and how likely each arm is better than the baseline.

    ȳ_at = M_t + α_a + γ_at + e_at,    α ~ N(0, τ²),  γ ~ N(0, ω²) where there are several tasks,  e_at ~ N(0, v_at)

ȳ_at: mean final loss of arm a on task t; the baseline is one of the arms, the control (`full`) is none of them. v_at
(`Sample.error2`) is drawn from its scaled inverse χ², M_t has a flat prior, τ and ω have flat ones on a grid. The
effect of an arm is α_0 − α_a: the best of many arms is not taken at its face value, and needs no correction for their
number.
Draws come from a generator of their own: the same samples give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loralign.compare.inference import Array, Sample

DRAWS, GRID = 800, 24
SMALLEST = 1e-12


@dataclass(frozen=True)
class Effect:
    """baseline − arm: posterior mean and 95 % interval; better: the probability that it is above 0."""

    mean: float
    low: float
    high: float
    better: float


@dataclass(frozen=True)
class Overall:
    """One arm over tasks. differences: final loss, arm − baseline, by task; effect: baseline − arm, shrunken; none for
    the control, which is no draw from the arms."""

    arm: str
    differences: Mapping[str, float]
    effect: Effect | None


def effects(tasks: Sequence[Mapping[str, Sample]], baseline: str) -> dict[str, Effect]:
    """Of every arm but the baseline, over all tasks on which it and the baseline ran."""
    tasks = [t for t in tasks if baseline in t and len(t) > 1]
    arms = [baseline, *dict.fromkeys(a for t in tasks for a in t if a != baseline)]
    cells = [(t, arms.index(a), s) for t, task in enumerate(tasks) for a, s in task.items()]
    if not cells:
        return {}
    at = np.array([(t, len(tasks) + a) for t, a, _ in cells])
    x = np.zeros((len(cells), len(tasks) + len(arms)))
    for column in at.T:
        x[np.arange(len(cells)), column] = 1.0
    alpha = _posterior(np.array([s.mean for *_, s in cells]), x, [s for *_, s in cells], len(tasks))
    found = {}
    for i, arm in enumerate(arms[1:], 1):
        d = alpha[:, 0] - alpha[:, i]
        low, high = np.quantile(d, (0.025, 0.975))
        better = float((d > 0).mean() + 0.5 * (d == 0).mean())
        found[arm] = Effect(float(d.mean()), float(low), float(high), better)
    return found


def _posterior(y: Array, x: Array, cells: Sequence[Sample], tasks: int) -> Array:
    """(DRAWS, arms) draws of α. Each draws variances, then (τ, ω) from the grid, then α given all of these."""
    draw = np.random.default_rng(0)
    df = np.array([s.df for s in cells])
    v0 = np.array([s.error2 for s in cells])
    within = y - (x[:, :tasks] @ (x[:, :tasks].T @ y / x[:, :tasks].sum(0)))
    scale = max(float(within.std()), math.sqrt(float(v0.mean())), 1e-9)
    tau = scale * np.geomspace(0.02, 5, GRID)
    omega = scale * np.geomspace(0.02, 5, GRID // 2) if tasks > 1 else np.zeros(1)
    grid = np.array([(a, b) for a in tau for b in omega])
    flat = np.log(grid[:, 0]) + (np.log(grid[:, 1]) if tasks > 1 else 0.0)
    made = np.empty((DRAWS, x.shape[1] - tasks))
    for i in range(DRAWS):
        v = np.maximum(v0 * df / draw.chisquare(df), SMALLEST * scale**2)
        precision, b, logp = _given(within, x, v, grid, tasks)
        p = np.exp(logp + flat - (logp + flat).max())
        j = int(draw.choice(len(grid), p=p / p.sum()))
        root = np.linalg.cholesky(precision[j])
        mean = np.linalg.solve(precision[j], b[j])
        made[i] = (mean + np.linalg.solve(root.T, draw.standard_normal(len(mean))))[tasks:]
    return made


def _given(y: Array, x: Array, v: Array, grid: Array, tasks: int) -> tuple[Array, Array, Array]:
    """Posterior precision, precision · mean of (M, α), and log p(y | v, τ, ω) for every (τ, ω), up to a constant."""
    w = 1 / (v + grid[:, 1:] ** 2)
    precision = np.einsum("ci,gc,cj->gij", x, w, x)
    arms = np.arange(tasks, x.shape[1])
    precision[:, arms, arms] += 1 / grid[:, :1] ** 2
    b = (w * y) @ x
    mean = np.linalg.solve(precision, b[..., None])[..., 0]
    fit = (w * y * y).sum(1) - (b * mean).sum(1)
    log_det = np.linalg.slogdet(precision)[1] - np.log(w).sum(1) + 2 * len(arms) * np.log(grid[:, 0])
    return precision, b, -0.5 * (log_det + fit)
