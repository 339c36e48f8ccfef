"""A study file of MiniLM on BBC News, run on the CPU with the rows of compare_demo.py: first 48 words, five topics.

    python scripts/assets.py minilm && python scripts/assets.py bbc       once, on a fresh machine
    python scripts/cpu_study.py scripts/studies/axes-minilm.yaml --output runs/axes-minilm [--workers 2]

Stopped at any moment, the same command goes on where it was. A journal beside the study file is continued.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from asset_cache import cache_dir
from compare_demo import write_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    journal, known = args.output / "study" / "study.journal", args.study.parent / "study.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    if known.exists() and not journal.exists():
        shutil.copy(known, journal)
    rows = write_rows(args.output)
    given = {"model": str(cache_dir() / "minilm"), "output": str(journal.parent)}
    given |= {f"task.{split}": path for split, path in rows.items()}
    command = [sys.executable, "-P", "-m", "loralign", "compare", str(args.study), "--workers", str(args.workers)]
    return subprocess.run([*command, *(part for k, v in given.items() for part in ("--set", f"{k}={v}"))]).returncode


if __name__ == "__main__":
    sys.exit(main())
