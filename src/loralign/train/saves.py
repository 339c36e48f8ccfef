"""Checkpoints inside a Trainer's callback: which one it went on from, writes over, or has written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from loralign.io.public import make_public, remove_private
from loralign.train.checkpoint import NOTE, Note, best_of, rotate, run_of, write_checkpoint
from loralign.types import LoralignError

log = logging.getLogger("loralign")

USUAL_SAVES = 500
"""Steps between checkpoints, where nobody says how many."""


class AlreadyTrained(LoralignError):
    """Nothing is left to train: the checkpoint is the end of its run."""


def keep_some(args: Any, steps: int) -> None:
    """Checkpoints for a run of so many steps, for which none were asked: a kill would cost all of a long one."""
    if args.save_strategy == "no" and steps > USUAL_SAVES:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, USUAL_SAVES
        log.info("a checkpoint every %d of %d steps (`train.save_every` is not given)", USUAL_SAVES, steps)


def check_resumed(folder: Path, state: Any) -> None:
    """A Trainer has read `folder`: find its best checkpoint again, and stop where nothing is left to train.

    The Trainer forgets a best checkpoint that is not where it was, as after a run was moved; and it takes one step more
    than `max_steps` when the checkpoint is the last one.
    """
    best = best_of(folder)
    if best and state.best_model_checkpoint in (None, best):
        beside = folder.parent / Path(best).name
        if beside.is_dir():
            state.best_model_checkpoint = str(beside)
        else:
            log.warning("the best checkpoint so far, %s, is gone: the best from here on counts", Path(best).name)
            state.best_model_checkpoint, state.best_metric = None, None
    if state.global_step >= state.max_steps:
        raise AlreadyTrained(f"{folder.name} is the end of its run ({state.max_steps} steps): nothing is left to train")


def reopen(args: Any, state: Any, control: Any) -> None:
    """A checkpoint of an earlier attempt that is about to be written over is no longer complete."""
    if args.should_save and (control.should_save or args.save_strategy == "best"):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / NOTE).unlink(missing_ok=True)


def complete(args: Any, state: Any, note: Note, tensors: Mapping[str, Tensor], keep: int | None) -> None:
    """After the Trainer's own save: our part, then rotation, so that a complete checkpoint is there at any moment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process has written its part
    output = Path(args.output_dir)
    folder = output / f"checkpoint-{state.global_step}"
    if args.should_save and folder.is_dir():
        run = run_of(output)
        if run:
            make_public(folder)
            remove_private(folder)
            (output / "README.md").unlink(missing_ok=True)  # TRL's card; ours is one level above
        write_checkpoint(folder, replace(note, run=run), tensors)
        rotate(output, run, keep, state.best_model_checkpoint)


class CheckpointCallback(TrainerCallback):
    """Complete checkpoints for a run without adapter."""

    def __init__(self, name: str, resume_from: Path | None, keep: int | None) -> None:
        self.name, self.resume_from, self.keep = name, resume_from, keep

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resume_from is not None:
            check_resumed(self.resume_from, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reopen(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        complete(args, state, Note(self.name, state.global_step, {}), {}, self.keep)
