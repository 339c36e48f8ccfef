"""CPU seconds that short commands take from the shell to their answer.

    python benchmarks/bench_start.py [--repeat 5]

The least of some runs, each a process of its own: user and system time, so that other work counts little.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = {
    "--help": "nothing but the command line",
    "--version": "",
    "methods": "the table of methods, which needs torch",
    "plan bad.yaml": "the answer to a bad recipe",
    "train none.yaml": "the answer to no recipe",
    "compare bad.yaml": "the answer to a bad study",
}


def seconds(words: list[str], folder: Path) -> float:
    """CPU seconds of one call."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "loralign", *words], cwd=folder, capture_output=True, check=False)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bad.yaml").write_text(
            "model: m\ndata: {train: t.jsonl}\noutput: o\nmethod: lorra\n", encoding="utf-8"
        )
        torch = [sys.executable, "-c", "import torch"]
        before = os.times()
        subprocess.run(torch, check=True)
        after = os.times()
        for call, why in COMMANDS.items():
            took = min(seconds(call.split(), Path(folder)) for _ in range(args.repeat))
            print(f"loralign {call:18} {took:5.2f} s   {why}")
    alone = after.children_user - before.children_user + after.children_system - before.children_system
    print(f"of which import torch    {alone:5.2f} s")


if __name__ == "__main__":
    main()
