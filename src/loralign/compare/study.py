"""The study: which trials, in which order, on how many workers, until the result is a pure function of the outcomes.

Phase "rate": every arm the same number of log-spaced rates on one seed, judged on validation rows. While some arm's
best rate lies at the edge of its grid, one rate is added to *every* arm, at most `extensions` times. Phase "seed":
every arm's best rate on fresh seeds with equal data order, judged on test rows that no choice ever saw. A trial is
given up only against other rates of its own arm and not before half of the steps; it still counts. A rate is judged
against those that stand before it in the plan, so that the order in which workers finish changes nothing (`in_order`).

Optuna keeps the trials (journal file): a finished trial is never repeated, an interrupted one runs again from its
start, several workers on one or more machines share the file. What comes next depends on finished outcomes alone, so
a study that was killed ends with the same table.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from loralign.compare.spec import Arm, Outcome, Spec, Trial, grid, rate
from loralign.types import LoralignError, WorkFailed

log = logging.getLogger("loralign")
Runner = Callable[[Trial, Callable[[int, float], bool]], Outcome]
STALE_S = 180.0
"""A trial whose worker has not reported for so long is taken over."""


class Store:
    """Trials and outcomes in an Optuna journal; safe to share between processes and machines."""

    def __init__(self, spec: Spec) -> None:
        spec.output.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(spec.output / "study.journal")))
        self.study = optuna.create_study(study_name="loralign", storage=storage, load_if_exists=True)
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", spec.identity())
        elif known != spec.identity():
            raise LoralignError(
                "the study in this folder was started with other settings: choose another output folder"
            )

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def outcomes(self) -> dict[str, Outcome]:
        """Finished trials by key, the first to finish where two workers ran the same one."""
        found: dict[str, Outcome] = {}
        for t in self._trials():
            if t.state == TrialState.COMPLETE and "outcome" in t.user_attrs:
                found.setdefault(t.user_attrs["key"], outcome_of(json.loads(t.user_attrs["outcome"])))
        return found

    def running(self) -> set[str]:
        """Keys that a live worker is busy with."""
        now = time.time()
        return {t.user_attrs["key"] for t in self._trials() if _alive(t, now) and "key" in t.user_attrs}

    def begin(self, trial: Trial) -> optuna.Trial:
        """Claim a trial; the journal's lock makes the order of claims the same for everyone."""
        claimed = self.study.ask()
        claimed.set_user_attr("key", trial.key)
        claimed.set_user_attr("worker", f"{os.getpid()}")
        claimed.set_user_attr("beat", time.time())
        return claimed

    def first_to_claim(self, claimed: optuna.Trial, trial: Trial) -> bool:
        now = time.time()
        rivals = [
            t.number
            for t in self._trials()
            if t.user_attrs.get("key") == trial.key and (t.state == TrialState.COMPLETE or _alive(t, now))
        ]
        return min(rivals, default=claimed.number) == claimed.number

    def finish(self, claimed: optuna.Trial, outcome: Outcome) -> None:
        claimed.set_user_attr("outcome", json.dumps(asdict(outcome)))
        self.study.tell(claimed, outcome.losses[-1] if outcome.losses and not outcome.diverged else 1e30)

    def drop(self, claimed: optuna.Trial) -> None:
        self.study.tell(claimed, state=TrialState.FAIL)


def _alive(t: FrozenTrial, now: float) -> bool:
    return t.state == TrialState.RUNNING and now - t.user_attrs.get("beat", 0.0) < STALE_S


def outcome_of(body: dict[str, Any]) -> Outcome:
    for key in ("steps", "seconds", "losses"):
        body[key] = tuple(body[key])
    return Outcome(**body)


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

    Rounds: the base grid, then one more rate for every arm while any arm's best is at an edge ("low" or "high").
    """
    first = [t for arm in spec.arms for t in grid(arm, spec.rates, spec.ratio)]
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
                n, o = i + 1, outcome
                times, losses = o.seconds[:n], o.losses[:n]
                found[trial.key] = replace(o, steps=o.steps[:n], seconds=times, losses=losses, pruned=True)
                break
    return found


# ---------------------------------------------------------------------------------------------------------- working


def work(spec: Spec, runner: Runner, *, on_done: Callable[[Trial, Outcome, int, int], None] | None = None) -> bool:
    """Run trials until none is left or the budget is spent; True when the study is complete. Workers may share it."""
    store, started = Store(spec), time.monotonic()
    while True:
        done = store.outcomes()
        plan = wanted(spec, done)
        left = [t for t in plan if t.key not in done]
        if not left:
            return True
        if _spent(spec, done, started):
            log.warning("the budget is spent with %d of %d trials done; run again to go on", len(done), len(plan))
            return False
        busy = store.running()
        free = [t for t in left if t.key not in busy]
        if not free:  # other workers hold the rest
            time.sleep(1.0)
            continue
        _one(store, spec, free[0], runner, on_done, len(done) + 1, len(plan))


def _one(store: Store, spec: Spec, trial: Trial, runner: Runner, on_done: Any, number: int, total: int) -> None:
    claimed = store.begin(trial)
    if not store.first_to_claim(claimed, trial):
        store.drop(claimed)
        return

    def report(step: int, loss: float) -> bool:
        claimed.set_user_attr("beat", time.time())
        return should_stop(trial, step, loss, spec, store.outcomes())

    try:
        outcome = runner(trial, report)
    except BaseException:
        store.drop(claimed)
        raise
    store.finish(claimed, outcome)
    if on_done:
        on_done(trial, outcome, number, total)


def _spent(spec: Spec, done: dict[str, Outcome], started: float) -> bool:
    used_h = sum(o.total_s for o in done.values()) / 3600
    b = spec.budget
    limits = (
        b.trials is not None and len(done) >= b.trials,
        b.minutes is not None and time.monotonic() - started >= 60 * b.minutes,
        b.gpu_hours is not None and used_h >= b.gpu_hours,
    )
    return any(limits)


def check_arms(arms: Iterable[Arm]) -> None:
    """Names are unique and the plain references are there to be compared with."""
    names = [arm.name for arm in arms]
    doubled = {n for n in names if names.count(n) > 1}
    if doubled:
        raise LoralignError(f"two arms are called {sorted(doubled)[0]!r}: give one of them another `name`")
    if not names:
        raise WorkFailed("a study needs at least one arm")
