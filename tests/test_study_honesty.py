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
from loralign.compare import inference
from loralign.compare.curves import Curve
from loralign.compare.rates import Rate
from loralign.compare.report import collect
from loralign.compare.schedule import wanted
from loralign.compare.spec import Arm, Outcome, Spec, TaskSpec
from loralign.compare.statistics import Comparison, compare
from loralign.compare.verdict import _kind, summarise

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


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """p to within 0.003 instead of 0.001: a matter of time, not of the formulas."""
    monkeypatch.setattr(inference, "DRAWS", 2000)


def study(
    arms: Mapping[str, Shape], seeds: int, rng: np.random.Generator, centre: float = 0.0
) -> dict[str, Comparison]:
    """centre: of the grid, in its steps away from the best rate."""
    made = tuple(Arm(name, LORA, lr=1e-3) for name in arms)
    spec = Spec("simulated", TASK, made, Path(), steps=int(STEPS[-1]), seeds=seeds, baseline_seeds=12, ratio=RATIO)
    offset = centre + rng.uniform(-0.5, 0.5)
    noises: dict[int, np.ndarray] = {}
    done: dict[str, Outcome] = {}
    while todo := [t for t in wanted(spec, done) if t.key not in done]:
        for t in todo:
            noise = noises.setdefault(t.seed, shared_noise(rng))
            done[t.key] = one_run(arms[t.arm], t.index + offset, noise, rng)
    found = collect(spec, done)
    assert not found.edges and not found.missing
    curves = {name: [c for c in found.curves if c.arm == name] for name in arms}
    assert {name: len(own) for name, own in curves.items()} == {n: 12 if n == "lora" else seeds for n in arms}
    return compare(curves, "lora", rates=found.rates)


def kinds(arm: str, arms: Mapping[str, Shape], seeds: int, studies: int, seed: int = 0) -> list[str]:
    """What is said of an arm, study by study."""
    rng = np.random.default_rng(seed)
    return [_kind(False, 0, study(arms, seeds, rng)[arm]) for _ in range(studies)]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_names_for_one_method_are_not_told_apart(shape: str, seeds: int) -> None:
    f = SHAPES[shape]
    said = kinds("twin", {"lora": f, "full": lower(f, 0.18), "twin": f}, seeds, 100)
    assert said.count("no difference") >= 95


def test_an_effect_that_is_there_is_found() -> None:
    """The simulator has teeth: two steps' worth of 0.06 nats apart, they are not the same."""
    said = kinds("better", {"lora": flat, "full": lower(flat, 0.18), "better": lower(flat, 0.12)}, 3, 40)
    assert said.count("better") >= 30


@pytest.mark.parametrize(("faster", "verdict"), [(twice_as_fast, "better"), (twice_as_fast_then_level, "sooner")])
def test_a_method_that_is_twice_as_fast_is_found(faster: Callable[[Shape], Shape], verdict: str) -> None:
    arms = {"lora": falling, "full": lower(falling, 0.18), "quick": faster(falling)}
    rng = np.random.default_rng(1)
    found = [study(arms, 5, rng)["quick"] for _ in range(30)]
    assert sum(_kind(False, 0, c) == verdict for c in found) >= 26
    assert 0.45 < float(np.median([c.steps.mean for c in found])) < 0.58


def test_three_seeds_find_the_gap_to_full_fine_tuning() -> None:
    arms = {"lora": falling, "full": lower(falling, 0.18), "twin": falling, "other": falling}
    assert kinds("full", arms, 3, 40, seed=2).count("better") >= 38


def test_a_method_that_is_a_little_faster_is_not_made_up() -> None:
    """The simulator has teeth on this side, too: 3 % of the steps drown in the noise."""
    arms = {"lora": falling, "full": lower(falling, 0.18), "quick": lambda t: falling(1.03 * t)}
    assert kinds("quick", arms, 5, 40, seed=1).count("no difference") >= 30


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
    twin = next(a for a in summarise(curves).arms if a.arm == "twin")
    assert twin.kind == "no difference" and twin.comparison and twin.comparison.p == (1.0, 1.0)
    assert twin.effect and twin.effect.better == pytest.approx(0.5, abs=0.05)
