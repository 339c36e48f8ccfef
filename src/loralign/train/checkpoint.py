"""What a checkpoint holds besides the adapter: a note, written last, and the state that cannot be read from A and B.

checkpoint-N/loralign.json                 recipe, step, episode, storage of the sites; written last, so "complete"
checkpoint-N/loralign_state.safetensors    rule states, dead slots, live tensors of forms (only where there are any)
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from loralign.train.adapt import Storage
from loralign.types import LoralignError

log = logging.getLogger("loralign")

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
    body = {"format": FORMAT, "recipe": note.recipe, "step": note.step, "storage": stored}
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
    return Note(body["recipe"], body["step"], stored, body["episode"], body["episode_start"])


def read_state(folder: Path) -> dict[str, Tensor]:
    """Rule states, dead slots and forms' live tensors; {} where a method has none."""
    path = folder / STATE
    return load_file(path) if path.exists() else {}


def last_complete(output: Path) -> Path | None:
    """The newest checkpoint whose writing was finished, or None; a kill in the middle of a save leaves an older one."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / NOTE).exists()]
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


# ------------------------------------------------------------------------------------------ inside a Trainer's callback


class AlreadyTrained(LoralignError):
    """Nothing is left to train: the checkpoint is the end of its run."""


def check_resumed(folder: Path, state: Any) -> None:
    """A Trainer has read `folder`: find its best checkpoint again, and stop where nothing is left to train.

    The Trainer forgets a best checkpoint that is not where it was, as after a run was moved; and it takes one step more
    than `max_steps` when the checkpoint is the last one.
    """
    best = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("best_model_checkpoint")
    if best and state.best_model_checkpoint is None:
        beside = folder.parent / Path(best).name
        if beside.is_dir():
            state.best_model_checkpoint = str(beside)
        else:
            log.warning("the best checkpoint so far, %s, is gone: the best from here on counts", Path(best).name)
            state.best_metric = None
    if state.global_step >= state.max_steps:
        raise AlreadyTrained(f"{folder.name} is the end of its run ({state.max_steps} steps): nothing is left to train")


def reopen(args: Any, state: Any, control: Any) -> None:
    """A checkpoint of an earlier attempt that is about to be written over is no longer complete."""
    if args.should_save and (control.should_save or args.save_strategy == "best"):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / NOTE).unlink(missing_ok=True)


def complete(args: Any, state: Any, note: Note, tensors: Mapping[str, Tensor], keep: int | None) -> None:
    """After the Trainer's own save: our part, then rotation, so that a complete checkpoint is there at any moment."""
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    if args.should_save and folder.is_dir():
        write_checkpoint(folder, note, tensors)
        rotate_checkpoints(args.output_dir, keep, state.best_model_checkpoint, use_mtime=True)


class CheckpointCallback(TrainerCallback):
    """Complete checkpoints for a run without adapter."""

    def __init__(self, name: str, resume_from: Path | None) -> None:
        self.name, self.resume_from = name, resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resume_from is not None:
            check_resumed(self.resume_from, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reopen(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        complete(args, state, Note(self.name, state.global_step, {}), {}, args.save_total_limit)
