"""The study's schedule and store, with a made-up runner: nothing is lost, nothing runs twice, edges are chased."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import warm
from loralign import LoralignError, build
from loralign.compare.spec import Arm, Budget, Outcome, Spec, TaskSpec, Trial
from loralign.compare.store import Store
from loralign.compare.study import in_order, rate_trials, should_stop, wanted, work

TASK = TaskSpec("text", "a", "b", "c")


def spec(folder: Path, arms: tuple[str, ...] = ("lora", "pissa"), **changes: object) -> Spec:
    made = tuple(Arm(n, build(n), lr=1e-3) for n in arms)
    fields: dict[str, object] = {"steps": 4, "eval_every": 2, "rates": 3, "seeds": 2, "extensions": 2, **changes}
    return Spec("toy", TASK, made, folder, **fields)  # type: ignore[arg-type]


def runner(best: dict[str, int], log: list[str] | None = None, delay: float = 0.0) -> Callable[..., Outcome]:
    """Loss is a parabola over the grid index with its minimum at `best[arm]`."""

    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        if log is not None:
            log.append(trial.key)
        time.sleep(delay)
        final = 1.0 + 0.1 * (trial.index - best[trial.arm]) ** 2 + 0.001 * trial.seed
        pruned = report(2, final + 1)
        return Outcome((2, 4), (0.1, 0.2), (final + 1, final), pruned=pruned, total_s=0.2)

    return run


def test_equal_trials_and_seeds(tmp_path: Path) -> None:
    log: list[str] = []
    assert work(spec(tmp_path), runner({"lora": 0, "pissa": 0}, log))
    rates = [k for k in log if k.startswith("rate")]
    assert len(rates) == 6 and len({k.split("/")[1] for k in rates}) == 2
    assert sorted(k for k in log if k.startswith("seed")) == [
        f"seed/{a}/+0/{s}" for a in ("lora", "pissa") for s in (0, 1)
    ]
    assert work(spec(tmp_path), runner({"lora": 0, "pissa": 0}, log)) and len(log) == 10  # nothing runs twice


def test_one_rate_for_every_arm_when_one_is_at_its_edge(tmp_path: Path) -> None:
    study = spec(tmp_path, prune=False)
    log: list[str] = []
    work(study, runner({"lora": 2, "pissa": 0}, log))
    per_arm = {a: sorted(k.split("/")[2] for k in log if k.startswith(f"rate/{a}/")) for a in ("lora", "pissa")}
    assert per_arm["lora"] == ["+0", "+1", "+2", "+3", "-1"] and len(per_arm["pissa"]) == 5
    assert rate_trials(study, Store(study).outcomes())[1] == {}


def test_an_edge_that_stays_is_flagged(tmp_path: Path) -> None:
    study = spec(tmp_path, prune=False)
    work(study, runner({"lora": 9, "pissa": 0}))
    assert rate_trials(study, Store(study).outcomes())[1] == {"lora": "high"}


def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    whole, cut = spec(tmp_path / "whole"), spec(tmp_path / "cut")
    best = {"lora": 1, "pissa": -1}
    work(whole, runner(best))
    ran: list[str] = []
    for stop_at in (1, 4, 7):
        inner = runner(best, ran)

        def dying(trial: Trial, report: Callable[[int, float], bool], at: int = stop_at, go: Any = inner) -> Outcome:
            if len(ran) >= at:
                raise KeyboardInterrupt
            made: Outcome = go(trial, report)
            return made

        with pytest.raises(KeyboardInterrupt):
            work(cut, dying)
    work(cut, runner(best, ran))
    assert Store(cut).outcomes() == Store(whole).outcomes()
    assert len(ran) == len(set(ran))


def _worker(k: int, folder: Path) -> None:
    work(spec(folder), runner({"lora": 0, "pissa": 0}, delay=0.05))


@pytest.mark.distributed
def test_two_workers_share_a_study(tmp_path: Path) -> None:
    warm.together(_worker, tmp_path, count=2)
    study = spec(tmp_path)
    done = Store(study).outcomes()
    assert {t.key for t in wanted(study, done)} == set(done)


def test_hopeless_rates_are_given_up_only_against_their_own_arm(tmp_path: Path) -> None:
    study = spec(tmp_path, rates=5)
    work(study, runner({"lora": 0, "pissa": -2}))
    done = Store(study).outcomes()
    assert done["rate/lora/+2/1000"].pruned and not done["rate/lora/+0/1000"].pruned
    assert done["rate/lora/+2/1000"].losses  # it still counts
    assert not any(o.pruned for k, o in done.items() if k.startswith("seed"))


def test_budget(tmp_path: Path) -> None:
    assert not work(spec(tmp_path, budget=Budget(trials=3)), runner({"lora": 0, "pissa": 0}))
    assert len(Store(spec(tmp_path)).outcomes()) == 3


def test_other_settings_are_refused(tmp_path: Path) -> None:
    work(spec(tmp_path, budget=Budget(trials=1)), runner({"lora": 0, "pissa": 0}))
    with pytest.raises(LoralignError, match=r"`train.steps` 4, the file now says 8"):
        Store(spec(tmp_path, steps=8))


def test_the_order_of_finish_changes_nothing(tmp_path: Path) -> None:
    """The middle rates finish last: what they would have ended was not, and counts as given up all the same."""
    study = spec(tmp_path, ("lora",), rates=5, steps=8, eval_every=2, extensions=0)
    losses = {0: 1.0, 1: 1.1, -1: 1.2, 2: 1.5, -2: 0.9}

    def run(trial: Trial) -> Outcome:
        final = losses[trial.index]
        curve = (final + 3, final + 2, final + (0.6 if trial.index == -2 else 0.5), final)
        return Outcome((2, 4, 6, 8), (1, 2, 3, 4), curve, metrics={"accuracy": final}, step_tokens=3.0)

    plan = rate_trials(study, {})[0]
    whole = {t.key: run(t) for t in plan}  # every trial ran to its end
    alone: dict[str, Outcome] = {}  # one worker, in order
    for t in plan:
        o = run(t)
        for kept, (step, loss) in enumerate(zip(o.steps, o.losses, strict=True), 1):
            if should_stop(t, step, loss, study, alone):
                o = replace(o, steps=o.steps[:kept], seconds=o.seconds[:kept], losses=o.losses[:kept], pruned=True)
                break
        alone[t.key] = o
    given_up = {t.index: in_order(study, whole, plan)[t.key].steps for t in plan if alone[t.key].pruned}
    assert given_up == {-1: (2, 4), 2: (2, 4)}  # not −2: it is below the worst at step 4, and ends best
    assert in_order(study, whole, plan) == in_order(study, alone, plan)
