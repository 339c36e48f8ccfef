"""The study: which trials, in which order, on how many workers, until the result is a pure function of the outcomes.

Phase "rate": every arm the same number of log-spaced rates on one seed, judged on validation rows. While some arm's
best rate lies at the edge of its grid, one rate is added to *every* arm, at most `extensions` times. Phase "seed":
every arm's best rate on fresh seeds with equal data order, judged on test rows that no choice ever saw. A trial is
given up only against other rates of its own arm and not before half of the steps; it still counts. A rate is judged
against those that stand before it in the plan, so that the order in which workers finish changes nothing (`in_order`).

Optuna keeps the trials (`store.py`): a finished trial is never repeated, an interrupted one runs again from its start,
several workers on one or more machines share the file. What comes next depends on finished outcomes alone, so a study
that was killed ends with the same table. Later arms may join: they are tried like the others, and where that extends
the grids, the earlier arms get the further rates, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from loralign.compare.spec import Arm, Outcome, Spec, Trial, grid, rate
from loralign.compare.store import Claim, Store
from loralign.plan.combinations import check_length, idle
from loralign.types import LoralignError, Recipe, WorkFailed

log = logging.getLogger("loralign")
Runner = Callable[[Trial, Callable[[int, float], bool]], Outcome]
POLL_S = 1.0


# ----------------------------------------------------------------------------------------------------- what is next


def judged(outcome: Outcome) -> float:
    """What a rate is chosen by: the final validation loss; a diverged or given-up trial counts as infinitely bad."""
    return float("inf") if outcome.diverged or outcome.pruned or not outcome.losses else outcome.losses[-1]


def best_index(arm: Arm, done: Mapping[str, Outcome], trials: Sequence[Trial]) -> int | None:
    """Grid index of the arm's best rate, None where every rate diverged."""
    scores = {t.index: judged(done[t.key]) for t in trials if t.arm == arm.name}
    best = min(scores, key=lambda i: (scores[i], i))
    return best if scores[best] < float("inf") else None


def rate_trials(spec: Spec, done: Mapping[str, Outcome]) -> tuple[list[Trial], dict[str, str]]:
    """All trials of phase "rate" that the finished ones call for, and the arms whose best is still at an edge.

    Rounds: the base grid, then one more rate for every arm while any arm's best is at an edge ("low" or "high"). Every
    arm's centre comes first, then every arm's next rate, so that workers side by side still know the earlier rates of
    an arm when they judge a later one, and a study that stops early is balanced.
    """
    grids = (grid(arm, spec.rates, spec.ratio) for arm in spec.arms)
    first = [t for turn in zip(*grids, strict=True) for t in turn]
    trials = [Trial("rate", t.arm, t.index, t.lr, spec.rate_seed) for t in first]
    for extension in range(spec.extensions + 1):
        if any(t.key not in done for t in trials):
            return trials, {}
        done = in_order(spec, done, trials)
        edges = {arm.name: side for arm in spec.arms if (side := edge_of(arm, done, trials))}
        if not edges or extension == spec.extensions:
            return trials, edges
        trials += [_one_more(arm, spec, done, trials) for arm in spec.arms]
    raise AssertionError("unreachable")


def edge_of(arm: Arm, done: Mapping[str, Outcome], trials: Sequence[Trial]) -> str | None:
    indices = [t.index for t in trials if t.arm == arm.name]
    best = best_index(arm, done, trials)
    if best is None or best == min(indices):
        return "low"
    return "high" if best == max(indices) else None


def _one_more(arm: Arm, spec: Spec, done: Mapping[str, Outcome], trials: Sequence[Trial]) -> Trial:
    """The next rate beyond the edge nearer to the arm's best."""
    indices = [t.index for t in trials if t.arm == arm.name]
    best = best_index(arm, done, trials)
    low = best is None or best - min(indices) <= max(indices) - best
    if best is not None and best == max(indices):
        low = False
    index = min(indices) - 1 if low else max(indices) + 1
    return Trial("rate", arm.name, index, rate(arm, index, spec.ratio), spec.rate_seed)


def seed_trials(spec: Spec, done: Mapping[str, Outcome], trials: Sequence[Trial]) -> list[Trial]:
    """Every arm's best rate on the reported seeds, seed by seed so that an unfinished study is balanced."""
    done = in_order(spec, done, trials)
    chosen = {arm.name: best_index(arm, done, trials) for arm in spec.arms}
    found = []
    for seed in range(spec.seeds):
        for arm in spec.arms:
            index = chosen[arm.name]
            if index is not None:
                found.append(Trial("seed", arm.name, index, rate(arm, index, spec.ratio), seed))
    return found


def wanted(spec: Spec, done: Mapping[str, Outcome]) -> list[Trial]:
    """Every trial that the study needs, as far as finished outcomes decide it; a pure function."""
    trials, _ = rate_trials(spec, done)
    if any(t.key not in done for t in trials):
        return trials
    return [*trials, *seed_trials(spec, done, trials)]


def earlier(trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
    """The rates of the same arm that stand before a trial in the plan."""
    own = [t for t in trials if t.arm == trial.arm]
    return own[: own.index(trial)] if trial in own else []


def should_stop(trial: Trial, step: int, loss: float, spec: Spec, done: dict[str, Outcome]) -> bool:
    """Give a rate up when, past half of the steps, it is worse than every earlier rate of its own arm was then.

    Not while an earlier one is still running: what is given up must not depend on who finished first.
    """
    if not spec.prune or trial.phase != "rate":
        return False
    trials, _ = rate_trials(spec, done)
    before = earlier(trial, trials)
    if any(t.key not in done for t in before):
        return False
    finished = in_order(spec, done, before)
    return _hopeless(step, loss, spec, [finished[t.key] for t in before])


def _hopeless(step: int, loss: float, spec: Spec, before: Sequence[Outcome]) -> bool:
    """At least two earlier rates ran to their end, and this loss is above all of theirs at this step."""
    if step < spec.steps / 2 or step >= spec.steps:
        return False
    whole = [o for o in before if not o.diverged and not o.pruned]
    then = [o.losses[o.steps.index(step)] for o in whole if step in o.steps]
    return len(then) >= 2 and loss > max(then)


def in_order(spec: Spec, done: Mapping[str, Outcome], trials: Sequence[Trial]) -> dict[str, Outcome]:
    """Outcomes as one worker, going through the plan in order, would have had them.

    With several workers a rate may run to its end although an earlier one, unfinished then, would have ended it: it
    counts as given up, at that step. Live `should_stop` never gives up more than this.
    """
    found = dict(done)
    if not spec.prune:
        return found
    for trial in trials:
        outcome = found[trial.key]
        before = [found[t.key] for t in earlier(trial, trials)]
        for i, (step, loss) in enumerate(zip(outcome.steps, outcome.losses, strict=True)):
            if _hopeless(step, loss, spec, before):
                found[trial.key] = _given_up(outcome, i + 1)
                break
    return found


def _given_up(o: Outcome, n: int) -> Outcome:
    """The outcome after n evaluations; what was measured later is forgotten."""
    steps, seconds, losses = o.steps[:n], o.seconds[:n], o.losses[:n]
    return replace(o, steps=steps, seconds=seconds, losses=losses, pruned=True, metrics={}, step_tokens=0.0)


# ---------------------------------------------------------------------------------------------------------- working


class OverBudget(Exception):
    """A limit was passed in the middle of a trial."""


def work(
    spec: Spec,
    runner: Runner,
    *,
    on_done: Callable[[Trial, Outcome, int, int], None] | None = None,
    started: float | None = None,
) -> bool:
    """Run trials until none is left or the budget is spent; True when the study is complete. Workers may share it.

    started: time.monotonic() from which `budget.minutes` counts; omitted: now.
    """
    store, started = Store(spec), time.monotonic() if started is None else started
    while True:
        done = store.outcomes()
        plan = wanted(spec, done)
        left = [t for t in plan if t.key not in done]
        if not left:
            return True
        busy = store.running()
        free = [t for t in left if t.key not in busy]
        if no_room(spec, store, started):
            if not busy or free:
                log.warning("the budget is spent with %d of %d trials done; run again to go on", len(done), len(plan))
                return False
        elif free and (claim := store.claim(free[0])):
            try:
                outcome = _one(store, spec, free[0], claim, runner, started)
            except OverBudget:
                continue
            if outcome and on_done:
                on_done(free[0], outcome, len(store.outcomes()), len(plan))
            continue
        time.sleep(POLL_S)  # other workers hold the rest


def _one(store: Store, spec: Spec, trial: Trial, claim: Claim, runner: Runner, started: float) -> Outcome | None:
    """The outcome, None where another worker took the trial over."""

    def report(step: int, loss: float) -> bool:
        claim.beat(step)
        done = store.outcomes()
        if claim.lost or passed(spec, store, started):
            raise OverBudget
        return should_stop(trial, step, loss, spec, done)

    try:
        outcome = runner(trial, report)
    except BaseException:
        claim.drop()
        raise
    return outcome if claim.finish(outcome) else None


def passed(spec: Spec, store: Store, started: float) -> bool:
    """Whether time is over now, also in the middle of a trial."""
    b = spec.budget
    late = b.minutes is not None and time.monotonic() - started >= 60 * b.minutes
    return late or (b.gpu_hours is not None and store.spent_s() >= 3600 * b.gpu_hours)


def no_room(spec: Spec, store: Store, started: float) -> bool:
    """Whether one more trial, of the usual length, would pass a limit; what others are running counts as finished."""
    b, done, busy = spec.budget, store.outcomes(), store.running()
    if b.trials is not None and len(done) + len(busy) >= b.trials:
        return True
    usual = median([o.total_s for o in done.values()]) if done else 0.0
    ahead = sum(max(0.0, usual - elapsed) for elapsed, _ in busy.values())
    late = b.minutes is not None and time.monotonic() - started + usual > 60 * b.minutes
    return late or (b.gpu_hours is not None and store.spent_s() + ahead + usual > 3600 * b.gpu_hours)


def warn_of_idle_arms(spec: Spec) -> None:
    """Name the arms that a trial would end before their rules act; raise where their schedule has no room."""
    for arm in spec.arms:
        if isinstance(arm.recipe, Recipe):
            check_length(arm.recipe, spec.steps)
        if isinstance(arm.recipe, Recipe) and (said := idle(arm.recipe, spec.steps)):
            log.warning("%s", said)


def check_arms(arms: Iterable[Arm]) -> None:
    """Names are unique and the plain references are there to be compared with."""
    names = [arm.name for arm in arms]
    doubled = {n for n in names if names.count(n) > 1}
    if doubled:
        raise LoralignError(f"two arms are called {sorted(doubled)[0]!r}: give one of them another `name`")
    if not names:
        raise WorkFailed("a study needs at least one arm")
