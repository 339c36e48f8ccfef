"""A real study on the CPU: MiniLM on BBC News, `full`, `lora` and `lora-ga`, each at its own tuned learning rate.

    python scripts/compare_demo.py [--output runs/compare-demo] [--workers 2]
    python scripts/compare_demo.py --prove-resume

Writes the rows (split by a hash of the text) and the study file, then runs `loralign compare` on it. Stopped at any
moment, the same command goes on where it was and ends with the same table. About 15 minutes on two idle cores.

--prove-resume runs the study a second time, in a folder of its own, kills it three times at random moments (SIGKILL of
all its processes), goes on, and compares: every loss and metric of every trial, every figure of the table and of
results.json and the pictures without seconds must be equal to the last bit; times are left out.
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
from hashlib import blake2b
from pathlib import Path

import yaml

from loralign.compare.report import repeatable

SIZES = {"train": 640, "valid": 160, "test": 320}
WORDS = 48
"""Of the start of an article: enough to tell its topic, mostly."""


def assets() -> Path:
    chosen = os.environ.get("LORALIGN_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"


def named(path: Path) -> str:
    """As people write it: the study file then says nothing about the machine."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def write_rows(folder: Path) -> dict[str, str]:
    """Disjoint splits; which article goes where depends on its start alone, so that no start stands in two of them."""
    lines = (assets() / "bbc" / "all.jsonl").read_text(encoding="utf-8").splitlines()
    starts = {" ".join(row["text"].split()[:WORDS]): row["label"] for row in map(json.loads, lines)}
    ordered = sorted(starts.items(), key=lambda item: blake2b(item[0].encode(), digest_size=8).digest())
    rows = iter({"text": text, "label": label} for text, label in ordered)
    paths = {}
    for split, size in SIZES.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(next(rows)) + "\n" for _ in range(size)), encoding="utf-8")
        paths[split] = str(path)
    return paths


def study(folder: Path) -> dict[str, object]:
    """Grids are centred where a first look put each arm's best; the search still has to find it inside its grid.

    Fewer seeds than the defaults: `lora` on 5 instead of 12, the two best rates on 2 instead of 3. 29 trials with them,
    4 more where a grid is extended.
    """
    return {
        "model": named(assets() / "minilm"),
        "task": {"kind": "classify", **write_rows(folder), "length": 64, "head_lr": 1e-3},
        "arms": [{"method": "full", "lr": 1e-4}, {"method": "lora", "lr": 1e-3}, {"method": "lora-ga", "lr": 1e-3}],
        "rank": 8,
        "alpha": 16,
        "rates": {"count": 4, "ratio": 3.0, "seeds": 2, "extensions": 1},
        "seeds": 3,
        "baseline_seeds": 5,
        "train": {"steps": 60, "batch_size": 16, "eval_every": 15},
        "output": str(folder),
    }


def prepared(folder: Path, workers: int) -> list[str]:
    """The command that runs the study in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study(folder), sort_keys=False), encoding="utf-8")
    return [sys.executable, "-m", "loralign", "compare", str(file), "--workers", str(workers)]


def prove_resume(whole: Path, workers: int, kills: int = 3) -> int:
    cut = whole.with_name(f"{whole.name}-killed")
    command, draw = prepared(cut, workers), random.Random()
    for _ in range(kills):
        wait = draw.uniform(40, 160)
        running = subprocess.Popen(command, start_new_session=True)
        try:
            running.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            print(f"-- killed after {wait:.1f} s, going on", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        return code
    same = repeatable(whole) == repeatable(cut)
    pictures = [p for p in ("rates.png", "steps.png") if (whole / p).read_bytes() != (cut / p).read_bytes()]
    trials = len(repeatable(whole)["trials"])
    print(f"{trials} trials, statistics and table: {'equal to the last bit' if same else 'DIFFERENT'}")
    print(f"pictures without seconds: {'equal to the last bit' if not pictures else f'DIFFERENT: {pictures}'}")
    return 0 if same and not pictures else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compare-demo"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prove-resume", action="store_true")
    args = parser.parse_args()
    started = time.monotonic()
    code = subprocess.run(prepared(args.output, args.workers), check=False).returncode
    print(f"{(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    return code or (prove_resume(args.output, args.workers) if args.prove_resume else 0)


if __name__ == "__main__":
    sys.exit(main())
