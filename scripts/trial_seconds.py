"""Seconds of whole trials of a study on one device: alone, side by side, and whether recording changes their losses.

    python scripts/trial_seconds.py STUDY.yaml --arms lora full --modes plain recorded both [--steps 300] [--repeat 3]
    python scripts/trial_seconds.py STUDY.yaml --arms lora lora full --together    a process for each, in turn, then all
    python scripts/trial_seconds.py STUDY.yaml --paired 8      plain against the other modes on 8 seeds: final losses on
                                                               validation rows, their mean difference, 95 % interval

Before what is timed every process runs the arm for three steps and an evaluation, so that its kind of block is known;
what that took is `first_s`. With --together every process first has the device to itself, then all run at once, those
that have ended again until the last has. --world FOLDER: random weights of SmolLM2-135M's shape (--shape tiny: for a
CPU) and rows of a chain of words, written there once, in place of the study's own; scripts/studies/trials.yaml is meant
for it. --set key=value: as in `loralign compare`. A CPU records and compiles nothing: there all modes are one. Every
trial is told when it has ended ("so far"): a run that is stopped has said what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from loralign.compare.curves import Interval, interval
from loralign.compare.runner import Resident
from loralign.compare.spec import Spec, Trial
from loralign.config.study import load_study
from loralign.train.recorder import Outputs, Record, cuda_graph
from trial_world import SHAPES, make_world

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


@dataclass(frozen=True)
class Row:
    """Trials of one arm in one mode, so many processes at once. trial_s: median of a whole one, evaluations included;
    times_alone: the same over that of one process."""

    mode: str
    arm: str
    workers: int
    trials: int
    trial_s: float
    times_alone: float
    first_s: float
    between_s: float
    step_ms: float
    replay_ms: float | None
    loss: float | None
    peak_gib: float
    note: str


# -------------------------------------------------------------------------------------------------------------- timing


def timed(spent: list[float]) -> Record:
    """CUDA graphs whose replays are waited for and timed, evaluations' too."""

    def record(work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        outputs, replay = cuda_graph(work)

        def again() -> None:
            torch.cuda.synchronize()
            started = time.perf_counter()
            replay()
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - started)

        return outputs, again

    return record


def rate_of(spec: Spec, arm: str) -> float:
    return next(a.lr for a in spec.arms if a.name == arm)


def known(asked: Asked, arm: str, resident: Resident) -> float:
    """Seconds of the first trial of an arm: three steps and an evaluation, which meet every shape."""
    started, spec = time.perf_counter(), resident.spec
    resident.spec = replace(spec, steps=3, eval_every=3, charge="none")
    resident.run(Trial("seed", arm, 0, rate_of(spec, arm), 0), lambda step, loss: False)
    resident.spec = spec
    taken = time.perf_counter() - started
    _so_far(arm, "its first steps, compiling included", seconds=taken)
    return taken


def resident_of(asked: Asked, spent: list[float]) -> Resident:
    resident = Resident(asked.spec())
    if asked.replays and resident.record:
        resident.record = timed(spent)
    return resident


def trials_of(
    resident: Resident, arm: str, repeat: int, spent: list[float], said: str = "alone"
) -> list[dict[str, Any]]:
    """Whole trials of an arm that this process knows."""
    found = []
    for seed in range(repeat):
        spent.clear()
        outcome = resident.run(_trial(resident, arm, seed), lambda step, loss: False)
        found.append({**asdict(outcome), "replays": list(spent)})
        _so_far(
            arm, f"a whole trial {said}", trial_s=outcome.total_s, between_s=outcome.between_s, step_s=outcome.step_s
        )
    return found


def _so_far(arm: str, what: str, **measured: float) -> None:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    print(f"{arm}, {what}: {numbers}, so far", flush=True)


def _trial(resident: Resident, arm: str, seed: int) -> Trial:
    return Trial("seed", arm, 0, rate_of(resident.spec, arm), seed)


def one_after_another(asked: Asked, arms: Sequence[str], repeat: int) -> list[Row]:
    """This process alone: every arm once to know it, then `repeat` whole trials."""
    spent = list[float]()
    resident, rows = resident_of(asked, spent), []
    for arm in arms:
        first_s = known(asked, arm, resident)
        trials = trials_of(resident, arm, repeat, spent)
        rows.append(row(asked.mode, arm, 1, trials, first_s, trials))
    return rows


def _process(asked: Asked, arm: str, turn: int, repeat: int, barrier: Any, ended: Any, queue: Any) -> None:
    """One of several: alone when it is its turn, then with all others."""
    spent = list[float]()
    try:
        resident = resident_of(asked, spent)
        first_s, alone = known(asked, arm, resident), []
        for now in range(barrier.parties):
            barrier.wait()
            alone += trials_of(resident, arm, repeat, spent) if now == turn else []
        barrier.wait()
        together = trials_of(resident, arm, repeat, spent, f"of {barrier.parties} at once")
        with ended.get_lock():
            ended.value += 1
        while ended.value < barrier.parties:
            resident.run(_trial(resident, arm, 0), lambda step, loss: bool(ended.value >= barrier.parties))
        queue.put((turn, first_s, alone, together))
    except BaseException as error:
        barrier.abort()
        ended.value = barrier.parties
        queue.put(f"{type(error).__name__}: {error}")
        raise


def at_once(asked: Asked, arms: Sequence[str], repeat: int) -> list[Row]:
    """A process for each arm on this device: each alone, then all together."""
    context = get_context("spawn")
    barrier, ended, queue = context.Barrier(len(arms)), context.Value("i", 0), context.Queue()
    made = [
        context.Process(target=_process, args=(asked, arm, turn, repeat, barrier, ended, queue))
        for turn, arm in enumerate(arms)
    ]
    told = _told_by(made, queue)
    of = {arm: [t for t in told if arms[t[0]] == arm] for arm in dict.fromkeys(arms)}
    rows = []
    for workers in (1, len(arms)):
        for arm, own in of.items():
            alone = [trial for _, _, trials, _ in own for trial in trials]
            trials = alone if workers == 1 else [trial for _, _, _, trials in own for trial in trials]
            rows.append(row(asked.mode, arm, workers, trials, max(first_s for _, first_s, _, _ in own), alone))
    return rows


def _told_by(processes: Sequence[Any], queue: Any) -> list[Any]:
    """What each put into the queue."""
    for process in processes:
        process.start()
    told: list[Any] = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    if failed := [said for said in told if isinstance(said, str)]:
        raise SystemExit(f"{len(failed)} of {len(processes)} processes failed: {failed[0]}")
    return told


def row(
    mode: str, arm: str, workers: int, trials: Sequence[dict[str, Any]], first_s: float, alone: Sequence[dict[str, Any]]
) -> Row:
    replays = [s for t in trials for s in t["replays"]]
    trial_s = median(t["total_s"] for t in trials)
    return Row(
        mode, arm, workers, len(trials),
        trial_s=trial_s, times_alone=trial_s / median(t["total_s"] for t in alone),
        first_s=first_s, between_s=median(t["between_s"] for t in trials),
        step_ms=1e3 * median(t["step_s"] for t in trials), replay_ms=1e3 * median(replays) if replays else None,
        loss=trials[0]["losses"][-1] if trials[0]["losses"] else None,
        peak_gib=max(t["peak_bytes"] for t in trials) / 2**30, note=trials[0]["note"],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- paired


def paired(asked: Asked, arms: Sequence[str], modes: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Final losses on validation rows of every mode and seed, and what each mode's differ from plain's. Several arms
    run side by side: nothing is timed."""
    if len(arms) == 1:
        return _pairs(asked, arms[0], modes, seeds)
    context = get_context("spawn")
    queue = context.Queue()
    made = [context.Process(target=_pairs_told, args=(asked, arm, modes, seeds, queue)) for arm in arms]
    found = {arm: tests for arm, tests in _told_by(made, queue)}
    return [test for arm in arms for test in found[arm]]


def _pairs_told(asked: Asked, arm: str, modes: Sequence[str], seeds: int, queue: Any) -> None:
    try:
        queue.put((arm, _pairs(asked, arm, modes, seeds)))
    except BaseException as error:
        queue.put(f"{type(error).__name__}: {error}")
        raise


def _pairs(asked: Asked, arm: str, modes: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    ends: dict[str, list[float]] = {}
    for mode in dict.fromkeys(("plain", *modes)):
        spec = replace(asked, mode=mode, replays=False).spec()
        resident = Resident(replace(spec, eval_every=spec.steps))
        trials = [Trial("rate", arm, 0, rate_of(spec, arm), seed) for seed in range(seeds)]
        ends[mode] = []
        for trial in trials:
            ends[mode].append(resident.run(trial, lambda step, loss: False).losses[-1])
            _so_far(arm, f"{mode}, seed {trial.seed}", loss=ends[mode][-1])
        del resident
        _freed()
    return [compared(mode, arm, ends["plain"], ends[mode]) for mode in modes if mode != "plain"]


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


def _freed() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- command


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--modes", nargs="+", default=["plain", "recorded", "both"], choices=tuple(MODES))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="a process for each of --arms, which may repeat")
    parser.add_argument("--paired", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--world", type=Path, metavar="FOLDER")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="smollm2-135m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--replays", action="store_true", help="time the replays of recorded steps (a GPU)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    world = make_world(args.world, args.shape) if args.world else []
    asked = Asked(str(args.study), (*world, *args.set), "plain", args.steps, args.replays)
    arms = args.arms or [a.name for a in asked.spec().arms]
    found: list[dict[str, Any]] = []
    if args.paired:
        found = paired(asked, arms, args.modes, args.paired)
        print(*(test["said"] for test in found), sep="\n", flush=True)
    for mode in () if args.paired else args.modes:
        measured = (at_once if args.together else one_after_another)(replace(asked, mode=mode), arms, args.repeat)
        found += [asdict(line) for line in measured]
        print(*(_told(line) for line in found[-len(measured) :]), sep="\n", flush=True)
        _freed()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _told(row: dict[str, Any]) -> str:
    kept = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v not in (None, "")}
    return " ".join(f"{k}={v}" for k, v in kept.items())


if __name__ == "__main__":
    sys.exit(main())
