"""Where a run may begin, and what it was begun with: `--resume` goes on with the same, or says what differs.

`checkpoints/begun.json` holds the settings that the result depends on: the rows by their fingerprint, the recipe, the
optimisation. Not among them are where files lie (model, data, output, cache) and what only watches the run (logging,
trackers, checkpoints).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralign.train.checkpoint import last_complete, step_of, write_atomically
from loralign.train.job import Job
from loralign.types import Full, LoralignError

BEGUN = "begun.json"
FREE = ("train.lr_source", "train.save_every", "train.keep", "train.log_every", "train.report_to", "train.workers")


def check_output(folder: Path) -> None:
    """The output folder is free and can be made; found before anything is spent."""
    if folder.is_dir():
        if any(p.is_file() for p in folder.rglob("*")):
            raise LoralignError(f"{folder.name} is not empty: choose another output folder, or --resume the run in it")
    elif folder.exists():
        raise LoralignError(f"{folder} is a file: name a folder in `output`")
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise LoralignError(f"cannot write {folder}: {above} is {_kind(above)}; name another folder in `output`")


def _kind(path: Path) -> str:
    return "not writable" if path.is_dir() else "no folder"


def resume_point(job: Job) -> Path:
    """The last complete checkpoint of a run."""
    found = last_complete(job.output / "checkpoints")
    if found is None:
        raise LoralignError(
            f"nothing to resume in {job.output.name}: no checkpoint is complete; empty it, run without --resume"
        )
    return found


def remove_half(complete: Path) -> None:
    """Later checkpoints were cut off while they were written."""
    for half in complete.parent.glob("checkpoint-*"):
        if step_of(half) > step_of(complete):
            shutil.rmtree(half)


# ----------------------------------------------------------------------------------------------- with the same settings


def settings_of(job: Job, rows: Mapping[str, str]) -> dict[str, str]:
    """Key of the recipe file to its value as text; rows: fingerprints by key."""
    found: dict[str, Any] = {"method": job.recipe.name, "seed": job.seed, **rows}
    found |= {f"data.{key}": value for key, value in asdict(job.data).items() if key not in ("train", "eval")}
    found |= {f"train.{key}": value for key, value in asdict(job.training).items()}
    r = job.recipe
    found |= {"targets": r.targets, "exclude": r.exclude, "weight_decay": r.weight_decay}
    found |= {"max_grad_norm": r.max_grad_norm}
    if not isinstance(r, Full):
        found |= {"rank": r.r, "alpha": r.alpha, "dropout": r.dropout, "ranks": dict(r.ranks)}
    found |= {key: job.source.get(key) for key in ("preset", "options")}
    return {key: repr(value) for key, value in found.items() if key not in FREE}


def note_beginning(job: Job, rows: Mapping[str, str]) -> None:
    folder = job.output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BEGUN, json.dumps(settings_of(job, rows), indent=1, ensure_ascii=False))


def check_unchanged(job: Job, rows: Mapping[str, str]) -> None:
    """Refuse to resume a run with other settings than it began with."""
    path = job.output / "checkpoints" / BEGUN
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LoralignError(
            f"cannot resume {job.output.name}: its checkpoints/{BEGUN} is missing or damaged; begin a run elsewhere"
        ) from None
    now = settings_of(job, rows)
    changed = [key for key in now if before.get(key) != now[key]]
    if not changed:
        return
    key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    values = f"is {_short(now[key])}, the run began with {_short(before.get(key, 'nothing'))}"
    said = f"the rows of `{key}` are not those that the run began with" if key in rows else f"`{key}` {values}"
    raise LoralignError(
        f"cannot resume {job.output.name}: {said}{more}; give what it began with, or another `output` for a new run"
    )


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "…"
