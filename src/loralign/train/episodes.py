"""The driver of outer loops: at a knot the live slots are committed to frozen ones and a fresh link starts.

Order at a knot (only after an optimizer step, gradients synced): evidence of the next link, where its init asks for it,
from the model as it is → commit in fp32 → fresh factors drawn by (seed, episode, module) → optimizer state of the link
cleared, step counters too → config in step with the slots. Who sleeps and which factor rests is derived from the
episode at the start, at every knot and on resume. Everything is a function of (recipe, total steps, sites), so a
stopped run resumes without replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from loralign.carrier.absorb import absorb
from loralign.carrier.compress import compress
from loralign.carrier.links import commit
from loralign.carrier.sites import draw_for, sites, sync_config, weight
from loralign.carrier.slot import effective, whole, write
from loralign.optim.pairs import PairOptimizer
from loralign.types import (
    Directions,
    Episode,
    Init,
    LoralignError,
    Nothing,
    Recipe,
    Site,
    Start,
    Train,
    Weight,
    WorkFailed,
)

log = logging.getLogger("loralign")

Gather = Callable[[Episode], Mapping[str, Directions]]
"""Collects what the init of an episode must know, from the model as it is at the knot."""


class Link(NamedTuple):
    """The live link of one site: does it train around a twin, which factors train, how many slots are frozen."""

    twin: bool
    train: Train
    frozen: int


class Episodes:
    """Where a run is in its outer loop."""

    def __init__(self, recipe: Recipe, model: PeftModel, gather: Gather | None = None) -> None:
        self.recipe, self.model, self.gather = recipe, model, gather
        self.names = [site.name for site in sites(model)]
        self.total_steps = 0
        self.current: Episode | None = None
        self.started = 0
        self.lost: dict[int, float] = {}
        """Share of the committed update that a cut to `keep_slots` lost at the start of an episode."""

    @property
    def position(self) -> tuple[int, int]:
        """(index of the episode, optimizer step at which it began)."""
        return (self.current.index if self.current else 0), self.started

    def links(self) -> dict[str, Link]:
        """The live link of every site."""
        found = {}
        for site in sites(self.model):
            layer: Any = site.layer
            side = layer.lora_B[site.adapter]
            twin, frozen = getattr(side, "kind", "") == "T", getattr(side, "used", 0)
            found[site.name] = Link(twin, layer.lora_variant[site.adapter].train, frozen)
        return found

    def _episode(self, index: int) -> Episode | None:
        return self.recipe.outer.episode(index, self.total_steps, self.names, draw_for(self.recipe.seed))

    def _init(self, episode: Episode) -> Init:
        return episode.init or self.recipe.init

    def begin(self, total_steps: int, optimizer: PairOptimizer, index: int = 0, started: int = 0) -> None:
        """Enter an episode: the first one, or the one in which a stopped run was."""
        self.total_steps, self.started = total_steps, started
        self.current = self._episode(index)
        if self.current is None:
            raise WorkFailed(f"{self.recipe.name}: the outer loop has no episode {index}")
        following = self._episode(index + 1) if started + self.current.steps < total_steps else None
        if following is not None and self.gather is None and not isinstance(self._init(following).needs, Nothing):
            raise LoralignError(
                f"{self.recipe.name}: a link of this chain starts from evidence, which a bare loop does not "
                "collect: pass `gather` to drive(), or train with attach()"
            )
        self._enter(self.current, optimizer)

    def _enter(self, episode: Episode, optimizer: PairOptimizer) -> None:
        unknown = set(episode.sites or ()) - set(self.names)
        if unknown:
            raise LoralignError(f"{self.recipe.name}: an episode trains {min(unknown)}, which is not adapted")
        awake = set(self.names) if episode.sites is None else set(episode.sites)
        optimizer.asleep = set(self.names) - awake
        optimizer.trains = {}
        for name, link in self.links().items():
            both: list[Train] = [f for f in ("A", "B") if f in episode.train and f in link.train]
            if not both:
                raise WorkFailed(f"{self.recipe.name}: link {episode.index} trains no factor of {name}")
            if len(both) == 1:
                optimizer.trains[name] = both[0]
        for site in sites(self.model):
            if episode.slots is not None and site.name in awake and episode.slots < site.r:
                _narrow(site, episode.slots, optimizer)

    def lr_factor(self, step: int, course: Callable[[int], float] | None = None) -> float:
        """Factor on the learning rate of step `step` (0-based) for every role: a linear re-warm-up at the start of a
        later link, and the schedule's whole course where the episode restarts it.

        course: the schedule's own factor by step; None: constant.
        """
        if self.current is None:
            return 1.0
        done, episode = step - self.started, self.current
        warms = self.started and episode.warm_up_steps
        factor = min(1.0, (done + 1) / episode.warm_up_steps) if warms else 1.0
        if episode.restart and course is not None and course(step) > 0:
            factor *= course(round(done * self.total_steps / episode.steps)) / course(step)
        return factor

    def after_step(self, step: int, optimizer: PairOptimizer) -> bool:
        """`step` optimizer steps are done: tie a knot where the episode is over and another one follows."""
        if self.current is None or step - self.started < self.current.steps or step >= self.total_steps:
            return False
        following = self._episode(self.current.index + 1)
        if following is None:
            return False
        optimizer.norms.check()
        self._knot(self.current, following, optimizer)
        self.current, self.started = following, step
        self._enter(following, optimizer)
        return True

    @torch.no_grad()
    def _knot(self, done: Episode, following: Episode, optimizer: PairOptimizer) -> None:
        trained = set(self.names if done.sites is None else done.sites)
        evidence: Mapping[str, Directions] = {}
        if self.gather is not None and not isinstance(self._init(following).needs, Nothing):
            with torch.enable_grad():
                evidence = self.gather(following)
        fresh = {
            site.name: self._start(site, following, evidence) for site in sites(self.model) if site.name in trained
        }
        kept = self._kept(done, trained)
        for site in sites(self.model):
            if site.name in trained:
                commit(site.layer, site.adapter, fresh[site.name], kept)
                optimizer.dead.pop(site.name, None)
        if following.reset:
            optimizer.forget(trained)
        if following.keep_slots is not None:
            self._compress(following.index, following.keep_slots)
        sync_config(self.model)
        log.info(
            "%s: episode %d begins; what %d sites have learnt is frozen",
            self.recipe.name,
            following.index,
            len(trained),
        )

    def _kept(self, done: Episode, trained: set[str]) -> int | None:
        """Slots of the link that are committed; None: all."""
        layers = [(site.layer, site.adapter) for site in sites(self.model) if site.name in trained]
        if done.absorb is None or not absorb([layer for layer, _ in layers], layers[0][1], done.absorb):
            return done.slots
        log.info("%s: the links before make up link %d, which is not kept", self.recipe.name, done.index)
        return 0

    def _compress(self, index: int, most: int) -> None:
        """Frozen slots become the best `most` of each site; what that loses is said, per knot."""
        norms = [compress(site.layer, site.adapter, most) for site in sites(self.model)]
        lost, whole = (sum(n * n for n in side) ** 0.5 for side in zip(*norms, strict=True))
        self.lost[index] = lost / whole if whole else 0.0
        if lost:
            how = logging.WARNING if self.lost[index] > 0.01 else logging.INFO
            said = "%s: before episode %d the links were cut to %d slots per site, which loses %.2g of their update"
            log.log(how, said, self.recipe.name, index, most, self.lost[index])

    def _start(self, site: Site, following: Episode, evidence: Mapping[str, Directions]) -> Start:
        draw, W = draw_for(self.recipe.seed, site.name, following.index), _as_it_is(site)
        start = self._init(following)(W, site.r, site.s, evidence.get(site.name), draw)
        return replace(start, own={**self.recipe.form.trained(W, site.r, draw), **start.own})


@torch.no_grad()
def _narrow(site: Site, slots: int, optimizer: PairOptimizer) -> None:
    """The slots from `slots` on are zero, as dead ones are, and do not train."""
    optimizer.dead[site.name] = torch.arange(site.r) >= slots
    for axis, side in enumerate(("lora_A", "lora_B")):
        p = getattr(site.layer, side)[site.adapter]._parameters["weight"]
        values = whole(p).clone()
        values.narrow(axis, slots, site.r - slots).zero_()
        write(p, values)


def _as_it_is(site: Site) -> Weight:
    """W_eff as the link before left it."""
    base = weight(site)

    def read() -> Any:
        A, B = effective(site.layer, site.adapter)
        W = base.read()
        return W + site.s * (B.float() @ A.float()).to(W.device)

    return Weight(site.name, base.shape, read)
