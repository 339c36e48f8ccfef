"""A real study on the CPU: MiniLM on BBC News, `full`, `lora` and `lora-ga`, each at its own tuned learning rate.

    python scripts/compare_demo.py [--output runs/compare-demo] [--workers 2]

Writes the rows (split by a hash of the text) and the study file, then runs `loralign compare` on it. Stopped at any
moment, the same command goes on where it was and ends with the same table. About 15 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import yaml

SIZES = {"train": 640, "valid": 160, "test": 320}
WORDS = 48
"""Of the start of an article: enough to tell its topic, mostly."""


def assets() -> Path:
    chosen = os.environ.get("LORALIGN_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"


def write_rows(folder: Path) -> dict[str, str]:
    """Disjoint splits; which article goes where depends on its text alone."""
    lines = (assets() / "bbc" / "all.jsonl").read_text(encoding="utf-8").splitlines()
    unique = {row["text"]: row["label"] for row in map(json.loads, lines)}
    ordered = sorted(unique.items(), key=lambda item: blake2b(item[0].encode(), digest_size=8).digest())
    rows = iter({"text": " ".join(text.split()[:WORDS]), "label": label} for text, label in ordered)
    paths = {}
    for split, size in SIZES.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(next(rows)) + "\n" for _ in range(size)), encoding="utf-8")
        paths[split] = str(path)
    return paths


def study(folder: Path) -> dict[str, object]:
    """Grids are centred where a first look put each arm's best; the search still has to find it inside its grid."""
    return {
        "model": str(assets() / "minilm"),
        "task": {"kind": "classify", **write_rows(folder), "length": 64, "head_lr": 1e-3},
        "arms": [{"method": "full", "lr": 1e-4}, {"method": "lora", "lr": 1e-3}, {"method": "lora-ga", "lr": 1e-3}],
        "rank": 8,
        "alpha": 16,
        "rates": {"count": 5, "ratio": 3.0},
        "seeds": 3,
        "train": {"steps": 60, "batch_size": 16, "eval_every": 15},
        "output": str(folder),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compare-demo"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "study.yaml"
    file.write_text(yaml.safe_dump(study(args.output), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "loralign", "compare", str(file), "--workers", str(args.workers)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
