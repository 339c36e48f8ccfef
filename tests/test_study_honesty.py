"""Simulated studies through the real statistics: what is the same is called the same, what is faster is found.

A run's loss is a curve of the step, plus a parabola over the learning rate, plus noise. The size of the noise follows
what was measured with SmolLM2 (differences under about 0.04 nats between seeds): 0.025 nats that all arms of a seed
share (data order), a shared random walk along the run, and 0.015 nats of each run's own, with 0.005 from one evaluation
to the next. A factor of 3 beside the best rate costs 0.06 nats. Rates are chosen per arm on one noisy seed, as in a
study, and the best rate lies anywhere between the points of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from loralign import LoralignError
from loralign.compare import statistics
from loralign.compare.rates import Rate, choose_rate
from loralign.compare.statistics import Curve
from loralign.compare.verdict import ArmResult, StudyResult, summarise

STEPS = np.arange(25.0, 301.0, 25.0)
RATIO = 3.0
Shape = Callable[[np.ndarray], np.ndarray]


def falling(t: np.ndarray) -> np.ndarray:
    """Still falling at the end, like SmolLM2 on a new language: 3.21 nats at step 100, 2.80 at 300."""
    return 2.2 + 3.3 * (1 + t / 12) ** -0.53


def flat(t: np.ndarray) -> np.ndarray:
    """Almost flat at the end, like a small supervised task."""
    return 2.7 + 2 * np.exp(-t / 60)


SHAPES = {"falling": falling, "flat": flat}


def twice_as_fast(f: Shape) -> Shape:
    return lambda t: f(2 * t)


def twice_as_fast_then_level(f: Shape) -> Shape:
    """Gets to lora's final loss at half of the steps and stays there: final losses tie."""
    return lambda t: f(np.minimum(2 * t, STEPS[-1]))


def lower(f: Shape, nats: float) -> Shape:
    return lambda t: f(t) - nats


def one_run(f: Shape, arm: str, index: float, seed: int, shared: np.ndarray, rng: np.random.Generator) -> Curve:
    """index: steps of the grid away from the best rate."""
    own = rng.normal(0, 0.015) + rng.normal(0, 0.005, len(STEPS))
    losses = f(STEPS) + 0.06 * index**2 + shared + own
    seconds = tuple(2 + 0.5 * STEPS)
    steps, curve = tuple(int(s) for s in STEPS), tuple(losses.tolist())
    return Curve(arm, 1e-3 * RATIO**index, seed, steps, seconds, curve, curve[-1], min(curve), diverged=index > 2.3)


def shared_noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.025) + rng.normal(0, 0.004, len(STEPS)).cumsum()[::-1]


def study(arms: Mapping[str, Shape], seeds: int, rng: np.random.Generator, centre: float = 0.0) -> StudyResult:
    """centre: of the grid, in its steps away from the best rate."""
    grid = centre + rng.uniform(-0.5, 0.5) + np.arange(-2, 3)
    before, noises = shared_noise(rng), [shared_noise(rng) for _ in range(seeds)]
    rates, curves = [], []
    for arm, f in arms.items():
        trials = {r.lr: (r, i) for i in grid for r in [one_run(f, arm, i, -1, before, rng)]}
        tried = [Rate(arm, lr, run.final, diverged=run.diverged) for lr, (run, _) in trials.items()]
        best = choose_rate(tried)
        assert best
        rates += tried
        curves += [one_run(f, arm, trials[best.lr][1], s, noise, rng) for s, noise in enumerate(noises)]
    return summarise(curves, rates)


def line(result: StudyResult, arm: str) -> ArmResult:
    return next(a for a in result.arms if a.arm == arm)


def twins(shape: str, seeds: int, studies: int) -> tuple[str, ...]:
    """What is said about a second name for lora, study by study."""
    f, rng = SHAPES[shape], np.random.default_rng(0)
    arms = {"lora": f, "full": lower(f, 0.18), "twin": f}
    return tuple(line(study(arms, seeds, rng), "twin").kind for _ in range(studies))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_names_for_one_method_are_not_told_apart(shape: str, seeds: int) -> None:
    said = twins(shape, seeds, 200)
    assert said.count("no difference") >= 0.95 * len(said)


def test_without_the_choice_of_the_rate_they_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator has teeth: a plain paired t-test, corrected by Holm, fails the same demand."""
    monkeypatch.setattr(statistics, "RATE_CHOICE", 0.0)
    said = twins("flat", 10, 150)
    assert said.count("no difference") < 0.95 * len(said)


@pytest.mark.parametrize("faster", [twice_as_fast, twice_as_fast_then_level])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_method_that_is_twice_as_fast_is_found(shape: str, faster: Callable[[Shape], Shape]) -> None:
    f, rng = SHAPES[shape], np.random.default_rng(1)
    arms = {"lora": f, "full": lower(f, 0.18), "quick": faster(f)}
    found = [line(study(arms, 5, rng), "quick") for _ in range(100)]
    right = [a for a in found if a.kind in ("better", "sooner") and a.comparison and a.comparison.speed_sign > 0]
    assert len(right) >= 90
    shares = [a.comparison.steps.mean for a in right if a.comparison]
    assert 0.45 < float(np.median(shares)) < 0.58
    assert all("reaches the final loss of `lora` in" in a.sentence for a in right)


def test_three_seeds_find_the_gap_to_full_fine_tuning() -> None:
    rng = np.random.default_rng(2)
    arms = {"lora": falling, "full": lower(falling, 0.18), "twin": falling, "other": falling}
    found = [line(study(arms, 3, rng), "full").kind for _ in range(100)]
    assert found.count("better") >= 90


def test_a_best_rate_at_the_edge_is_flagged() -> None:
    rng = np.random.default_rng(3)
    for centre, side in ((-2.5, "high"), (2.5, "low")):
        result = study({"lora": falling, "full": lower(falling, 0.18)}, 2, rng, centre)
        assert all(any(f"at the {side} edge" in flag for flag in a.flags) for a in result.arms)
    inside = study({"lora": falling, "full": lower(falling, 0.18)}, 3, rng)
    assert not any("edge" in flag for a in inside.arms for flag in a.flags)


@pytest.mark.parametrize("lost", [1, -1])
def test_an_arm_with_fewer_or_more_trials_is_refused(lost: int) -> None:
    counts = {"lora": 5, "full": 5, "short": 5 - lost}
    rates = [Rate(arm, 10.0**-i, 2.0) for arm, n in counts.items() for i in range(n)]
    with pytest.raises(LoralignError, match=f"'short' had {5 - lost}.*the others 5"):
        summarise([], rates)


def test_runs_that_are_equal_to_the_bit_do_not_differ() -> None:
    noise = [shared_noise(np.random.default_rng(s)) for s in range(3)]
    curves = [
        one_run(falling, arm, 0, s, noise[s], np.random.default_rng(s)) for arm in ("lora", "twin") for s in range(3)
    ]
    twin = line(summarise(curves), "twin")
    assert twin.kind == "no difference" and twin.comparison and twin.comparison.p == (1.0, 1.0)
