"""Simulated studies: what is the same is called the same, what is faster is found, what is unsure is flagged.

Everything but the training is real: the engine says which trials to run, gives rates up, adds rates, chooses, and the
statistics judge what came out.

A run's loss is a curve of the step, plus a parabola over the learning rate, plus noise. The size of the noise follows
what was measured with SmolLM2 (differences under about 0.04 nats between seeds): 0.025 nats that all arms of a seed
share (data order), a shared random walk along the run, and 0.015 nats of each run's own, with 0.005 from one evaluation
to the next. A factor of 3 beside the best rate costs 0.06 nats. The best rate lies anywhere between grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from loralign import LoralignError, build
from loralign.compare import statistics
from loralign.compare.rates import Rate
from loralign.compare.report import collect
from loralign.compare.spec import Arm, Outcome, Spec, TaskSpec
from loralign.compare.statistics import Curve
from loralign.compare.study import wanted
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


LORA = build("lora")
TASK = TaskSpec("text", "train", "valid", "test")
SHAPES = {"falling": falling, "flat": flat}


def twice_as_fast(f: Shape) -> Shape:
    return lambda t: f(2 * t)


def twice_as_fast_then_level(f: Shape) -> Shape:
    """Gets to lora's final loss at half of the steps and stays there: final losses tie."""
    return lambda t: f(np.minimum(2 * t, STEPS[-1]))


def lower(f: Shape, nats: float) -> Shape:
    return lambda t: f(t) - nats


def one_run(f: Shape, index: float, shared: np.ndarray, rng: np.random.Generator) -> Outcome:
    """index: steps of the grid away from the best rate."""
    own = rng.normal(0, 0.015) + rng.normal(0, 0.005, len(STEPS))
    losses = tuple((f(STEPS) + 0.06 * index**2 + shared + own).tolist())
    steps = tuple(int(s) for s in STEPS)
    return Outcome(steps, tuple((2 + 0.5 * STEPS).tolist()), losses, diverged=index > 2.3, step_tokens=4096)


def shared_noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.025) + rng.normal(0, 0.004, len(STEPS)).cumsum()[::-1]


def study(
    arms: Mapping[str, Shape], seeds: int, rng: np.random.Generator, centre: float = 0.0, extensions: int = 3
) -> StudyResult:
    """centre: of the grid, in its steps away from the best rate."""
    made = tuple(Arm(name, LORA, lr=1e-3) for name in arms)
    spec = Spec("simulated", TASK, made, Path(), steps=int(STEPS[-1]), seeds=seeds, extensions=extensions, ratio=RATIO)
    offset = centre + rng.uniform(-0.5, 0.5)
    noises: dict[int, np.ndarray] = {}
    done: dict[str, Outcome] = {}
    while todo := [t for t in wanted(spec, done) if t.key not in done]:
        for t in todo:
            noise = noises.setdefault(t.seed, shared_noise(rng))
            done[t.key] = one_run(arms[t.arm], t.index + offset, noise, rng)
    found = collect(spec, done)
    return summarise(found.curves, found.rates)


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


def test_a_method_that_is_a_little_faster_is_not_made_up() -> None:
    """The simulator has teeth on this side, too: 3 % of the steps drown in the noise."""
    rng = np.random.default_rng(1)
    arms = {"lora": falling, "full": lower(falling, 0.18), "quick": lambda t: falling(1.03 * t)}
    found = [line(study(arms, 5, rng), "quick").kind for _ in range(60)]
    assert found.count("no difference") >= 45


def test_a_best_rate_at_the_edge_is_flagged() -> None:
    rng, arms = np.random.default_rng(3), {"lora": falling, "full": lower(falling, 0.18)}
    for centre, side, extensions in ((-2.6, "high", 0), (2.6, "low", 0), (-6.6, "high", 3), (6.6, "low", 3)):
        result = study(arms, 2, rng, centre, extensions)
        assert all(any(f"at the {side} edge" in flag for flag in a.flags) for a in result.arms)
    for centre in (0, -2.6, 2.6):  # inside from the start, or by further rates for every arm
        found = study(arms, 3, rng, centre)
        assert not any("edge" in flag for a in found.arms for flag in a.flags)


@pytest.mark.parametrize("lost", [1, -1])
def test_an_arm_with_fewer_or_more_trials_is_refused(lost: int) -> None:
    counts = {"lora": 5, "full": 5, "short": 5 - lost}
    rates = [Rate(arm, 10.0**-i, 2.0) for arm, n in counts.items() for i in range(n)]
    with pytest.raises(LoralignError, match=f"'short' had {5 - lost}.*the others 5"):
        summarise([], rates)


def test_runs_that_are_equal_to_the_bit_do_not_differ() -> None:
    steps = tuple(int(s) for s in STEPS)
    curves = []
    for seed in range(3):
        run = one_run(falling, 0, shared_noise(np.random.default_rng(seed)), np.random.default_rng(seed))
        curves += [
            Curve(arm, 1e-3, seed, steps, run.seconds, run.losses, run.losses[-1], min(run.losses))
            for arm in ("lora", "twin")
        ]
    twin = line(summarise(curves), "twin")
    assert twin.kind == "no difference" and twin.comparison and twin.comparison.p == (1.0, 1.0)
