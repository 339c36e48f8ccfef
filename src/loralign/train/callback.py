"""The callback that drives a recipe inside a Trainer: slot events, episodes, our part of checkpoints, "it acted"."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from loralign.carrier.sites import sites, sync_config
from loralign.carrier.slot import SlotLinear, live_of, whole, write
from loralign.evidence import Spent
from loralign.optim.pairs import PairOptimizer
from loralign.plan.combinations import idle
from loralign.train.adapt import Storage
from loralign.train.checkpoint import Note, check_resumed, complete, read_note, read_state, reopen
from loralign.train.episodes import Episodes
from loralign.train.events import apply_plan
from loralign.types import LoralignError, Recipe, WorkFailed

log = logging.getLogger("loralign")


class RecipeCallback(TrainerCallback):
    """One run of one recipe.

    Attributes for the curious: `optimizer`, `episodes`, `unreached`, `spent` and `evidence` (what it cost and, per
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
    ) -> None:
        self.recipe, self.model, self.stored = recipe, model, dict(stored)
        self.resume_from, self.keep = resume_from, keep
        self.spent, self.evidence = spent or Spent(), dict(evidence or {})
        self.wrapped = wrapped or (lambda: model)
        self.steps_seen = 0
        self.optimizer: PairOptimizer | None = None
        self.episodes = Episodes(recipe, model)
        self.unreached: set[str] = set(stored)

    def adopt(self, optimizer: PairOptimizer) -> PairOptimizer:
        """Remember the optimizer that the Trainer asked for."""
        self.optimizer = optimizer
        return optimizer

    def _own(self) -> PairOptimizer:
        if self.optimizer is None:
            raise WorkFailed("the trainer did not build its optimizer from the recipe: was one passed by `optimizers`?")
        return self.optimizer

    # -------------------------------------------------------------------------------------------------- Trainer events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._own()
        self._check_wrapped(args)
        if (said := idle(self.recipe, state.max_steps)) and args.max_steps <= 0:  # else `attach` knew
            log.warning("%s", said)
        self.episodes.begin(state.max_steps)
        if self.resume_from is not None:
            note = read_note(self.resume_from)
            if note.recipe != self.recipe.name:
                raise LoralignError(f"{self.resume_from.name} is of {note.recipe}, not of {self.recipe.name}")
            if note.step != state.global_step:
                raise LoralignError(
                    f"attached to resume from step {note.step}, but the trainer starts at {state.global_step}"
                )
            self.episodes.resume(note.episode, note.episode_start)
            self._load(read_state(self.resume_from))
            sync_config(self.model)
            check_resumed(self.resume_from, state)
        elif state.global_step > 0:
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
        self._own().lr_factor = self.episodes.warm_up(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._own()
        if optimizer.steps_here == self.steps_seen:
            return  # skipped by the scaler of fp16: a gradient overflowed
        self.steps_seen = optimizer.steps_here
        self.unreached -= optimizer.reached
        if self.steps_seen == 1:
            self._acted(optimizer)
        for rule in self.recipe.rules:
            plan = rule.event(optimizer.moment(state.max_steps))
            if plan:
                apply_plan(self.model, optimizer, plan)
                log.info(
                    "%s: slots changed at %d sites after step %d", self.recipe.name, len(plan), state.global_step + 1
                )

    def _acted(self, optimizer: PairOptimizer) -> None:
        total = len(optimizer.sites)
        log.info("%s: applied to %d/%d pairs", self.recipe.name, optimizer.applied, total)
        silent = sorted(set(optimizer.sites) - optimizer.reached - optimizer.asleep)
        if silent and not all("expert" in name for name in silent):
            raise WorkFailed(
                f"{len(silent)} of {total} adapted modules got no gradient, {silent[0]} first: the model's forward "
                "does not use them; name them in `exclude`"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.episodes.after_step(state.global_step, self._own())
        reopen(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reopen(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self.optimizer is not None:
            logs["grad_norm"] = self.optimizer.grad_norm

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = self._state()  # on every rank: sharded tensors are gathered
        episode, start = self.episodes.position
        complete(args, state, Note(self.recipe.name, state.global_step, self.stored, episode, start), saved, self.keep)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(read_state(Path(state.best_model_checkpoint)))
            sync_config(self.model)
        if idle(self.recipe, state.global_step) and not idle(self.recipe, state.max_steps):
            log.info("%s: stopped after step %d, before its rule acted", self.recipe.name, state.global_step)
        if self.unreached and self.steps_seen:
            log.warning("%d adapted modules never got a gradient: %s", len(self.unreached), sorted(self.unreached)[:5])

    # ----------------------------------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Tensor]:
        optimizer = self._own()
        found = {f"dead|{name}": mask for name, mask in optimizer.dead.items()}
        for i, rule in enumerate(self.recipe.rules):
            found |= {f"rule|{i}|{key}": value for key, value in rule.state_dict().items()}
        for name, layer, side in self._owned():
            live = live_of(layer, side)
            found |= {f"live|{name}|A": whole(live.A), f"live|{name}|B": whole(live.B)}
            found |= {f"live|{name}|A0": live.A0, f"live|{name}|B0": live.B0}
            found |= {f"live|{name}|extra|{key}": whole(value) for key, value in live.extra.items()}
        return found

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        optimizer = self._own()
        optimizer.dead = {key[5:]: value for key, value in state.items() if key.startswith("dead|")}
        for i, rule in enumerate(self.recipe.rules):
            head = f"rule|{i}|"
            rule.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})
        for name, layer, adapter in self._owned():
            sides = layer.lora_A[adapter], layer.lora_B[adapter]
            for module, letter in zip(sides, "AB", strict=True):
                if f"live|{name}|{letter}" not in state:
                    raise LoralignError(
                        f"the checkpoint lacks the live tensors of {name}: its loralign_state file is missing"
                    )
                module.frozen = state[f"live|{name}|{letter}0"].to(module.frozen)
                write(module.live, state[f"live|{name}|{letter}"])
            for key, value in live_of(layer, adapter).extra.items():
                write(value, state[f"live|{name}|extra|{key}"])

    def _owned(self) -> list[tuple[str, Any, str]]:
        """Sites whose form folds what the file cannot hand back."""
        found = []
        for site in sites(self.model):
            layer: Any = site.layer
            side = layer.lora_A[site.adapter]
            if isinstance(side, SlotLinear) and side.owner is not None:
                found.append((site.name, layer, site.adapter))
        return found
