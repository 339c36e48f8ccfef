"""Trials and outcomes in an Optuna journal, shared by processes and machines, NFS included.

A claim is one line of the journal, so the order of claims is the same for everyone. A claim lives as long as its
process: on the same machine that is looked up, from elsewhere it is seen by a beat that a thread writes all the time,
whatever the trial is doing. What is judged is whether the beat changes, by the observer's clock: clocks of different
machines need not agree. A claim that died is taken over; should its worker come back, its outcome is dropped.

A write that is stopped in its middle leaves half a line (cut off before the next write of anybody) or the lock file
(released after 30 s without a change).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from loralign.compare.identity import (
    arm_settings,
    other_arm,
    other_settings,
    settings,
    translated,
)
from loralign.compare.journal import JOURNAL, check_ours, damaged, opened, outcome_of, study_id, wrong_in
from loralign.compare.spec import Failure, Outcome, Spec, Trial, arm_of, key_parts
from loralign.io.described import first_difference
from loralign.types import LoralignError

log = logging.getLogger("loralign")
BEAT_S = 15.0
STALE_S = 120.0
"""A claim from another machine whose beat did not change for so long is dead."""
CLOCK_S = 5.0
"""Two looks at the start of one process may differ by this much: the clock was set in between."""
ABANDONED_S = 3600.0
"""So old a beat is dead at first sight, however clocks may differ."""


class Store:
    """The journal of one study. Opening it checks that the study's settings are the ones it was started with."""

    def __init__(self, spec: Spec) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._path = spec.output / JOURNAL
        if spec.task_name:
            check_ours(spec.output.parent, "*")
        self._journal = opened(spec.output)
        self._study = study_id(self._journal, self._path)
        self._outcomes: dict[int, tuple[str, Outcome]] = {}
        self._beats: dict[int, tuple[Any, float]] = {}
        self._bind(spec)

    def _bind(self, spec: Spec) -> None:
        """Keep the settings of a new study and of new arms; refuse others than those that trials have run with."""
        self._spec = spec
        known = self._journal.get_study_user_attrs(self._study)
        if spec.reading:
            self._check(spec, known)
            return
        wanted = {"settings": settings(spec), **{f"arm {arm.name}": arm_settings(arm) for arm in spec.arms}}
        for arm in spec.arms:  # kept for the report, bound to nothing: what is known of a prior changes
            if f"tuned {arm.name}" not in known:
                self._journal.set_study_user_attr(self._study, f"tuned {arm.name}", dict(arm.tuned_on))
        for key, value in wanted.items():
            if key not in known:
                self._journal.set_study_user_attr(self._study, key, value)
        known = self._journal.get_study_user_attrs(self._study)
        if odd := [key for key in wanted if not isinstance(known[key], Mapping)]:
            raise LoralignError(damaged(self._path, f"in its {odd[0]}"))
        changed = first_difference(translated(known["settings"]), wanted["settings"])
        if changed and not self._rebound("settings", known, wanted):
            self._check(spec, known)
        for arm in spec.arms:
            key = f"arm {arm.name}"
            changed = first_difference(known[key], wanted[key])
            if changed and not self._rebound(key, known, wanted, arm.name):
                raise LoralignError(other_arm(arm, *changed))

    def _rebound(self, key: str, was: Mapping[str, Any], now: Mapping[str, Any], arm: str | None = None) -> bool:
        """Write what no trial, or none of an arm, has begun with. Where one begins meanwhile it is put back: that one
        has seen what was there."""
        if self._begun(arm):
            return False
        self._journal.set_study_user_attr(self._study, key, now[key])
        if not self._begun(arm):
            return True
        self._journal.set_study_user_attr(self._study, key, was[key])
        return False

    def _begun(self, arm: str | None) -> bool:
        """Whether a trial, of this arm or of any, is finished or at work."""
        kept = (t for t in self._trials() if t.state == TrialState.COMPLETE or self._alive(t))
        return any(arm is None or arm_of(t.user_attrs["key"]) == arm for t in kept)

    def _check(self, spec: Spec, known: Mapping[str, Any]) -> None:
        """The settings are those that the journal was begun with."""
        if not isinstance(known.get("settings"), Mapping):
            raise LoralignError(damaged(self._path, "in its settings"))
        if different := first_difference(translated(known["settings"]), settings(spec)):
            raise LoralignError(other_settings(spec.output, *different))

    def _check_own(self, trial: Trial) -> None:
        """The settings that this trial would run with are those of the journal."""
        known = self._journal.get_study_user_attrs(self._study)
        self._check(self._spec, known)
        arm = next(arm for arm in self._spec.arms if arm.name == trial.arm)
        if changed := first_difference(known[f"arm {arm.name}"], arm_settings(arm)):
            raise LoralignError(other_arm(arm, *changed))

    def _trials(self) -> list[FrozenTrial]:
        found: list[FrozenTrial] = self._journal.get_all_trials(self._study, deepcopy=False)
        for t in found:
            if wrong := wrong_in(t):
                raise LoralignError(damaged(self._path, f"in the {wrong} of trial {t.number}"))
        return found

    def outcomes(self) -> dict[str, Outcome]:
        """Finished trials by key, the first to finish where two workers ran the same one; parsed once."""
        complete = [t for t in self._trials() if t.state == TrialState.COMPLETE and "outcome" in t.user_attrs]
        found: dict[str, Outcome] = {}
        for t in sorted(complete, key=lambda t: (t.datetime_complete, t.number)):
            if t.number not in self._outcomes:
                self._outcomes[t.number] = t.user_attrs["key"], self._outcome(t)
            key, outcome = self._outcomes[t.number]
            found.setdefault(key, outcome)
        return found

    def _outcome(self, t: FrozenTrial) -> Outcome:
        try:
            return outcome_of(t.user_attrs["outcome"])
        except ValueError as error:
            raise LoralignError(damaged(self._path, f"in the outcome of trial {t.number}")) from error

    def failures(self) -> list[Failure]:
        """Trials that failed and that none has finished since, in their order."""
        trials = self._trials()
        done = {t.user_attrs["key"] for t in trials if t.state == TrialState.COMPLETE}
        failed = [t.user_attrs for t in trials if "failed" in t.user_attrs and t.state == TrialState.FAIL]
        return [Failure(attrs["key"], *attrs["failed"]) for attrs in failed if attrs["key"] not in done]

    def running(self) -> dict[str, tuple[float, int]]:
        """Seconds spent and step reached of the trials that a live worker is busy with, by key."""
        alive = [t for t in self._trials() if self._alive(t)]
        return {t.user_attrs["key"]: (t.user_attrs["beat"][0], t.user_attrs["beat"][2]) for t in alive}

    def spent_s(self) -> float:
        """Seconds of all trials: finished, running and given up half-way."""
        self.outcomes()
        total = sum(o.total_s for _, o in self._outcomes.values())
        rest = [t for t in self._trials() if "beat" in t.user_attrs and t.state != TrialState.COMPLETE]
        return float(total + sum(t.user_attrs["beat"][0] for t in rest))

    def claim(self, trial: Trial) -> Claim | None:
        """Take a trial, or None where another worker has it or has finished it.

        Raises LoralignError where the study, or the trial's arm, was begun anew with other settings.
        """
        claimed = Claim(self._journal, self._study, trial.key)  # first: whoever opens the study now sees it begun
        try:
            self._check_own(trial)
        except LoralignError:
            claimed.drop()
            raise
        for t in self._trials():
            if t.user_attrs.get("key") != trial.key or t.number >= claimed.number:
                continue
            if t.state == TrialState.COMPLETE or self._alive(t):
                claimed.drop()
                return None
            if t.state == TrialState.RUNNING:
                with suppress(OptunaError, KeyError, RuntimeError):  # another took it over at the same moment
                    self._journal.set_trial_state_values(t._trial_id, TrialState.FAIL)
        return claimed

    def _alive(self, t: FrozenTrial) -> bool:
        if t.state != TrialState.RUNNING or "owner" not in t.user_attrs:
            return False
        machine, pid, born = t.user_attrs["owner"]
        if machine == MACHINE:
            return _process_lives(pid, born)
        beat, now = t.user_attrs["beat"], time.monotonic()
        if t.number not in self._beats or self._beats[t.number][0] != beat:
            at_first_sight = t.number not in self._beats and time.time() - beat[1] > ABANDONED_S
            self._beats[t.number] = beat, now - (STALE_S if at_first_sight else 0.0)
        return now - self._beats[t.number][1] < STALE_S


class Claim:
    """A trial that this process runs; a thread shows that it lives."""

    def __init__(self, journal: JournalStorage, study: int, key: str) -> None:
        self._journal, self._started, self.step = journal, time.monotonic(), 0
        attrs = {"key": key, "owner": OWNER, "beat": [0.0, time.time(), 0]}
        self._trial = journal.create_new_trial(study, create_trial(state=TrialState.RUNNING, user_attrs=attrs))
        self.number: int = journal.get_trial(self._trial).number
        self.lost = False
        """Another worker took the trial over: this one must not finish it."""
        self._ended = threading.Event()
        self._life = threading.Thread(target=self._show_life, daemon=True)
        self._life.start()

    def beat(self, step: int | None = None) -> None:
        self.step = self.step if step is None else step
        elapsed = round(time.monotonic() - self._started, 1)
        self._write(lambda: self._journal.set_trial_user_attr(self._trial, "beat", [elapsed, time.time(), self.step]))

    def finish(self, outcome: Outcome) -> bool:
        """Keep the outcome; False where the trial was lost."""
        self._end()
        value = outcome.losses[-1] if outcome.losses and not outcome.diverged else 1e30
        text = json.dumps(asdict(outcome))
        self._write(lambda: self._journal.set_trial_user_attr(self._trial, "outcome", text))
        self._write(lambda: self._journal.set_trial_state_values(self._trial, TrialState.COMPLETE, [value]))
        return not self.lost

    def fail(self, failure: Failure) -> None:
        """Keep why there is no outcome."""
        kept = [failure.said, failure.session, failure.bad_input]
        self._write(lambda: self._journal.set_trial_user_attr(self._trial, "failed", kept))
        self.drop()

    def drop(self) -> None:
        self._end()
        self.beat()
        self._write(lambda: self._journal.set_trial_state_values(self._trial, TrialState.FAIL))

    def _end(self) -> None:
        """No beat comes after what is written next: it would find the trial ended, and take that for a take-over."""
        self._ended.set()
        self._life.join()

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self.beat()
            except Exception as error:  # a full disk: the trial's own writes will say so
                log.debug("no beat: %s", error)

    def _write(self, write: Any) -> None:
        if self.lost:
            return
        try:
            write()
        except (OptunaError, RuntimeError) as error:
            self.lost = True
            log.debug("a trial was taken over by another worker: %s", error)


def begun_with(folder: Path) -> dict[str, Any]:
    """What a journal was begun with: "settings", "arm …", and the "rates tried" of the arm that tried most."""
    journal = opened(folder)
    study = study_id(journal, folder / JOURNAL)
    trials = [t for t in journal.get_all_trials(study, deepcopy=False) if "key" in t.user_attrs and not wrong_in(t)]
    parts = [key_parts(t.user_attrs["key"]) for t in trials]
    tried = Counter(arm for arm, _ in {(arm, index) for phase, arm, index, _ in parts if phase == "rate"})
    return {**journal.get_study_user_attrs(study), "rates tried": max(tried.values(), default=0)}


# ---------------------------------------------------------------------------------------------------------------- who


def _machine() -> str:
    """Name, boot and process namespace: processes can be looked up by number only where all three agree."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


MACHINE = _machine()
OWNER = [MACHINE, os.getpid(), psutil.Process().create_time()]


def _process_lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - born) < CLOCK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
