"""What a checkpoint holds besides the adapter: a note, written last, and the state that cannot be read from A and B.

checkpoint-N/loralign.json                 recipe, step, episode, storage of the sites; written last, so "complete"
checkpoint-N/loralign_state.safetensors    rule states, dead slots, live tensors of forms (only where there are any)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from loralign.train.adapt import Storage
from loralign.types import LoralignError

NOTE, STATE = "loralign.json", "loralign_state.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Note:
    """The part of a checkpoint that is plain data. episode_start: optimizer step at which the episode began."""

    recipe: str
    step: int
    storage: Mapping[str, Storage]
    episode: int = 0
    episode_start: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name in the same folder, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_checkpoint(folder: Path, note: Note, state: Mapping[str, Tensor]) -> None:
    """Add our state to a finished Trainer checkpoint; the note goes last."""
    if state:
        temporary = folder / f".{STATE}.{os.getpid()}.tmp"
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, temporary)
        temporary.replace(folder / STATE)
    stored = {name: [s.r, s.twin, s.train] for name, s in note.storage.items()}
    body = {"format": FORMAT, "recipe": note.recipe, "step": note.step, "storage": stored, "facts": dict(note.facts)}
    body |= {"episode": note.episode, "episode_start": note.episode_start}
    write_atomically(folder / NOTE, json.dumps(body))


def read_note(folder: Path) -> Note:
    """The note of a complete checkpoint."""
    try:
        body = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoralignError(f"{folder.name} is not a complete loralign checkpoint: it has no {NOTE}") from None
    if body.get("format") != FORMAT:
        raise LoralignError(f"{folder.name} was written by another version of loralign (format {body.get('format')})")
    stored = {name: Storage(int(r), bool(twin), train) for name, (r, twin, train) in body["storage"].items()}
    return Note(body["recipe"], body["step"], stored, body["episode"], body["episode_start"], body["facts"])


def read_state(folder: Path) -> dict[str, Tensor]:
    """Rule states, dead slots and forms' live tensors; {} where a method has none."""
    path = folder / STATE
    return load_file(path) if path.exists() else {}


def last_complete(output: Path) -> Path | None:
    """The newest checkpoint whose writing was finished, or None; a kill in the middle of a save leaves an older one."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / NOTE).exists()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
