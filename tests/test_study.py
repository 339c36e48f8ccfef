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
from loralign.compare.rates import Rate, edge
from loralign.compare.report import collect
from loralign.compare.schedule import hopeless, in_order, rate_trials, rates_of, should_stop, wanted
from loralign.compare.spec import Arm, Budget, Outcome, Spec, TaskSpec, Trial
from loralign.compare.store import Store
from loralign.compare.study import work

TASK = TaskSpec("text", "a", "b", "c")


def spec(folder: Path, arms: tuple[str, ...] = ("lora", "pissa"), **changes: object) -> Spec:
    made = tuple(Arm(n, build(n), lr=1e-3) for n in arms)
    fields: dict[str, object] = {"steps": 4, "eval_every": 1, "rates": 3, "seeds": 2, "baseline_seeds": 2}
    fields |= {"extensions": 2, "choice_seeds": 1, **changes}
    return Spec("toy", TASK, made, folder, **fields)  # type: ignore[arg-type]


def runner(
    best: dict[str, int], log: list[str] | None = None, delay: float = 0.0, wild: tuple[str, ...] = ()
) -> Callable[..., Outcome]:
    """Loss is a parabola over the grid index with its minimum at `best[arm]`; trials whose key is in `wild` diverge."""

    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        if log is not None:
            log.append(trial.key)
        time.sleep(delay)
        final = 1.0 + 0.1 * (trial.index - best[trial.arm]) ** 2 + 0.001 * (trial.seed % 100)
        losses = (final + 0.3, final + 0.2, final + 0.1, final)
        for step, loss in enumerate(losses, 1):
            if report(step, loss):
                return Outcome(tuple(range(1, step + 1)), (0.1,) * step, losses[:step], pruned=True, total_s=0.2)
        return Outcome((1, 2, 3, 4), (0.1, 0.2, 0.3, 0.4), losses, diverged=trial.key in wild, total_s=0.2)

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


def test_a_worker_that_compiles_stays_with_the_arms_that_it_knows(tmp_path: Path) -> None:
    """The rates of its first arm come before any of the other, where without it every arm's centre is tried first."""
    logs: dict[bool, list[str]] = {}
    for compiles in (False, True):
        best, log = {"lora": 0, "pissa": 0}, logs.setdefault(compiles, [])
        assert work(spec(tmp_path / str(compiles), prune=False, compile=compiles), runner(best, log))
    plain, known = ([k.split("/")[1] for k in logs[c] if k.startswith("rate")] for c in (False, True))
    assert plain[:2] == ["lora", "pissa"] and known[:4] == ["lora", "lora", "lora", "pissa"]
    assert sorted(logs[False]) == sorted(logs[True])


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
    """1.4 at every evaluation since half of the steps is above 1.3, the best rate's first evaluation."""
    study = spec(tmp_path, rates=5, extensions=0)
    work(study, runner({"lora": 0, "pissa": -2}))
    done = Store(study).outcomes()
    given_up = {k for k, o in done.items() if o.pruned}
    assert given_up == {f"rate/{k}/1000" for k in ("lora/+2", "lora/-2", "pissa/+1", "pissa/+2")}
    assert done["rate/lora/+2/1000"].steps == (1, 2, 3)  # it still counts
    assert not any(o.pruned for k, o in done.items() if k.startswith("seed"))


@pytest.mark.parametrize(
    ("late", "stops"),
    [((9.0, 9.0, 9.0), True), ((9.0, 9.0, 1.9), False), ((1.9, 9.0, 9.0), False), ((2.0, 2.0, 2.0), False)],
)
def test_a_spike_is_not_hopeless(late: tuple[float, ...], stops: bool) -> None:
    """At steps 4, 5 and 6 of 8; the only earlier rate had 2.0 at its first evaluation."""
    whole = Outcome(tuple(range(1, 9)), (0.0,) * 8, (2.0, *(1.0,) * 7))
    losses = (9.0, 9.0, 9.0, *late)
    assert hopeless(range(1, 7), losses, 8, [whole]) == stops
    assert not hopeless(range(1, 6), losses[:5], 8, [whole])  # not before three quarters of the steps
    assert not hopeless(range(1, 7), losses, 8, [replace(whole, pruned=True)])
    assert hopeless(range(1, 7), (1.0, *losses[1:]), 8, [whole]) == stops  # what was before half of the steps is past


# ------------------------------------------------------------------------------------------------ the choice of a rate


def test_the_best_rates_run_on_further_seeds(tmp_path: Path) -> None:
    """lora's best two of one seed are 0 and +1 or −1; of equals the lower one."""
    log: list[str] = []
    study = spec(tmp_path, ("lora",), choice_seeds=3, finalists=2, baseline_seeds=4)
    work(study, runner({"lora": 0}, log))
    assert log[3:7] == [f"rate/lora/{i}/{s}" for i in ("+0", "-1") for s in (1001, 1002)]
    assert log[7:] == [f"seed/lora/+0/{s}" for s in range(4)]


def test_for_a_finalist_that_diverges_the_next_best_runs(tmp_path: Path) -> None:
    study = spec(tmp_path, ("lora",), choice_seeds=2, finalists=1, extensions=0)
    log: list[str] = []
    work(study, runner({"lora": 0}, log, wild=("rate/lora/+0/1001",)))
    assert [k for k in log if "/1001" in k] == ["rate/lora/+0/1001", "rate/lora/-1/1001"]
    assert {k for k in log if k.startswith("seed")} == {"seed/lora/-1/0", "seed/lora/-1/1"}


def test_the_rates_of_a_study_carry_their_seeds(tmp_path: Path) -> None:
    study = spec(tmp_path, ("lora",), choice_seeds=3, finalists=2)
    work(study, runner({"lora": 0}))
    rates = {r.lr: r for r in collect(study, Store(study).outcomes()).rates}
    assert rates[1e-3].losses == (1.0, 1.001, 1.002) and len(rates[2e-3].losses) == 1


def test_the_best_is_where_validation_rows_say_and_not_test_rows(tmp_path: Path) -> None:
    """On validation rows the chosen rate's two seeds are lowest at step 2 in the mean, test rows are at step 3."""
    study, done = spec(tmp_path, ("lora",), choice_seeds=2, rates=1, extensions=0), dict[str, Outcome]()
    curves = {1000: (3.0, 2.0, 1.9, 2.2), 1001: (3.0, 2.1, 2.4, 2.2), 0: (2.0, 1.8, 1.5, 1.7), 1: (2.0, 1.9, 1.4, 1.6)}
    while left := [t for t in wanted(study, done) if t.key not in done]:
        done |= {t.key: Outcome((1, 2, 3, 4), (0.1, 0.2, 0.3, 0.4), curves[t.seed]) for t in left}
    assert [(c.best, c.final) for c in collect(study, done).curves] == [(1.8, 1.7), (1.9, 1.6)]


@pytest.mark.parametrize(("charge", "final"), [("steps", 2.5), ("read", 2.5), ("none", 1.0)])
def test_what_a_start_read_is_paid_for_where_the_final_loss_is_read(charge: str, final: float, tmp_path: Path) -> None:
    """Worth 1.5 steps: what was trained in 4 steps is read at 2.5 of them, between 3.0 and 2.0."""
    study, done = spec(tmp_path, ("lora",), rates=1, extensions=0, charge=charge), dict[str, Outcome]()
    paid = Outcome((1, 2, 3, 4), (0.1,) * 4, (4.0, 3.0, 2.0, 1.0), init_tokens=15, step_tokens=10.0)
    while left := [t for t in wanted(study, done) if t.key not in done]:
        done |= {t.key: paid for t in left}
    assert [c.final for c in collect(study, done).curves] == [final, final]


def test_a_chosen_rate_at_the_edge_extends_the_grids(tmp_path: Path) -> None:
    """On one seed +0 is best; on the further seeds the outermost −1 is better."""
    study = spec(tmp_path, ("lora",), choice_seeds=2, extensions=1, prune=False)
    plain = runner({"lora": 0})

    def run(trial: Trial, report: Callable[[int, float], bool]) -> Outcome:
        o = plain(trial, report)
        return replace(o, losses=(*o.losses[:-1], 0.1)) if trial.seed == 1001 and trial.index == -1 else o

    work(study, run)
    done = Store(study).outcomes()
    assert "rate/lora/-2/1000" in done and rate_trials(study, done)[1] == {}


def test_a_best_rate_beside_a_given_up_outermost_one_is_at_an_edge() -> None:
    grid = [Rate("x", 1e-4, 2.0), Rate("x", 1e-3, 1.5), Rate("x", 1e-2, 1.0), Rate("x", 1e-1, 1.8)]
    assert edge(1e-2, grid) is None
    assert edge(1e-2, [*grid[:3], replace(grid[3], pruned=True)]) == "high"
    assert edge(1e-2, [*grid[:3], replace(grid[3], diverged=True)]) is None
    assert edge(1e-3, [replace(grid[0], pruned=True), *grid[1:]]) == "low"
    assert edge(1e-3, [*grid[:3], replace(grid[3], pruned=True)]) is None


def test_nothing_is_given_up_before_all_that_it_is_judged_by_are_there_nor_on_further_seeds(tmp_path: Path) -> None:
    study = spec(tmp_path, ("lora",), rates=3, choice_seeds=2, finalists=2, extensions=0)
    bad = ((1, 2, 3), (9.0, 9.0, 9.0))
    first, second, third = rate_trials(study, {})[0]
    known = {t.key: Outcome((1, 2, 3, 4), (0.0,) * 4, (2.0, 1.5, 1.2, 1.0)) for t in (first, second, third)}
    assert should_stop(third, *bad, study, {t.key: known[t.key] for t in (first, second)})
    assert not should_stop(third, *bad, study, {first.key: known[first.key]})  # the second still runs
    again, other = rate_trials(study, known)[0][3:]
    assert {again.seed, other.seed} == {1001}
    assert not should_stop(other, *bad, study, {**known, again.key: known[first.key]})


def test_a_rate_counts_on_further_seeds_once_all_have_run(tmp_path: Path) -> None:
    study = spec(tmp_path, ("lora",), choice_seeds=3, finalists=1, extensions=0)
    outcome = Outcome((4,), (0.0,), (1.0,))
    done = {t.key: outcome for t in rate_trials(study, {})[0]}
    plan = rate_trials(study, done)[0]
    one, two = (t for t in plan if t.seed != study.rate_seed)
    for further, counted in (((), 1), ((one,), 1), ((one, two), 3)):
        here = {**done, **{t.key: outcome for t in further}}
        assert max(len(r.losses) for r in rates_of(study, study.arms[0], here, plan)) == counted


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
    losses = {0: 1.0, 1: 5.1, -1: 1.2, 2: 5.5, -2: 0.9}

    def run(trial: Trial) -> Outcome:
        final = losses[trial.index]
        curve = (final + 3, final + (5 if trial.index == -2 else 2), final + 0.5, final)
        ended = {"metrics": {"accuracy": final}, "rank": 8, "ranks": {"q": 4}}
        return Outcome((2, 4, 6, 8), (1, 2, 3, 4), curve, step_tokens=3.0, **ended)  # type: ignore[arg-type]

    plan = rate_trials(study, {})[0]
    whole = {t.key: run(t) for t in plan}  # every trial ran to its end
    alone: dict[str, Outcome] = {}  # one worker, in order
    for t in plan:
        o = run(t)
        for kept in range(1, len(o.steps) + 1):
            if should_stop(t, o.steps[:kept], o.losses[:kept], study, alone):
                o = replace(o, steps=o.steps[:kept], seconds=o.seconds[:kept], losses=o.losses[:kept], pruned=True)
                o = replace(o, metrics={"accuracy": 0.0}, rank=9, ranks={"q": 9})  # as they were at that step
                break
        alone[t.key] = o
    given_up = {t.index: in_order(study, whole, plan)[t.key].steps for t in plan if alone[t.key].pruned}
    assert given_up == {1: (2, 4, 6), 2: (2, 4, 6)}  # not −2: its spike is over at step 6, and it ends best
    assert in_order(study, whole, plan) == in_order(study, alone, plan)
