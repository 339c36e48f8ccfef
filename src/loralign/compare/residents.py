"""A worker's resident process state, from trial to trial, and a new one after a trial that raised.

Every trial begins with a collection of garbage (accelerate's). What lives when the first trial of an arm has ended
lives on: it is set apart, so that collections do not go through it.
"""

from __future__ import annotations

import gc

from loralign.compare.runner import Resident
from loralign.compare.spec import Outcome, Spec, Trial
from loralign.compare.watch import Report


class Residents:
    """Runs trials in one resident process state, built anew after a trial that raised: what it left behind is not
    known."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.resident: Resident | None = Resident(spec)
        self.met: set[str] = set()
        """Arms whose traces, compiled code and caches are there."""

    def run(self, trial: Trial, report: Report) -> Outcome:
        if self.resident is None:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self.resident, self.met = Resident(self.spec), set()
        resident, self.resident = self.resident, None
        outcome = resident.run(trial, report)
        self.resident = resident
        if trial.arm not in self.met:
            self.met.add(trial.arm)
            gc.collect()
            gc.freeze()
        return outcome
