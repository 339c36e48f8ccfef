"""How a run ends: by its steps or by patience, or before, when it had ended already; one that changed nothing fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback

from loralign.carrier.sites import factors, sites
from loralign.io.card import note_verified
from loralign.io.verify import VerifyJob, verify_many
from loralign.train.saves import AlreadyTrained
from loralign.types import Full, LoralignError, Recipe, VerificationFailed, WorkFailed

log = logging.getLogger("loralign")

SAMPLE = 4096
"""Numbers of each trained tensor that are kept for comparison."""


class Patience(EarlyStoppingCallback):
    """Early stopping that remembers, in a resumed run, that it had stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            raise AlreadyTrained(f"the run had ended at step {state.global_step} by `train.patience`")


def train_to_the_end(trainer: Any, resume_from: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except AlreadyTrained as done:  # it was stopped between its last checkpoint and the end of its export
        log.info("%s; exporting", done)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        trainer.is_in_train = False
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def samples(model: nn.Module, recipe: Recipe | Full) -> list[Tensor]:
    """What `check_moved` compares with; of an adapter nothing, as its update starts at zero."""
    if isinstance(recipe, Recipe):
        return []
    return [_sample(p).clone() for p in model.parameters() if p.requires_grad]


def _sample(p: Tensor) -> Tensor:
    return p.detach().flatten()[:SAMPLE].float()


def check_moved(trainer: Any, model: Any, recipe: Recipe | Full, before: list[Tensor]) -> None:
    """Raise WorkFailed where every update is zero, with the reason."""
    if isinstance(recipe, Recipe):
        moved = any(_adds_something(*factors(site)) for site in sites(model))
    else:
        trained = [_sample(p) for p in model.parameters() if p.requires_grad]
        moved = any(not torch.equal(a.cpu(), b.cpu()) for a, b in zip(trained, before, strict=True))
    if not moved:
        raise WorkFailed(f"the run moved nothing: every update is zero after {_steps(trainer)}; nothing is exported")


def _adds_something(A: Tensor, B: Tensor) -> bool:
    """Whether a slot has both sides; a slot with one of them zero adds nothing."""
    return bool((A.any(dim=1) & B.any(dim=0).to(A.device)).any())


def _steps(trainer: Any) -> str:
    total = trainer.state.global_step
    if total <= max(1, trainer.args.get_warmup_steps(trainer.state.max_steps)):
        return f"{total} steps of warm-up, the first of which has rate 0: raise `train.steps` or set `train.warmup: 0`"
    return f"{total} steps: look at the learning rate, `options` and whether the rows give gradients"


def proven(folders: Sequence[Path], base: str) -> bool:
    """Verify what moments left and state it in their cards; whether all of them move the logits enough to tell."""
    reports = verify_many([VerifyJob(folder, base) for folder in folders])
    for folder, report in zip(folders, reports, strict=True):
        if not report.passed:
            raise (LoralignError if report.kind == "input" else VerificationFailed)(report.failure)
        note_verified(folder, report.proven or report.line())
        if not report.proven:
            log.warning("%s: %s", folder.name, report.line())
    return all(report.proven for report in reports)
