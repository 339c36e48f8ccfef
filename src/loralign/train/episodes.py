"""The driver of outer loops: at a knot the live slots are committed to frozen ones and a fresh link starts.

Order at a knot (only after an optimizer step, gradients synced): commit in fp32 → fresh factors drawn by
(seed, episode, module) → optimizer state of the link cleared, step counters too → config in step with the slots.
Everything is a function of (recipe, total steps, sites), so a stopped run resumes without replay.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel

from loralign.carrier.sites import sites, sync_config, weight
from loralign.carrier.slot import commit, freeze
from loralign.maths.draws import keyed_generator
from loralign.optim.pairs import PairOptimizer
from loralign.types import Episode, Recipe, WorkFailed

log = logging.getLogger("loralign")


class Episodes:
    """Where a run is in its outer loop."""

    def __init__(self, recipe: Recipe, model: PeftModel) -> None:
        self.recipe, self.model = recipe, model
        self.names = [site.name for site in sites(model)]
        self.total_steps = 0
        self.current: Episode | None = None
        self.started = 0

    @property
    def position(self) -> tuple[int, int]:
        """(index of the episode, optimizer step at which it began)."""
        return (self.current.index if self.current else 0), self.started

    def begin(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.current = self.recipe.outer.episode(0, total_steps, self.names)
        if self.current is None:
            raise WorkFailed(f"{self.recipe.name}: the outer loop has no first episode")

    def resume(self, index: int, started: int) -> None:
        self.current = self.recipe.outer.episode(index, self.total_steps, self.names)
        self.started = started

    def warm_up(self, step: int) -> float:
        """Factor on the learning rate of step `step` (0-based): a linear re-warm-up at the start of a link."""
        wanted = self.current.warm_up_steps if self.current else 0
        return min(1.0, (step - self.started + 1) / wanted) if wanted and self.started else 1.0

    def after_step(self, step: int, optimizer: PairOptimizer) -> None:
        """`step` optimizer steps are done: tie a knot where the episode is over and another one follows."""
        if self.current is None or step - self.started < self.current.steps or step >= self.total_steps:
            return
        following = self.recipe.outer.episode(self.current.index + 1, self.total_steps, self.names)
        if following is None:
            return
        self._knot(self.current, following, optimizer)
        self.current, self.started = following, step

    @torch.no_grad()
    def _knot(self, done: Episode, following: Episode, optimizer: PairOptimizer) -> None:
        trained = set(done.sites or self.names)
        init = following.init or self.recipe.init
        for site in sites(self.model):
            layer: Any = site.layer
            if site.name in trained:
                W = weight(site)

                def draw(purpose: str, step: int = 0, name: str = site.name) -> torch.Generator:
                    return keyed_generator(self.recipe.seed, purpose, following.index, name)

                fresh = init(W, site.r, site.s, None, draw)
                if fresh.twin:
                    raise WorkFailed(f"{self.recipe.name}: a link of a chain cannot start from a twin")
                commit(layer, site.adapter, fresh)
            frozen = tuple({"A": "lora_A", "B": "lora_B"}[f] for f in "AB" if f not in following.train)
            freeze(layer, site.adapter, frozen)
        if following.reset:
            optimizer.forget(trained)
        optimizer.asleep = set(self.names) - set(following.sites or self.names)
        sync_config(self.model)
        log.info("%s: episode %d begins, %d sites committed", self.recipe.name, following.index, len(trained))
