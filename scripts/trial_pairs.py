"""What is asked of a study's trials, and `trial_seconds.py --paired`: final losses of the modes on the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import torch

from loralign.compare.curves import Interval, interval
from loralign.compare.runner import Resident
from loralign.compare.spec import Spec, Trial
from loralign.config.study import load_study
from trial_processes import Tell, side_by_side

MODES = {"plain": (False, False), "recorded": (True, False), "compiled": (False, True), "both": (True, True)}
"""Whether steps are recorded, whether blocks are compiled."""


@dataclass(frozen=True)
class Asked:
    """What every process needs to know, as plain data."""

    study: str
    overrides: tuple[str, ...]
    mode: str
    steps: int | None
    replays: bool = False

    def spec(self) -> Spec:
        capture, compiled = MODES[self.mode]
        said = [f"train.capture={capture}".lower(), f"train.compile={compiled}".lower()]
        (spec,) = load_study(self.study, [*self.overrides, *said])
        spec = replace(spec, prune=False)
        return replace(spec, steps=self.steps, eval_every=max(1, self.steps // 3)) if self.steps else spec


def rate_of(spec: Spec, arm: str) -> float:
    return next(a.lr for a in spec.arms if a.name == arm)


def freed() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def paired(asked: Asked, arms: Sequence[str], modes: Sequence[str], seeds: int, tell: Tell) -> None:
    """Final losses on validation rows of every mode and seed, and what each mode's differ from plain's. Several arms
    run side by side: nothing is timed."""
    if len(arms) == 1:
        _pairs(asked, arms[0], modes, seeds, tell)
    else:
        side_by_side(get_context("spawn"), [(_pairs, (asked, arm, modes, seeds)) for arm in arms], tell)


def _pairs(asked: Asked, arm: str, modes: Sequence[str], seeds: int, tell: Tell) -> None:
    plain: list[float] = []
    for mode in dict.fromkeys(("plain", *modes)):
        spec = replace(asked, mode=mode, replays=False).spec()
        resident = Resident(replace(spec, eval_every=spec.steps))
        trials = [Trial("rate", arm, 0, rate_of(spec, arm), seed) for seed in range(seeds)]
        ends = list[float]()
        for trial in trials:
            ends.append(resident.run(trial, lambda step, loss: False).losses[-1])
            tell(f"{arm}, {mode}, seed {trial.seed}: loss {ends[-1]:.5f}")
        plain = plain or ends
        if mode != "plain":
            tell(compared(mode, arm, plain, ends))
        del resident
        freed()


def compared(mode: str, arm: str, plain: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Of the same seeds: other − plain, its mean and 95 % interval, beside the spread over seeds."""
    difference: Interval = interval([b - a for a, b in zip(plain, other, strict=True)])
    spread = interval(plain)
    said = (
        f"{arm}, {mode} − plain: {difference.mean:+.5f} (95 % {difference.low:+.5f} … {difference.high:+.5f}) over "
        f"{len(plain)} seeds, whose plain losses are {fmean(plain):.4f} ± {(spread.high - spread.low) / 2:.4f}; "
        f"{'no difference found' if 0.0 in difference else 'THEY DIFFER'}"
    )
    return {"mode": mode, "arm": arm, "plain": list(plain), "other": list(other), **asdict(difference), "said": said}
