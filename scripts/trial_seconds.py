"""Seconds of whole trials of a study on one device: alone, side by side, and whether recording changes their losses.

    python scripts/trial_seconds.py STUDY.yaml --arms lora full --modes plain recorded both [--steps 300] [--repeat 3]
    python scripts/trial_seconds.py STUDY.yaml --arms lora lora full --together    a process for each, in turn, then all
    python scripts/trial_seconds.py STUDY.yaml --paired 8      plain against the other modes on 8 seeds: final losses on
                                                               validation rows, their mean difference, 95 % interval

Before what is timed every process runs the arm for three steps and an evaluation, so that its kind of block is known;
what that took is `first_s`. With --together every process first has the device to itself, then all run at once, those
that have ended again until the last has. Every figure is printed, and written to --json, as soon as it is known.
--world FOLDER: random weights of SmolLM2-135M's shape (--shape tiny: for a
CPU) and rows of a chain of words, written there once, in place of the study's own; scripts/studies/trials.yaml is meant
for it. --set key=value: as in `loralign compare`. A CPU records and compiles nothing: there all modes are one.
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
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters

from loralign.compare.runner import Resident
from loralign.compare.spec import Trial
from loralign.train.recorder import Outputs, Record, cuda_graph
from trial_pairs import MODES, Asked, freed, paired, rate_of
from trial_processes import Tell, side_by_side
from trial_world import SHAPES, make_world


@dataclass(frozen=True)
class Row:
    """Trials of one process in one mode, so many processes at once. trial_s: median of a whole one, evaluations
    included; times_alone: the same over that of this process alone. graphs: compiled in all of them."""

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
    graphs: int
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


class Process:
    """One worker in one mode: an arm is made known, then whole trials of it are timed."""

    def __init__(self, asked: Asked, tell: Tell) -> None:
        started = time.perf_counter()
        self.asked, self.tell, self.spent = asked, tell, list[float]()
        self.resident = Resident(asked.spec())
        if asked.replays and self.resident.record:
            self.resident.record = timed(self.spent)
        self.loaded_s = time.perf_counter() - started

    def trial(self, arm: str, seed: int) -> Trial:
        return Trial("seed", arm, 0, rate_of(self.resident.spec, arm), seed)

    def know(self, arm: str) -> None:
        """Three steps and an evaluation, which meet every shape."""
        started, spec = time.perf_counter(), self.resident.spec
        self.resident.spec = replace(spec, steps=3, eval_every=3, charge="none")
        self.resident.run(self.trial(arm, 0), lambda step, loss: False)
        self.resident.spec, self.first_s = spec, time.perf_counter() - started
        self.tell(f"{arm}, {self.asked.mode}: loaded in {self.loaded_s:.1f} s, known after {self.first_s:.1f} s more")

    def run(self, arm: str, repeat: int, workers: int, alone: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Whole trials. alone: those of this process without others."""
        found = []
        for seed in range(repeat):
            self.spent.clear()
            before = counters["stats"]["unique_graphs"]
            outcome = self.resident.run(self.trial(arm, seed), lambda step, loss: False)
            graphs = counters["stats"]["unique_graphs"] - before
            found.append({**asdict(outcome), "replays": list(self.spent), "graphs": graphs})
            self.tell(f"{arm}, {self.asked.mode}, a whole trial, {workers} at once: {outcome.total_s:.2f} s")
        self.tell(asdict(row(self.asked.mode, arm, workers, found, self.first_s, alone or found)))
        return found


def one_after_another(asked: Asked, arms: Sequence[str], modes: Sequence[str], repeat: int, tell: Tell) -> None:
    """This process alone: in every mode every arm once to know it, then `repeat` whole trials."""
    for mode in modes:
        worker = Process(replace(asked, mode=mode), tell)
        for arm in arms:
            worker.know(arm)
            worker.run(arm, repeat, 1)
        del worker
        freed()


@dataclass(frozen=True)
class Crowd:
    """What processes that run side by side share."""

    arms: Sequence[str]
    repeat: int
    barrier: Any
    ended: Any

    def run(self, worker: Process, turn: int, number: int) -> None:
        """One of them in the number-th mode: alone when it is its turn, then with all others until the last ends."""
        arm, alone, last = self.arms[turn], list[dict[str, Any]](), number * len(self.arms)
        worker.know(arm)
        for now in range(len(self.arms)):
            self.barrier.wait()
            alone = worker.run(arm, self.repeat, 1) if now == turn else alone
        self.barrier.wait()
        worker.run(arm, self.repeat, len(self.arms), alone)
        with self.ended.get_lock():
            self.ended.value += 1
        while self.ended.value < last:
            worker.resident.run(worker.trial(arm, 0), lambda step, loss: bool(self.ended.value >= last))


def at_once(asked: Asked, arms: Sequence[str], modes: Sequence[str], repeat: int, tell: Tell) -> None:
    """A process for each arm on this device: in every mode each alone, then all together."""
    context = get_context("spawn")
    crowd = Crowd(arms, repeat, context.Barrier(len(arms)), context.Value("i", 0))
    side_by_side(context, [(_one_of_many, (turn, asked, modes, crowd)) for turn in range(len(arms))], tell)


def _one_of_many(turn: int, asked: Asked, modes: Sequence[str], crowd: Crowd, tell: Tell) -> None:
    try:
        for number, mode in enumerate(modes, 1):
            crowd.run(Process(replace(asked, mode=mode), tell), turn, number)
            freed()
    except BaseException:
        crowd.barrier.abort()
        crowd.ended.value = len(modes) * len(crowd.arms)
        raise


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
        peak_gib=max(t["peak_bytes"] for t in trials) / 2**30, graphs=sum(t["graphs"] for t in trials),
        note=trials[0]["note"],
    )  # fmt: skip


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
    started, found = time.perf_counter(), list[dict[str, Any]]()

    def tell(said: Any) -> None:
        print(f"[{time.perf_counter() - started:3.0f} s] {_told(said)}", flush=True)
        if isinstance(said, dict):
            found.append(said)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if args.paired:
        paired(asked, arms, args.modes, args.paired, tell)
    else:
        (at_once if args.together else one_after_another)(asked, arms, args.modes, args.repeat, tell)
    return 0


def _told(said: Any) -> str:
    if isinstance(said, str):
        return said
    if "said" in said:
        return str(said["said"])
    kept = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in said.items() if v not in (None, "")}
    return " ".join(f"{k}={v}" for k, v in kept.items())


if __name__ == "__main__":
    sys.exit(main())
