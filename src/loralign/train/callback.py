"""The callback that drives a recipe inside a Trainer: slot events, episodes, our part of checkpoints, "it acted"."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from loralign.carrier.abilities import drops_layers
from loralign.carrier.sites import sync_config
from loralign.evidence import Spent
from loralign.optim.pairs import PairOptimizer
from loralign.plan.course import idle
from loralign.train.checkpoint import Note, read_note, read_state, settings_of
from loralign.train.driver import Driver, Observe
from loralign.train.episodes import Gather
from loralign.train.saves import check_resumed, complete, reopen
from loralign.train.start import Storage
from loralign.types import LoralignError, Recipe, WorkFailed

log = logging.getLogger("loralign")


class RecipeCallback(TrainerCallback):
    """One run of one recipe.

    Attributes for the curious: `optimizer`, `driver`, `unreached`, `spent` and `evidence` (what it cost and, per
    site, what the start holds).
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PeftModel,
        stored: Mapping[str, Storage],
        *,
        resume_from: Path | None = None,
        keep: int | None = None,
        spent: Spent | None = None,
        wrapped: Callable[[], nn.Module] | None = None,
        evidence: Mapping[str, Any] | None = None,
        gather: Gather | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.recipe, self.model, self.stored = recipe, model, dict(stored)
        self.resume_from, self.keep = resume_from, keep
        self.spent, self.evidence = spent or Spent(), dict(evidence or {})
        self.wrapped = wrapped or (lambda: model)
        self.gather, self.observe = gather, observe
        self.steps_seen = 0
        self.optimizer: PairOptimizer | None = None
        self.driver: Driver | None = None
        self.unreached: set[str] = set(stored)
        self.ranks: list[tuple[int, dict[str, int]]] = []
        """(step, slots that live by site) at every entry of the log, where a rule decides about slots."""
        self.course: Callable[[int], float] | None = None
        """The learning-rate schedule's factor by step, where it is one."""

    def adopt(self, optimizer: PairOptimizer) -> PairOptimizer:
        """Remember the optimizer that the Trainer asked for."""
        self.optimizer = optimizer
        self.driver = Driver(self.recipe, self.model, optimizer, gather=self.gather, observe=self.observe)
        optimizer.norms.late = all(p.is_cuda and not isinstance(p, DTensor) for p in self.model.parameters())
        return optimizer

    def _driver(self) -> Driver:
        self._own()
        assert self.driver is not None
        return self.driver

    def summary(self) -> str:
        """What became of the budget of slots, where a rule decides about it and the run has begun."""
        return self.driver.summary() if self.driver is not None and self.driver.allocates else ""

    def _own(self) -> PairOptimizer:
        if self.optimizer is None:
            raise WorkFailed("the trainer did not build its optimizer from the recipe: was one passed by `optimizers`?")
        return self.optimizer

    # -------------------------------------------------------------------------------------------------- Trainer events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._own().between and self.steps_seen:
            raise LoralignError(
                f"this trainer has trained already, and {self.recipe.name} is timed by the steps of one run: build a "
                "new trainer for another one"
            )
        self._check_wrapped(args)
        if (said := idle(self.recipe, state.max_steps)) and args.max_steps <= 0:  # else `attach` knew
            log.warning("%s", said)
        lambdas = getattr(kwargs.get("lr_scheduler"), "lr_lambdas", None)
        self.course = lambdas[0] if lambdas else None
        if self.resume_from is None:
            self._driver().begin(state.max_steps)
        else:
            note = read_note(self.resume_from)
            if note.step != state.global_step:
                raise LoralignError(
                    f"attached to resume from step {note.step}, but the trainer starts at {state.global_step}"
                )
            self._driver().begin(
                state.max_steps, step=note.step, episode=note.episode, episode_start=note.episode_start
            )
            self._driver().load(read_state(self.resume_from))
            sync_config(self.model)
            check_resumed(self.resume_from, state)
        if self.resume_from is None and state.global_step > 0:
            raise LoralignError(
                f"the trainer resumes at step {state.global_step}: "
                "call attach(trainer, recipe, resume_from=<that folder>)"
            )

    def _check_wrapped(self, args: Any) -> None:
        """Several processes must train one model; a Trainer that evaluated before `train()` no longer wraps it."""
        alone = args.parallel_mode != ParallelMode.DISTRIBUTED or self.wrapped() is not self.model
        if not alone and not any(isinstance(p, DTensor) for p in self.model.parameters()):
            raise WorkFailed(
                "the processes would train apart, because the trainer evaluated before train(): set eval_on_start=True "
                "in its arguments instead"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._driver().before_step(self.course)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._own()
        if optimizer.steps_here == self.steps_seen:
            self._driver().skipped_step()  # by the scaler of fp16: a gradient overflowed
            return
        self.steps_seen = optimizer.steps_here
        self.unreached -= optimizer.reached
        if self.steps_seen == 1:
            self._acted(optimizer)
        self._driver().after_optimizer_step()

    def _acted(self, optimizer: PairOptimizer) -> None:
        total = len(optimizer.sites)
        log.info("%s: applied to %d/%d pairs", self.recipe.name, optimizer.applied, total)
        silent = sorted(set(optimizer.sites) - optimizer.reached - optimizer.asleep)
        rests = all("expert" in name for name in silent) or drops_layers(self.model.get_base_model())
        if silent and not rests:  # those that rest may be reached later; what never was is named at the end
            raise WorkFailed(
                f"{len(silent)} of {total} adapted modules got no gradient, {silent[0]} first: the model's forward "
                "does not use them; name them in `exclude`"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._own().norms.check()
        self._driver().end_step(state.global_step)
        reopen(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._own().norms.check()
        reopen(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self.optimizer is not None:
            logs["grad_norm"] = self.optimizer.grad_norm
            if self._driver().allocates:
                ranks = self._driver().ranks()
                logs["slots"] = sum(ranks.values())
                self.ranks.append((state.global_step, ranks))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        driver = self._driver()
        saved = driver.state()  # on every rank: sharded tensors are gathered
        episode, start = driver.episodes.position
        links = driver.episodes.links()
        stored = {n: replace(s, **links[n]._asdict()) for n, s in self.stored.items()}
        settings = settings_of(self.recipe)
        note = Note(self.recipe.name, state.global_step, stored, episode, start, settings=settings)
        complete(args, state, note, saved, self.keep)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._own().norms.check()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._driver().load(read_state(Path(state.best_model_checkpoint)))
            sync_config(self.model)
        if idle(self.recipe, state.global_step) and not idle(self.recipe, state.max_steps):
            log.info("%s: stopped after step %d, before its rule acted", self.recipe.name, state.global_step)
        elif (said := self._driver().unfinished()) and self.steps_seen:
            log.warning("%s", said)
        self._driver().close()
        if said := self.summary():
            log.info("%s: %s", self.recipe.name, said)
        if self.unreached and self.steps_seen:
            log.warning("%d adapted modules never got a gradient: %s", len(self.unreached), sorted(self.unreached)[:5])
