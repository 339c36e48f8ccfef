"""Where a run may begin, and what it was begun with: `--resume` goes on with the same, or says what differs.

`checkpoints/begun.json` holds an id of the run, which its checkpoints repeat, and the settings that the result depends
on: the base model and the rows by their content, the recipe, the optimisation. Not among them are where files lie
(model, data, output, cache), secrets and what only watches the run (logging, trackers, checkpoints).
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralign.io.content import model_print
from loralign.io.folder import check_place
from loralign.io.json_file import read_json
from loralign.io.provenance import write_text
from loralign.io.public import scrub
from loralign.train.checkpoint import BEGUN, NOTE, best_of, fault_of, numbered, remove, rotate, run_in, step_of
from loralign.train.job import Job
from loralign.types import Full, LoralignError

log = logging.getLogger("loralign")

FORMAT = 2
FREE = ("train.lr_source", "train.save_every", "train.keep", "train.log_every", "train.report_to", "train.workers")


def check_output(folder: Path) -> None:
    """The output folder is free and can be made; found before anything is spent."""
    if folder.is_dir() and any(p.is_file() for p in folder.rglob("*")):
        raise LoralignError(f"{folder} is not empty: choose another output folder, or --resume the run in it")
    check_place(folder, " in `output`")


@dataclass(frozen=True)
class Begun:
    """What a run began with; run is "" and `model` missing where an older loralign began it."""

    run: str
    settings: Mapping[str, str]


def read_begun(output: Path) -> Begun:
    path = output / "checkpoints" / BEGUN
    try:
        body = read_json(path)
        settings = body["settings"] if "format" in body else body
        return Begun(str(body.get("run", "")), {str(k): str(v) for k, v in settings.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LoralignError(
            f"cannot resume {output}: its checkpoints/{BEGUN} is missing or damaged; begin a run elsewhere"
        ) from None


def resume_point(output: Path) -> Path | None:
    """The last checkpoint of the run whose parts are all as they were written; newer ones are named. None: the run was
    stopped before its first one was complete, and begins anew."""
    folder = output / "checkpoints"
    if not output.exists():
        raise LoralignError(f"nothing to resume: there is no folder {output}; run without --resume")
    faults: list[str] = []
    found = numbered(folder)
    run = read_begun(output).run if found else ""
    for checkpoint in found:
        fault = fault_of(checkpoint, run)
        if not fault:
            for said in faults:
                log.warning("%s; going on from %s", said, checkpoint.name)
            return checkpoint
        faults.append(fault)
    if any((checkpoint / NOTE).is_file() for checkpoint in found):
        raise LoralignError(
            f"nothing to resume in {output}: {faults[0]}, and there is no other one; delete "
            f"{output}, run without --resume"
        )
    if not (folder / BEGUN).is_file() and any(p.is_file() for p in output.rglob("*")):
        raise LoralignError(f"nothing to resume in {output}: it holds no run; choose another output folder")
    if (output / "run.json").is_file():  # written last
        raise LoralignError(
            f"the run in {output} has ended, and kept no checkpoint to go on from (`train.save_every` was omitted): "
            "name another `output` for a new run"
        )
    log.warning("no checkpoint of the run in %s is complete: it begins anew", output)
    return None


def clear_way(point: Path, run: str, keep: int | None) -> None:
    """Later checkpoints were cut off or damaged; one of another run is put aside, under a name that says so."""
    for later in numbered(point.parent):
        if step_of(later) <= step_of(point):
            continue
        if run_in(later) not in (None, run):
            aside = later.with_name(f"of-another-run-{later.name}-{os.getpid()}")
            log.warning("%s is of another run: put aside as %s", later.name, aside.name)
            later.replace(aside)
        else:
            remove(later)
    rotate(point.parent, run, keep, best_of(point))


# ----------------------------------------------------------------------------------------------- with the same settings


def settings_of(job: Job, rows: Mapping[str, str]) -> dict[str, str]:
    """Key of the recipe file to its value as text; rows: fingerprints by key."""
    return {key: repr(scrub(value)) for key, value in given_settings(job, rows).items()}


def given_settings(job: Job, rows: Mapping[str, str]) -> dict[str, Any]:
    """As they were given; format 1 kept these."""
    found: dict[str, Any] = {"method": job.recipe.name, "seed": job.seed, **rows}
    found |= {f"data.{key}": getattr(job.data, key) for key in ("max_length", "assistant_only", "packing")}
    found |= {f"train.{key}": value for key, value in asdict(job.training).items()}
    r = job.recipe
    found |= {"targets": r.targets, "exclude": r.exclude, "weight_decay": r.weight_decay}
    found |= {"max_grad_norm": r.max_grad_norm}
    if not isinstance(r, Full):
        found |= {"rank": r.r, "alpha": r.alpha, "dropout": r.dropout, "ranks": dict(r.ranks)}
    found |= {key: job.source.get(key) for key in ("preset", "options")} | {"quantize": job.quantize}
    return {key: value for key, value in found.items() if key not in FREE}


def settings_and_model(job: Job, rows: Mapping[str, str]) -> dict[str, str]:
    return {**settings_of(job, rows), "model": model_print(job.model, job.revision)}


def note_beginning(output: Path, settings: Mapping[str, str]) -> None:
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for torn in numbered(folder):  # of an attempt that saved nothing
        remove(torn)
    body = {"format": FORMAT, "run": uuid.uuid4().hex, "settings": dict(settings)}
    write_text(folder / BEGUN, json.dumps(body, indent=1, ensure_ascii=False))


def check_unchanged(job: Job, rows: Mapping[str, str]) -> Begun:
    """Refuse to resume a run with other settings, rows or weights than it began with."""
    begun = read_begun(job.output)
    if begun.run:
        return check_settings(job.output, settings_and_model(job, rows), rows)
    log.warning("%s was begun by an older loralign: whether its base model is this one is not known", job.output)
    return check_settings(job.output, {key: repr(value) for key, value in given_settings(job, rows).items()}, rows)


def check_settings(output: Path, now: Mapping[str, str], rows: Collection[str]) -> Begun:
    """Refuse where the run in `output` began with other settings. rows: keys whose values are fingerprints.

    A key that the run does not name, because it is younger, was None then.
    """
    begun = read_begun(output)
    changed = [key for key in now if begun.settings.get(key, repr(None)) != now[key]]
    if not changed:
        return begun
    key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    values = f"is {_short(now[key])}, the run began with {_short(begun.settings.get(key, 'nothing'))}"
    said = f"the rows of `{key}` are not those that the run began with" if key in rows else f"`{key}` {values}"
    said = "`model` holds other weights than the run began with" if key == "model" else said
    raise LoralignError(
        f"cannot resume {output}: {said}{more}; give what it began with, or another `output` for a new run"
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
