"""Tests and estimates by examples that were worked out by hand or by an independent way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats
from scipy.special import polygamma

from loralign.compare import inference
from loralign.compare.hierarchy import effects
from loralign.compare.inference import (
    DRAWS,
    RATE_CHOICE,
    Sample,
    against_baseline,
    holm,
    moderated,
    paired,
    sample,
    trigamma_inverse,
    welch,
)


def one(mean: float, variance: float = 1.0, df: float = 1e9, n: int = 3, k: int = 3) -> Sample:
    return Sample(mean, variance, df, n, k)


def test_a_sample_and_its_error() -> None:
    s = sample([1.0, 2.0, 3.0], k=3)
    assert (s.mean, s.variance, s.df, s.n) == (2.0, 1.0, 2, 3)
    assert s.error2 == pytest.approx(1 / 3 + RATE_CHOICE / 3)
    assert sample([1.0, 2.0, 3.0]).error2 == pytest.approx(1 / 3 + RATE_CHOICE)


@pytest.mark.parametrize("y", [1e-6, 0.1, 1.0, 4.0, 100.0, 1e8])
def test_trigamma_inverse(y: float) -> None:
    assert float(polygamma(1, trigamma_inverse(y))) == pytest.approx(y, rel=1e-6)


def test_moderation_finds_the_prior_that_made_the_variances() -> None:
    """5,000 arms with σ² = d0 s0² / χ²_{d0}: the estimates come back, s̃² is as the docstring says."""
    draw, d0, s02 = np.random.default_rng(0), 4.0, 0.25
    true = d0 * s02 / draw.chisquare(d0, 5000)
    s2 = true * draw.chisquare(2, 5000) / 2
    found = moderated([one(0, float(v), 2) for v in s2])
    assert found[0].df == pytest.approx(2 + d0, rel=0.15)
    s02_found = (found[0].variance * found[0].df - 2 * s2[0]) / (found[0].df - 2)
    assert s02_found == pytest.approx(s02, rel=0.1)
    assert found[7].variance == pytest.approx(((found[7].df - 2) * s02_found + 2 * s2[7]) / found[7].df)


def test_equal_spreads_are_pooled_and_the_freedom_is_the_sum() -> None:
    found = moderated([one(0, 1.0, 2), one(0, 1.1, 2), one(0, 0.9, 11)])
    assert [s.variance for s in found] == pytest.approx([(2 + 2.2 + 9.9) / 15] * 3)
    assert [s.df for s in found] == [15.0] * 3  # never more than there is


def test_moderation_at_its_ends() -> None:
    still = [one(0, 0.0, 2), one(1, 0.0, 2)]
    assert moderated(still) == still
    quiet, loud, _ = moderated([one(0, 0.0, 2), one(0, 1.0, 2), one(0, 1.0, 2)])
    assert 0 < quiet.variance < loud.variance
    assert moderated(still[:1]) == still[:1]
    assert all(s.variance > 0 for s in moderated([one(0, 0.0, 2), one(0, 0.0, 2), one(0, 1.0, 2)]))  # most are equal


def test_moderation_by_its_moments() -> None:
    """d0 of ψ′(d0/2) = var(log s²) − ψ′(d/2), the variance of n values over n − 1, found here by bisection."""
    s2, d = np.array([0.01, 0.3, 2.0, 90.0]), 4.0
    found = moderated([one(0, v, d) for v in s2])
    excess = np.log(s2).var(ddof=1) - special.polygamma(1, d / 2)
    d0 = 2 * optimize.brentq(lambda half: special.polygamma(1, half) - excess, 1e-3, 1e3)
    assert [s.df for s in found] == pytest.approx([min(d0 + d, 4 * d)] * 4)
    log_s02 = np.log(s2).mean() - special.digamma(d / 2) + math.log(d / 2) + special.digamma(d0 / 2) - math.log(d0 / 2)
    assert [s.variance for s in found] == pytest.approx((d0 * math.exp(log_s02) + d * s2) / (d0 + d))


def test_welch_by_hand() -> None:
    """Equal variances and sizes: 2(n − 1); a baseline without error: the arm's own."""
    assert welch(one(0, 1, 2), one(0, 1, 2)) == pytest.approx(4)
    assert welch(one(0, 1, 2), one(0, 1e-12, 11)) == pytest.approx(2)
    assert welch(one(0, 3, 2), one(0, 1, 8)) == pytest.approx((3 + 1) ** 2 / (3**2 / 2 + 1**2 / 8))


def test_one_arm_with_known_variances_is_a_z_test() -> None:
    (found,) = against_baseline([one(0.0)], one(1.5), 0.05)
    error = math.sqrt(2 * (1 / 3 + RATE_CHOICE / 3))
    assert found.mean == 1.5
    assert found.p == pytest.approx(2 * stats.norm.sf(1.5 / error), abs=0.01)
    assert found.high - 1.5 == pytest.approx(1.96 * error, rel=0.03)
    assert 1.5 - found.low == pytest.approx(found.high - 1.5)


def test_the_largest_of_a_family_is_dunnetts() -> None:
    """Known variances, 5 arms: P(max |Z_i − Z_0| > t) = 1 − ∫ φ(z) [Φ(z + t√2) − Φ(z − t√2)]⁵ dz."""

    def tail(t: float) -> float:
        inner = lambda z: stats.norm.pdf(z) * (stats.norm.cdf(z + t) - stats.norm.cdf(z - t)) ** 5  # noqa: E731
        return 1 - float(integrate.quad(inner, -8, 8)[0])

    error = math.sqrt(1 / 3 + RATE_CHOICE / 3)
    for far in (1.0, 2.0, 2.6):
        found = against_baseline([one(-far * error), *(one(0.0) for _ in range(4))], one(0.0), 0.05)
        assert found[0].p == pytest.approx(tail(far), abs=0.012)
    half = (found[0].high - found[0].low) / 2 / error
    assert tail(half) == pytest.approx(0.05, abs=0.006)


def test_students_tails_where_freedom_is_scarce() -> None:
    """A baseline without error: the arm's t has its own 2 degrees of freedom, p = 1 − t/√(2 + t²)."""
    base = replace(one(0.0, 1e-12, 5), n=12)
    (found,) = against_baseline([one(-3.0, 1.0, 2)], base, 0.05)
    t = 3.0 / math.sqrt(1 / 3 + RATE_CHOICE / 3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=0.006)


def test_step_down_helps_the_second() -> None:
    """Beside an arm that is far away, the next is corrected for one arm less; the order given does not matter."""
    error = math.sqrt(1 / 3 + RATE_CHOICE / 3)
    arms = [one(-2.6 * error), one(-50.0), one(0.3 * error)]
    both = against_baseline(arms, one(0.0), 0.05)
    alone = against_baseline([arms[0], arms[2]], one(0.0), 0.05)
    assert both[0].p == pytest.approx(alone[0].p, abs=0.01) and both[1].p < 1e-3 and both[2].p > 0.5
    back = against_baseline(arms[::-1], one(0.0), 0.05)
    assert [d.p for d in back[::-1]] == pytest.approx([d.p for d in both], abs=0.01)
    assert both[0].p <= both[2].p  # never falling
    (certain,) = against_baseline([one(-20.0)], one(0.0), 0.05)
    assert certain.p == 1 / (1 + DRAWS)  # no fewer than the draws can tell


def test_arms_without_noise() -> None:
    still = [one(1.0, 0.0, 2), one(0.5, 0.0, 2)]
    same, lower = against_baseline(still, one(1.0, 0.0, 11), 0.02)
    assert same.p == 1.0 and lower.p == 0.0 and lower.mean == 0.5
    assert against_baseline([], one(1.0), 0.02) == []


def test_paired_by_hand() -> None:
    """d = 0.1, 0.2, 0.3 alone: 2 degrees of freedom, p = 1 − t/√(2 + t²)."""
    ((error, p),) = paired([sample([0.1, 0.2, 0.3])])
    t = 0.2 / (0.1 * math.sqrt(1 / 3 + RATE_CHOICE))
    assert error == pytest.approx(0.2 / t) and p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert [p for _, p in paired([sample([0.0, 0.0])])] == [1.0] and paired([sample([0.1, 0.1])])[0][1] == 0.0


def test_paired_samples_keep_their_own_freedom() -> None:
    """Three arms of 3 seeds: the quiet one is judged by the moderated variance, the loud one by its own, all by 2."""
    quiet, usual, loud = [0.2, 0.21, 0.19], [0.1, 0.2, 0.3], [-0.2, 0.2, 0.6]
    found = paired([sample(x) for x in (quiet, usual, loud)])
    errors = [error for error, _ in found]
    assert errors[0] > 1.5 * 0.01 * math.sqrt(1 / 3 + RATE_CHOICE)
    assert errors[2] == pytest.approx(0.4 * math.sqrt(1 / 3 + RATE_CHOICE))
    for error, p in found:
        t = 0.2 / error
        assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


# ---------------------------------------------------------------------------------------------- the model of all arms


def test_two_arms_by_an_independent_integral() -> None:
    """One arm and the baseline, v = 0.1 each: the posterior of α_0 − α_1 is N(d τ²/(τ² + v), …), mixed over τ by
    p(d | τ) on the grid; d = 0.6."""
    v, d = 0.1, 0.6
    s = Sample(0.0, v / (1 / 3 + RATE_CHOICE / 3), 1e9, 3, 3)
    found = effects([{"lora": replace(s, mean=d), "x": s}], "lora")["x"]
    scale = max(d / 2, math.sqrt(v))
    tau = scale * np.geomspace(0.02, 5, 4000)
    weight = tau * stats.norm.pdf(d, scale=np.sqrt(2 * (tau**2 + v)))
    shrunken = d * tau**2 / (tau**2 + v)
    sd = np.sqrt(2 * tau**2 * v / (tau**2 + v))
    mean = float((weight * shrunken).sum() / weight.sum())
    better = float((weight * stats.norm.cdf(shrunken / sd)).sum() / weight.sum())
    assert found.mean == pytest.approx(mean, abs=0.05) and found.better == pytest.approx(better, abs=0.05)
    assert 0 < found.mean < d and found.low < found.mean < found.high


def test_the_best_of_many_equal_arms_is_not_believed() -> None:
    draw, best = np.random.default_rng(1), []
    for _ in range(4):
        arms = {f"arm {i}": one(float(draw.normal(0, math.sqrt(1 / 3))), 1.0, 50) for i in range(15)}
        tasks = [{"lora": one(0.0, 1.0, 50, n=12), **arms}]
        least = min(arms, key=lambda a: arms[a].mean)
        best.append((-arms[least].mean, effects(tasks, "lora")[least].mean))
    raw, shrunken = np.mean(best, axis=0)
    assert raw > 0.8 and shrunken < 0.4 * raw


def test_what_differs_is_kept_and_several_tasks_add_up() -> None:
    def task(shift: float, gain: float) -> dict[str, Sample]:
        still = [one(shift + x, 0.01, 50) for x in (0.0, -gain, 1.0, 0.5, -1.0)]
        return dict(zip(("lora", "x", "a", "b", "c"), still, strict=True))

    single = effects([task(0.0, 0.3)], "lora")["x"]
    assert single.mean == pytest.approx(0.3, abs=0.05) and single.better > 0.97
    agreeing = effects([task(t, 0.3) for t in (0.0, 5.0, 2.0)], "lora")["x"]
    torn = effects([task(t, g) for t, g in ((0.0, 0.3), (5.0, -0.5), (2.0, 1.1))], "lora")["x"]
    assert agreeing.mean == pytest.approx(0.3, abs=0.05)
    assert agreeing.high - agreeing.low < single.high - single.low < torn.high - torn.low
    assert effects([{"x": one(0.0)}], "lora") == {} and set(effects([task(0, 0)], "lora")) == {"x", "a", "b", "c"}


def test_a_spread_that_is_hardly_known_says_less() -> None:
    """Two arms alike but for what is known of the second's variance: its interval is wider, its effect weaker."""
    arms = {"lora": one(0.0, 0.01, 50, n=12), **{f"arm {i}": one(0.2 * i, 0.01, 50) for i in range(-4, 4)}}
    sure, unsure = (effects([{**arms, "x": one(-0.5, 0.3, df)}], "lora")["x"] for df in (500, 2))
    assert unsure.high - unsure.low > 1.15 * (sure.high - sure.low)


def test_the_same_samples_give_the_same_answer() -> None:
    arms = [one(0.1 * i, 1.0, 4) for i in range(4)]
    assert against_baseline(arms, one(0.0), 0.02) == against_baseline(arms, one(0.0), 0.02)
    assert inference.DRAWS >= 20_000  # p = 0.02 to within 0.001
