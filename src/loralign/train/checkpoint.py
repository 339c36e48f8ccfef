"""What a checkpoint holds besides the adapter: a note, written last, and the state that cannot be read from A and B.

checkpoint-N/loralign.json                 run, recipe, step, episode, storage of the sites, size and sha256 of every
                                           other file; written last, when all of them are on the disk, so "complete"
checkpoint-N/loralign_state.safetensors    rule states, dead slots, live tensors of forms (only where there are any)
begun.json                                 the run that the checkpoints beside it are of (`train/begun.py`)
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralign.carrier.stored import WEIGHTS, sha256
from loralign.io.described import described, first_difference
from loralign.io.json_file import read_json
from loralign.io.provenance import write_text
from loralign.io.public import scrub
from loralign.train.start import Storage
from loralign.types import LoralignError, Recipe

log = logging.getLogger("loralign")

NOTE, STATE, BEGUN = "loralign.json", "loralign_state.safetensors", "begun.json"
FORMAT = 2


@dataclass(frozen=True)
class Note:
    """The part of a checkpoint that is plain data. episode_start: optimizer step at which the episode began."""

    recipe: str
    step: int
    storage: Mapping[str, Storage]
    episode: int = 0
    episode_start: int = 0
    run: str = ""
    """Of `loralign train`; "" in a trainer of one's own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe as plain data (`io.described`) but for its start, which is not repeated; none in older ones."""
    parts: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Size and sha256 by name; none in checkpoints of format 1."""


# ------------------------------------------------------------------------------------------------------ write and read


def write_checkpoint(folder: Path, note: Note, state: Mapping[str, Tensor]) -> None:
    """Add our state to a finished Trainer checkpoint; the note goes last, when everything else is on the disk."""
    if state:
        temporary = folder / f".{STATE}.{os.getpid()}.tmp"
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, temporary)
        temporary.replace(folder / STATE)
    parts = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NOTE and not p.name.endswith(".tmp"))
    for path in (*parts, folder):
        _to_disk(path)
    sums = {p.relative_to(folder).as_posix(): [p.stat().st_size, sha256(p)] for p in parts}
    stored = {name: [s.r, s.twin, s.train, s.frozen] for name, s in note.storage.items()}
    body = {"format": FORMAT, "run": note.run, "recipe": note.recipe, "step": note.step, "storage": stored}
    body |= {"episode": note.episode, "episode_start": note.episode_start, "settings": dict(note.settings)}
    body |= {"parts": sums}
    write_text(folder / NOTE, json.dumps(body))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_note(folder: Path) -> Note:
    """The note of a complete checkpoint."""
    try:
        body = read_json(folder / NOTE)
        if body["format"] not in (1, FORMAT):
            said = f"format {body['format']!r:.20}"
            raise LoralignError(f"{folder.name} was written by another version of loralign ({said}): use that one")
        stored = {
            name: Storage(int(r), bool(twin), train, *map(int, frozen))  # older checkpoints do not say how many
            for name, (r, twin, train, *frozen) in body["storage"].items()
        }
        parts = {str(name): (int(size), str(total)) for name, (size, total) in body.get("parts", {}).items()}
        position = int(body["episode"]), int(body["episode_start"])
        run, settings = str(body.get("run", "")), dict(body.get("settings", {}))
        return Note(str(body["recipe"]), int(body["step"]), stored, *position, run, settings, parts)
    except FileNotFoundError:
        inside = last_complete(folder)
        mend = f"; the last one in it is {inside.name}" if inside is not None else ""
        raise LoralignError(f"{folder.name} is not a complete loralign checkpoint: it has no {NOTE}{mend}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LoralignError(f"{folder.name} is damaged: its {NOTE} cannot be read") from None


def whole_note(folder: Path) -> Note:
    """The note, after every part was found as it was written."""
    note = read_note(folder)
    if fault := _torn(folder, note):
        raise LoralignError(f"{folder.name} is damaged: {fault}; delete it and resume from the one before")
    return note


def note_to_resume(folder: Path, recipe: Recipe) -> Note:
    """The note of a whole checkpoint of this recipe."""
    note = whole_note(folder)
    if note.recipe != recipe.name:
        raise LoralignError(f"{folder.name} is of {note.recipe}, not of {recipe.name}")
    changed = first_difference(note.settings, settings_of(recipe)) if note.settings else None
    if changed is not None:
        key, (was, now) = changed[0], ("the default" if x is None else x for x in changed[1:])
        raise LoralignError(
            f"{folder.name} is of a recipe with `{key}` {was}, this one has {now}: resume with the recipe that it "
            "began with"
        )
    return note


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides about the steps of a run, without paths and secrets."""
    found = dict(described(recipe))
    return {k: scrub(v) for k, v in found.items() if k.split(".")[0] not in ("init", "name")}


def fault_of(folder: Path, run: str) -> str:
    """Why a checkpoint cannot be gone on with, "" where it can. run: the one that it must be of."""
    try:
        note = read_note(folder)
    except LoralignError as error:
        return str(error)
    if note.run != run:
        return f"{folder.name} is of another run"
    if note.step != step_of(folder):
        return f"{folder.name} holds step {note.step}: it was renamed"
    fault = _torn(folder, note)
    return f"{folder.name} is damaged: {fault}" if fault else ""


def _torn(folder: Path, note: Note) -> str:
    if not note.parts:
        return _unread(folder)
    for name, (size, total) in note.parts.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if sha256(path) != total:
            return f"{name} is not as it was written"
    return ""


def _unread(folder: Path) -> str:
    """Of format 1, which has no sums: parts that are missing or empty."""
    log.warning("%s is of an older loralign, without checksums: its parts are taken as they are", folder.name)
    names = ["optimizer.pt", "scheduler.pt", "trainer_state.json"]
    names += [p.name for p in folder.glob("*.safetensors")] or [WEIGHTS]
    empty = [n for n in names if not (folder / n).is_file() or not (folder / n).stat().st_size]
    return f"{empty[0]} is missing or empty" if empty else ""


def read_state(folder: Path) -> dict[str, Tensor]:
    """Rule states, dead slots and forms' live tensors; {} where a method has none."""
    path = folder / STATE
    try:
        return load_file(path) if path.exists() else {}
    except (SafetensorError, OSError) as error:
        raise LoralignError(f"{folder.name} is damaged: its {STATE} cannot be read; delete it") from error


# --------------------------------------------------------------------------------------------------- many checkpoints


def numbered(output: Path) -> list[Path]:
    """Folders checkpoint-N, the newest first; copies, links and files of like names are none of ours."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", p.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=step_of, reverse=True)


def last_complete(output: Path) -> Path | None:
    """The newest checkpoint whose writing was finished, or None; a kill in the middle of a save leaves an older one."""
    return next((p for p in numbered(output) if (p / NOTE).is_file()), None)


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def run_of(output: Path) -> str:
    """The run whose checkpoints lie in this folder, "" where it was not `loralign train`'s."""
    try:
        return str(read_json(output / BEGUN).get("run", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def rotate(output: Path, run: str, keep: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints of this run beyond `keep`, never the newest or the best one."""
    if not keep:
        return
    ours = [p for p in numbered(output) if (p / NOTE).is_file() and run_in(p) == run]
    spared = [p for i, p in enumerate(ours) if i == 0 or p.name == Path(best or "").name]
    old = [p for p in ours if p not in spared]
    for path in old[max(0, keep - len(spared)) :]:
        remove(path)


def run_in(folder: Path) -> str | None:
    try:
        return read_note(folder).run
    except LoralignError:
        return None


def remove(checkpoint: Path) -> None:
    """Under a name of its own first: half a folder must not look like a checkpoint."""
    going = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.replace(going)
    shutil.rmtree(going, ignore_errors=True)


def best_of(folder: Path) -> str | None:
    try:
        found = read_json(folder / "trainer_state.json").get("best_model_checkpoint")
    except (OSError, ValueError, AttributeError) as error:
        raise LoralignError(f"{folder.name} is damaged: its trainer_state.json cannot be read; delete it") from error
    return None if found is None else str(found)
