"""`loralign compare`: run a study with one or several workers, then say what came out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loralign.types import WorkFailed

if TYPE_CHECKING:
    from loralign.compare.spec import Outcome, Spec, Trial


def spec_of(study: Path, overrides: Sequence[str]) -> Spec:
    from loralign.config_study import load_study
    from loralign.config_yaml import override, read_yaml
    from loralign.train.model import hidden_size

    content = read_yaml(study)
    for text in overrides:
        override(content, text)
    return load_study(study, overrides, hidden_size(str(content.get("model", ""))))


def run_here(spec: Spec) -> bool:
    """This process works until nothing is left or the budget is spent; True when the study is complete."""
    from loralign.compare.runner import Resident
    from loralign.compare.study import Store, wanted, work

    done = Store(spec).outcomes()
    if all(t.key in done for t in wanted(spec, done)):
        return True
    return work(spec, Resident(spec).run, on_done=tell)


def tell(trial: Trial, outcome: Outcome, number: int, total: int) -> None:
    """One line per finished trial."""
    loss = f"{outcome.losses[-1]:.4f}" if outcome.losses else "–"
    end = "diverged" if outcome.diverged else "given up" if outcome.pruned else loss
    where = f"seed {trial.seed}" if trial.phase == "seed" else "rate"
    print(f"[{number}/{total}] {trial.arm} at {trial.lr:g}, {where}: {end} in {outcome.total_s:.0f} s", flush=True)


def run_workers(study: Path, overrides: Sequence[str], count: int) -> None:
    """`count` processes on this machine; GPUs are dealt out round robin. A worker that fails fails the command."""
    import torch

    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "loralign", "compare", str(study), "--worker"]
    command += [part for text in overrides for part in ("--set", text)]
    workers = []
    for i in range(count):
        given = {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus > 1 else {}
        workers.append(subprocess.Popen(command, env={**os.environ, **given}))
        time.sleep(0.2)
    try:
        codes = [w.wait() for w in workers]
    finally:
        for w in workers:
            w.terminate()
    if any(codes):
        raise WorkFailed(f"{sum(map(bool, codes))} of {count} workers failed; what they finished is kept, run again")


def say_result(spec: Spec) -> None:
    """Write the report and print table and sentences."""
    from rich.console import Console

    from loralign.compare.report import report, sentences, terminal_table

    result, edges = report(spec)
    Console().print(terminal_table(result, edges))
    for line in sentences(result):
        print(line)
    print(f"{spec.output}: results.json, results.csv, rates.png, steps.png, seconds.png")
