"""A real study on the CPU: MiniLM on BBC News, `full`, `lora` and `lora-ga`, each at its own tuned learning rate.

    python scripts/compare_demo.py [--output runs/compare-demo] [--workers 2]
    python scripts/compare_demo.py --prove-resume [--short]

Writes the rows (split by a hash of the text) and the study file, then runs `loralign compare` on it. Stopped at any
moment, the same command goes on where it was and ends with the same table. About 15 minutes on two idle cores.

--prove-resume runs the study a second time, in a folder of its own, kills it three times (SIGKILL of all its processes:
at a random moment in each third of its trials), goes on, and compares: every loss and metric of every trial, every
figure of the table and of results.json and the pictures without seconds must be equal to the last bit; times are left
out. --short: the same arms, rates and seeds on fewer and shorter rows and 28 steps of 4, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import yaml

from asset_cache import cache_dir
from loralign.compare.report import repeatable

SIZES = {"train": 640, "valid": 160, "test": 320}
WORDS = 48
"""Of the start of an article: enough to tell its topic, mostly."""


def named(path: Path) -> str:
    """As people write it: the study file then says nothing about the machine."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


@dataclass(frozen=True)
class Size:
    """rows: one part of so many of each split. length: tokens of a row at most."""

    steps: int
    rows: int
    length: int
    batch: int
    model: str = ""
    """MiniLM where it is empty."""


WHOLE, SHORT = Size(40, 1, 64, 16), Size(28, 8, 16, 4)


def write_rows(folder: Path, part: int = 1) -> dict[str, str]:
    """Disjoint splits; which article goes where depends on its start alone, so that no start stands in two of them."""
    lines = (cache_dir() / "bbc" / "all.jsonl").read_text(encoding="utf-8").splitlines()
    starts = {" ".join(row["text"].split()[:WORDS]): row["label"] for row in map(json.loads, lines)}
    ordered = sorted(starts.items(), key=lambda item: blake2b(item[0].encode(), digest_size=8).digest())
    rows = iter({"text": text, "label": label} for text, label in ordered)
    paths = {}
    for split, size in SIZES.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(next(rows)) + "\n" for _ in range(size // part)), encoding="utf-8")
        paths[split] = str(path)
    return paths


def study(folder: Path, size: Size = WHOLE) -> dict[str, object]:
    """Grids are centred where a first look put each arm's best; the search still has to find it inside its grid.

    Fewer seeds than the defaults: `lora` on 5 instead of 12, the two best rates on 2 instead of 3. 29 trials, 32 where
    the grids are extended by a rate each: 14.5 minutes on two quiet cores, measured on 29 November 2026.
    """
    return {
        "model": size.model or named(cache_dir() / "minilm"),
        "task": {"kind": "classify", **write_rows(folder, size.rows), "length": size.length, "head_lr": 1e-3},
        "arms": [{"method": "full", "lr": 3e-4}, {"method": "lora", "lr": 3e-3}, {"method": "lora-ga", "lr": 3.3e-4}],
        "rank": 8,
        "alpha": 16,
        "rates": {"count": 4, "ratio": 3.0, "seeds": 2, "extensions": 1},
        "seeds": 3,
        "baseline_seeds": 5,
        "train": {"steps": size.steps, "batch_size": size.batch, "eval_every": size.steps // 4},
        "output": str(results(folder)),
    }


def results(folder: Path) -> Path:
    """A study has its folder for itself: the rows are beside it."""
    return folder / "study"


def prepared(folder: Path, workers: int, size: Size) -> list[str]:
    """The command that runs the study in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study(folder, size), sort_keys=False), encoding="utf-8")
    return [sys.executable, "-P", "-m", "loralign", "compare", str(file), "--workers", str(workers)]


def finished(folder: Path) -> int:
    """Trials that a journal has the outcome of, whoever is writing to it."""
    journal = results(folder) / "study.journal"
    return journal.read_bytes().count(b'"user_attr":{"outcome"') if journal.exists() else 0


def killed(command: list[str], folder: Path, trials: float) -> int:
    """SIGKILL of everything once so many trials are finished, at some moment of the next one; how many were."""
    running = subprocess.Popen(command, start_new_session=True)
    while finished(folder) < trials and running.poll() is None:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 3))
    if running.poll() is not None:
        raise SystemExit(f"the study ended before it could be killed at {trials:.0f} trials")
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    return finished(folder)


def prove_resume(whole: Path, workers: int, size: Size, kills: int = 3) -> int:
    cut = whole.with_name(f"{whole.name}-killed")
    command, trials = prepared(cut, workers, size), len(repeatable(results(whole))["trials"])
    for i in range(kills):
        at = killed(command, cut, trials * random.uniform(i, i + 0.8) / kills)
        print(f"-- killed with {at} of {trials} trials finished, going on", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        return code
    ours, theirs = results(cut), results(whole)
    same = repeatable(ours) == repeatable(theirs)
    pictures = [p for p in ("rates.png", "steps.png") if (ours / p).read_bytes() != (theirs / p).read_bytes()]
    print(f"{trials} trials, statistics and table: {'equal to the last bit' if same else 'DIFFERENT'}")
    print(f"pictures without seconds: {'equal to the last bit' if not pictures else f'DIFFERENT: {pictures}'}")
    return 0 if same and not pictures else 1


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compare-demo"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prove-resume", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--model", default="", help="a classifier's folder; default: MiniLM")
    args = parser.parse_args(words)
    started, size = time.monotonic(), replace(SHORT if args.short else WHOLE, model=args.model)
    code = subprocess.run(prepared(args.output, args.workers, size), check=False).returncode
    print(f"{(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    return code or (prove_resume(args.output, args.workers, size) if args.prove_resume else 0)


if __name__ == "__main__":
    sys.exit(main())
