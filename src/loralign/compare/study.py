"""The study at work: trial after trial on any number of workers, until `schedule.wanted` names none that is left.

Optuna keeps the trials (`store.py`): a finished trial is never repeated, an interrupted one runs again from its start,
several workers on one or more machines share the file. Later arms may join: they are tried like the others, and where
that extends the grids, the earlier arms get the further rates, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import median
from uuid import uuid4

from loralign.compare.failures import check_worth_going_on, crowded, device_is_gone, failure_of, is_the_arms, standing
from loralign.compare.schedule import should_stop, wanted
from loralign.compare.spec import BASELINE, Arm, Outcome, Spec, Trial
from loralign.compare.store import Claim, Store
from loralign.plan.course import check_length, idle
from loralign.types import LoralignError, Recipe

log = logging.getLogger("loralign")
Runner = Callable[[Trial, Callable[[int, float], bool]], Outcome]
POLL_S = 1.0


class OverBudget(Exception):
    """A limit was passed in the middle of a trial."""


class Crowded(Exception):
    """The device's memory did not hold this trial beside those of other workers."""


def work(
    spec: Spec,
    runner: Runner,
    *,
    on_done: Callable[[Trial, Outcome, int, int], None] | None = None,
    started: float | None = None,
    session: str | None = None,
) -> bool:
    """Run trials until none is left or the budget is spent; True when the study is complete. Workers may share it.

    started: time.monotonic() from which `budget.minutes` counts; omitted: now. session: which run of the command this
    is, one of its own where it is omitted.
    Raises: what the baseline's trial raised, or the first one where every arm's failed; other arms are left out. Any
        error after which this process's device takes no more work, after it is kept as that arm's failure.
    """
    store, started = Store(spec), time.monotonic() if started is None else started
    session = session or uuid4().hex
    compiled: set[str] = set()
    """Arms whose blocks this worker has compiled: it takes their trials first."""
    while True:
        done = store.outcomes()
        going, out = standing(spec, done, store.failures(), session)
        check_worth_going_on(spec, out)
        plan = wanted(going, done)
        left = [t for t in plan if t.key not in done]
        if not left:
            return True
        busy = store.running()
        free = [t for t in left if t.key not in busy]
        if no_room(spec, store, started):
            if not busy or free:
                log.warning("the budget is spent with %d of %d trials done; run again to go on", len(done), len(plan))
                return False
        elif free and (claim := store.claim(trial := chosen(free, compiled))):
            compiled |= {trial.arm} if spec.compile else set()
            try:
                outcome = _one(store, going, trial, claim, runner, started, session)
            except OverBudget:
                continue
            except Crowded:
                if store.running():
                    log.warning("the device's memory holds no further trial beside those of others: a worker ends")
                    return False
                continue  # they have left at the same moment: once more, alone
            if outcome and on_done:
                on_done(trial, outcome, len(store.outcomes()), len(plan))
            continue
        time.sleep(POLL_S)  # other workers hold the rest


def is_complete(spec: Spec, session: str) -> bool:
    """Whether no trial is left but those of arms that failed in this run of the command."""
    store = Store(spec)
    done = store.outcomes()
    going, out = standing(spec, done, store.failures(), session)
    return BASELINE not in out and bool(going.arms) and all(t.key in done for t in wanted(going, done))


def chosen(free: Sequence[Trial], compiled: Collection[str]) -> Trial:
    """Which of the trials that nobody runs a worker takes: one of an arm that it has compiled, of the first round.

    A round is one seed of every arm: a study that is stopped has its arms, and what they are compared with, at the same
    number of seeds, whatever the workers know.
    """
    first = free[0]
    round_ = [t for t in free if t.phase == first.phase and (t.phase == "rate" or t.seed == first.seed)]
    return next((t for t in round_ if t.arm in compiled), first)


def _one(
    store: Store, spec: Spec, trial: Trial, claim: Claim, runner: Runner, started: float, session: str
) -> Outcome | None:
    """The outcome, None where another worker took the trial over, or where it failed, which is kept.

    Crowded: it did not fit beside the study's other trials, and nothing is kept.
    """

    steps: list[int] = []
    losses: list[float] = []
    reporting = False

    def report(step: int, loss: float) -> bool:
        nonlocal reporting
        steps.append(step)
        losses.append(loss)
        reporting = True
        claim.beat(step)
        done = store.outcomes()
        if claim.lost or passed(spec, store, started):
            raise OverBudget
        reporting = False
        return should_stop(trial, steps, losses, spec, done)

    try:
        outcome = runner(trial, report)
    except BaseException as error:
        if reporting or not is_the_arms(error):
            claim.drop()
            raise
        if crowded(error) and store.running().keys() - {trial.key}:
            claim.drop()
            raise Crowded from error
        claim.fail(failure := failure_of(trial, error, session))
        log.debug("%s", failure.said, exc_info=error)
        if device_is_gone(error):
            raise
        return None
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


def warn_of_idle_arms(spec: Spec, left: Mapping[str, int] | None = None) -> None:
    """Name the arms that a trial would end before their rules act; raise where their schedule has no room.

    left: steps of an arm whose start costs some.
    """
    for arm in spec.arms:
        steps = (left or {}).get(arm.name, spec.steps)
        if isinstance(arm.recipe, Recipe):
            check_length(arm.recipe, steps)
            if said := idle(arm.recipe, steps):
                log.warning("%s", said)


def check_arms(arms: Iterable[Arm]) -> None:
    """No two of one name."""
    names = [arm.name for arm in arms]
    doubled = {n for n in names if names.count(n) > 1}
    if doubled:
        raise LoralignError(f"two arms are called {sorted(doubled)[0]!r}: give one of them another `name`")
