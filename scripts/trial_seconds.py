"""Seconds of single trials of a study on this machine, one worker: plain, recorded, compiled, both.

python scripts/trial_seconds.py STUDY.yaml --arms lora full --modes plain recorded both [--steps 300] [--set key=value]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from loralign.compare.runner import Resident
from loralign.compare.spec import Trial
from loralign.config.study import load_study
from loralign.train.captured import Outputs, Record, cuda_graph

MODES = {"plain": (False, False), "recorded": (True, False), "compiled": (False, True), "both": (True, True)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--modes", nargs="+", default=["plain", "recorded", "both"], choices=tuple(MODES))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--replays", action="store_true", help="time the replays of recorded steps (a GPU)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for mode in args.modes:
        capture, compiled = MODES[mode]
        said = [f"train.capture={capture}".lower(), f"train.compile={compiled}".lower()]
        (spec,) = load_study(args.study, [*args.set, *said])
        spec = replace(spec, prune=False)
        spec = replace(spec, steps=args.steps, eval_every=max(1, args.steps // 6)) if args.steps else spec
        resident, replays = Resident(spec), list[float]()
        if args.replays and resident.record:
            resident.record = timed(replays)
        for arm in args.arms or [a.name for a in spec.arms]:
            lr = next(a.lr for a in spec.arms if a.name == arm)
            for k in range(args.repeat):
                replays.clear()
                started = time.perf_counter()
                outcome = resident.run(Trial("seed", arm, 0, lr, k), lambda step, loss: False)
                row = {
                    "mode": mode, "arm": arm, "seed": k, "total_s": time.perf_counter() - started,
                    "steps_s": outcome.seconds[-1] - outcome.init_s if outcome.seconds else None,
                    "step_ms": 1e3 * outcome.step_s, "between_s": outcome.between_s, "init_s": outcome.init_s,
                    "loss": outcome.losses[-1] if outcome.losses else None, "peak_gib": outcome.peak_bytes / 2**30,
                    "replay_ms": 1e3 * median(replays) if replays else None, "note": outcome.note,
                }  # fmt: skip
                rows.append(row)
                print(
                    " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True
                )
        del resident
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
