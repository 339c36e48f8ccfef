"""Proof of an export: a new Python process, without loralign, loads the folder and must reproduce the stored logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import peft
import safetensors
import torch
import transformers

from loralign.maths.given import checked
from loralign.types import LoralignError, VerificationFailed, WorkFailed

SCRIPT = Path(__file__).with_name("clean_process.py")


@dataclass(frozen=True)
class VerifyJob:
    """A folder to verify; base: folder, GGUF file or hub id of the base model, None: what the folder says."""

    folder: Path | str
    base: Path | str | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What the clean process found. Figures are nan where it did not get so far."""

    folder: str
    kind: Literal["ok", "input", "verification"]
    failure: str = ""
    profile: str = ""
    base: str = ""
    largest: float = float("nan")
    """Largest absolute difference of logits."""
    mean: float = float("nan")
    relative: float = float("nan")
    """‖difference‖ / ‖stored logits‖."""
    top1: float = float("nan")
    """Share of positions with the same top choice."""
    tolerance: float = float("nan")
    """Allowed relative difference."""
    effect: float = float("nan")
    """Relative change of the base's logits by the adapter, for comparison."""
    update: float = float("nan")
    """Relative difference of the updates, logits − base logits, where the tolerance is no fine measure of them."""
    proven: bool = True
    """Whether a scale that is wrong by a tenth would have shown."""
    lost: float = 0.0
    """Relative difference to the trained model that the export stated (bf16, truncation, merging), 0 if exact."""
    device: str = ""
    dtype: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind == "ok"

    def line(self) -> str:
        """The outcome in one sentence."""
        if not self.passed:
            return self.failure
        stated = f"; the export itself lost {self.lost:.1e}" if self.lost else ""
        update = f", the updates by {self.update:.1%}" if self.update == self.update else ""
        said = (
            f"logits differ by at most {self.largest:.1e}, {self.mean:.1e} on average, {self.relative:.1e} relative "
            f"({self.tolerance:.0e} allowed){update}, the top choice agrees in {self.top1:.1%}; "
            f"the adapter moves them by {self.effect:.1%}{stated}."
        )
        if self.proven:
            return f"Verified in a clean process ({self.dtype}, {self.device}): {said}"
        return f"Not proven, the adapter moves too little for it ({self.dtype}, {self.device}): {said}"


@checked
def verify(folder: Path | str, base: Path | str | None = None) -> VerifyReport:
    """Reload one exported folder in a clean process and compare logits on its stored probes.

    Raises:
        LoralignError: no such folder, no adapter in it, a base that cannot be loaded.
        VerificationFailed: damaged or not finite tensors, or other logits than stored.
    """
    (report,) = verify_many([VerifyJob(folder, base)])
    if report.kind == "input":
        raise LoralignError(report.failure)
    if report.kind == "verification":
        raise VerificationFailed(report.failure)
    return report


def verify_many(jobs: Sequence[VerifyJob]) -> list[VerifyReport]:
    """Verify many folders in one clean process; failures are in the reports, nothing is raised for them."""
    asked = [
        {"folder": os.path.abspath(job.folder), "base": None if job.base is None else _reference(job.base)}
        for job in jobs
    ]
    with tempfile.TemporaryDirectory(prefix="loralign-verify-") as room:
        question, answer = Path(room, "jobs.json"), Path(room, "results.json")
        question.write_text(json.dumps(asked), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPT), json.dumps(_import_paths()), str(question), str(answer)],
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise WorkFailed(f"the clean process ended with code {done.returncode} before it had results: {last}")
        results = json.loads(answer.read_text(encoding="utf-8"))
    return [VerifyReport(folder=str(job.folder), **result) for job, result in zip(jobs, results, strict=True)]


def _reference(base: Path | str) -> str:
    """Absolute where it is a local path, because the clean process may run elsewhere; hub ids as they are."""
    return os.path.abspath(base) if Path(base).exists() else str(base)


def _import_paths() -> list[str]:
    """Where the packages are, for interpreters that find them by PYTHONPATH only (which -I ignores)."""
    files = [m.__file__ for m in (torch, transformers, peft, safetensors)]
    optional = (find_spec(name) for name in ("gguf", "torchao", "bitsandbytes"))
    files += [found.origin for found in optional if found is not None]
    return sorted({str(Path(str(file)).parents[1]) for file in files})
