"""Trials that failed: what is said of them, which arms they leave out, and when they stop the whole study.

An arm is out as long as one of the trials that the study wants of it has failed and was not made good since. Within one
run of the command (`session`) such a trial is tried once; the next run tries it again, and the arm joins the others
where that succeeds. What the others' trials decide is as if the arm had never been there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from optuna.exceptions import OptunaError

from loralign.compare.schedule import wanted
from loralign.compare.spec import BASELINE, Failure, Outcome, Spec, Trial, arm_of
from loralign.types import LoralignError, WorkFailed

LONGEST = 160


def standing(
    spec: Spec, done: Mapping[str, Outcome], failures: Iterable[Failure], session: str | None = None
) -> tuple[Spec, dict[str, Failure]]:
    """The study without the arms that are out, and these with their first failure. session: of one run alone."""
    known = [f for f in failures if session in (None, f.session)]
    out: dict[str, Failure] = {}
    while True:
        left = replace(spec, arms=tuple(arm for arm in spec.arms if arm.name not in out))
        plan = {trial.key for trial in wanted(left, done)} if left.arms else set()
        found = [f for f in known if f.key in plan]
        if not found:
            return left, out
        for failure in found:
            out.setdefault(arm_of(failure.key), failure)


def check_worth_going_on(spec: Spec, out: Mapping[str, Failure]) -> None:
    """Raise the failure of the baseline, or the first one where every arm failed: the others would fail, too."""
    stop = out.get(BASELINE) or (next(iter(out.values()), None) if len(out) == len(spec.arms) else None)
    if stop is not None:
        raise (LoralignError if stop.bad_input else WorkFailed)(stop.said)


def is_the_arms(error: BaseException) -> bool:
    """Whether what a trial raised may lie at its arm: not a full disk, a lock, a stopped worker."""
    return isinstance(error, Exception) and not isinstance(error, OSError | OptunaError)


def device_is_gone(error: BaseException) -> bool:
    """Whether the device takes no further work from this process. A library (cuBLAS) may have said so in an error of
    its own kind; then the next call to the device says it again."""
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except (RuntimeError, torch.AcceleratorError):
        return True
    return False


CONTEXT = 2**30
"""Bytes at most that a process holds on a device beside what torch's allocator knows of."""


def crowded(error: BaseException) -> bool:
    """Whether the device had no memory left because other processes hold a tenth of it or more."""
    if not isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() - CONTEXT > total / 10


def failure_of(trial: Trial, error: BaseException, session: str) -> Failure:
    bad_input = isinstance(error, LoralignError) and not isinstance(error, WorkFailed)
    return Failure(trial.key, _said(trial, error), session, bad_input)


def _said(trial: Trial, error: BaseException) -> str:
    if isinstance(error, LoralignError):
        return str(error)
    where = f"arm {trial.arm!r} at {trial.lr:g}: "
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"{where}out of memory: take fewer `--workers` on one device, or a lower `train.micro_batch_size`"
    said = " ".join(str(error).split()) or "no message"
    return f"{where}unexpected {type(error).__name__}: {said[:LONGEST]}; --debug shows where"
