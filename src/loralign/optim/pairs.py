"""PairOptimizer: one optimizer for pairs (A, B) under any transform and rules, and for everything else under AdamW.

    what rests gets no gradient → + penalty gradients → clip (global norm) → gradient masks → transform → decay →
    update masks → apply

Tensors are looked up in `param_groups` at every step (FSDP2 replaces Parameters), state is keyed by tensor and holds
tensors only, so `torch.load(weights_only=True)` reads it back. Learning rates live in the groups: any scheduler works,
and lr of B over lr of A is the transform's `lr_ratio` at every step. Weight decay is decoupled and acts on the live
tensors, so a twin's decay pulls W_eff towards W0; it comes before the update masks, so masked slots do not decay.

All factors of all sites are in the groups from the start; what an episode freezes or leaves out rests by a mask.
A pair's values are A and B themselves; for a twin A0 + ΔA and B0 + ΔB. Updates are added to the live tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralign.carrier.slot import form_of
from loralign.maths.draws import keyed_generator
from loralign.maths.lists import adam_slots, adam_state
from loralign.optim.added import add_updates, decayed, form_updates, step_rest
from loralign.optim.clip import clip
from loralign.optim.groups import groups
from loralign.optim.masks import DeadSlots, masked, penalise
from loralign.optim.moments import grads_of, moment, seen_in_step
from loralign.optim.norm import Norm, Norms
from loralign.optim.shards import sharded, wholes
from loralign.optim.stacks import Layout, Place
from loralign.optim.transformed import filled, keeps, transformed
from loralign.optim.values import Values, leave_out, leave_stacks, letters, live_own, live_pairs, with_grads
from loralign.types import (
    Ctx,
    Joint,
    Moment,
    Pair,
    Rule,
    RuleState,
    Site,
    SiteShape,
    SlotChange,
    Train,
    Transform,
    WorkFailed,
)


class Span(NamedTuple):
    """The run of the rules: optimizer steps before it and in it, 0 where unknown."""

    taken: int
    steps: int


class PairOptimizer(torch.optim.Optimizer):
    """AdamW's drop-in for adapters.

    Args:
        sites: the adapted sites; their factors form the pairs, their forms' own tensors the role "form".
        rest: other trainable tensors by name (heads, norms, embeddings): AdamW.
        shared: a form's tensors that belong to the model.
        lr: learning rate of A; B's is lr·transform.lr_ratio, a form's lr·facts.own_lr.
        rest_lr: learning rate of the rest where it differs from A's (a fresh head), else None.
        max_grad_norm: global clip over all trained tensors, 0 = off.
        links: a fact: the recipe is a chain.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        rest: Mapping[str, nn.Parameter],
        transform: Transform,
        *,
        shared: Mapping[str, nn.Parameter] | None = None,
        rules: Sequence[Rule] = (),
        lr: float = 1e-3,
        rest_lr: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        links: bool = False,
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.shapes = [SiteShape(s.name, s.r, s.d_out, s.d_in, s.s) for s in sites]
        self.transform, self.rules = transform, tuple(rules)
        self.rule_states: list[RuleState] = [rule.init(self.shapes, 0) for rule in self.rules]
        self.between = links or any(rule.facts.events for rule in self.rules)
        """A fact: something of the recipe happens between steps, which is the driver's to do."""
        self.driven, self.untold = False, 0
        """There is a driver (`train.driver`); the steps taken since it last heard of one."""
        self.values = Values(sites, whole=bool(rules) or "sharded" not in transform.facts.accepts)
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.link = Span(0, 0)
        self.dead = DeadSlots()
        self.asleep: set[str] = set()
        """Sites that sit out this episode."""
        self.trains: dict[str, Train] = {}
        """Sites of which one factor rests in this episode."""
        self.reached: set[str] = set()
        """Sites that ever received an update."""
        self.applied, self.steps_here, self.lr_factor = 0, 0, 1.0
        self.norms = Norms(lambda: self.state.clear())
        made = groups(sites, rest, shared or {}, transform, lr, rest_lr, weight_decay)
        super().__init__(made, {"lr": lr, "weight_decay": weight_decay})
        self.param_groups[0]["step"] = 0  # there from the start: a sharded optimizer is read in place
        self.awake, self.layout = self.shapes, Layout(self.shapes, self.param_groups)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep the precision they were saved in (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        saved = (k for group in state_dict["param_groups"] for k in group["params"])
        mine = (p for group in self.param_groups for p in group["params"])
        for k, p in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(k, {}).items():
                self.state[p][key] = value.detach().to(p.device, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of steps known to be good; that of sharded tensors lacks nothing, since it is read in place."""
        self.norms.check()
        if sharded(p for group in self.param_groups for p in group["params"]):
            self._fill()
        return super().state_dict()

    @torch.no_grad()
    def _fill(self) -> None:
        """State, as it begins, for all that trains and has none. Nothing is gathered where all have theirs; what the
        transform keeps none for has an empty one, by which torch knows that it was asked."""
        live, own = live_pairs(self.param_groups), live_own(self.param_groups)
        trains = {n: {f: p for f, p in ps.items() if p.requires_grad} for n, ps in live.items()}
        empty = {n: {f for f, p in ps.items() if not self.state[p]} for n, ps in trains.items()}
        live = {n: live[n] for n, fs in empty.items() if fs & keeps(self.transform, letters(trains[n]))}
        for pair in self.values.pairs(live, {n: letters(trains[n]) for n in live}) if live else ():
            filled(self.transform, pair, {f: self.state[p] for f, p in trains[pair.name].items()})
        own = {key: p for key, p in own.items() if not self.state[p]}
        alone = list(zip(own.values(), self._whole({key: p.data for key, p in own.items()}).values(), strict=True))
        alone += [(p, p.data) for group in self.param_groups if group["role"] == "rest" for p in group["params"]]
        for p, value in alone:
            if p.requires_grad and not self.state[p]:
                self.state[p].update(adam_state(value))

    def _asks_for_state(self) -> bool:
        """torch has the state of a sharded optimizer made by a step of zeros at rate 0, before it is saved or loaded
        (`torch.distributed.checkpoint.state_dict`)."""
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and sharded(grads) and not any(bool(g.any()) for g in wholes(grads))

    # --------------------------------------------------------------------------------------------------------- one step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._asks_for_state():
            self._fill()
            return loss
        self._check_driven()
        self.norms.check()
        self.param_groups[0]["step"] = self.param_groups[0].get("step", 0) + 1
        live, own, ctx = live_pairs(self.param_groups), live_own(self.param_groups), self._in_link()
        leave_out(live, own, self.asleep, self.trains)
        awake = {n: ps for n, ps in live.items() if any(p.grad is not None for p in ps.values())}
        pairs = self.values.pairs(awake, {n: with_grads(ps) for n, ps in awake.items()})
        places = self._places(pairs)
        self._penalise(pairs, places, ctx)
        found = clip(
            (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None), self.max_grad_norm
        )
        norm = None if found is None else Norm(self.steps, found)
        grads = self.values.grads(live, (p.name for p in pairs))
        reached = {p.name for p in pairs} | {site for (site, _), p in own.items() if site and p.grad is not None}
        if not reached:
            self.norms.read(norm)
            raise WorkFailed(
                "no pair of the adapter received a gradient, so nothing was trained: "
                "is the loss computed from the adapted model?"
            )
        own_grads = self._whole({key: p.grad for key, p in own.items() if p.grad is not None})
        grad_masks = self._masks([rule.grad_mask for rule in self.rules], pairs, places, ctx)
        grads, own_grads = masked(grads, own_grads, places, grad_masks)
        try:
            leave_stacks(self.state, live, pairs)
            state = {p.name: {factor: self.state[live[p.name][factor]] for factor in p.train} for p in pairs}
            updates = transformed(self.transform, pairs, grads, state, self._ctx())
            updates = decayed(updates, live, self.param_groups, self.lr_factor, whole=self.values.whole)
        except torch.linalg.LinAlgError:
            self.norms.read(norm)  # says it better where the gradient is to blame
            raise
        own_updates = form_updates(own, own_grads, self._whole, self.param_groups, self.state, self.lr_factor)
        masks = self._masks([rule.update_mask for rule in self.rules], pairs, places, ctx)
        alive = self.dead.masks(places, self._per_slot)
        updates, own_updates = masked(updates, own_updates, places, masks if alive is None else [*masks, alive])
        self.norms.judge(norm, self.param_groups)  # no earlier: the device works while the host prepares its next calls
        add_updates(live, own, updates, own_updates)
        step_rest(self.param_groups, self.state, self.lr_factor)
        self.applied, self.steps_here, self.untold = len(reached), self.steps_here + 1, self.untold + 1
        self.reached |= reached
        return loss

    @property
    def steps(self) -> int:
        """Taken so far, those before a resume included."""
        return int(self.param_groups[0].get("step", 0))

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping."""
        self.norms.check()
        return self.norms.last

    @property
    def steps_in_link(self) -> int:
        """Taken since the rules began."""
        return self.steps - self.link.taken

    def _check_driven(self) -> None:
        if not self.between or not self.untold:
            return
        if not self.driven:
            raise WorkFailed(
                "this recipe acts between optimizer steps: build `driver = loralign.drive(model, recipe, opt, "
                "total_steps)` and call driver.after_step() after every opt.step()"
            )
        raise WorkFailed("the driver did not hear of the last step: call driver.after_step() after every opt.step()")

    def _ctx(self) -> Ctx:
        rate = {g["role"]: float(g["lr"]) * self.lr_factor for g in self.param_groups}
        step, seed = self.steps, self.seed

        def draw(purpose: str, name: str) -> torch.Generator:
            return keyed_generator(seed, purpose, step, name)

        return Ctx(rate.get("A", 0.0), rate.get("B", 0.0), step, draw)

    def _in_link(self) -> Ctx:
        """As rules see it: their run is a link of a chain, or the whole one. Draws are keyed by the step of the run."""
        ctx = self._ctx()
        return replace(ctx, step=self.steps_in_link, total_steps=self.link.steps)

    def begin_link(self, taken: int, steps: int) -> None:
        """Rules begin anew: so many steps were `taken` before, and they see the sites that do not sleep."""
        self.link = Span(taken, steps)
        self.awake = [shape for shape in self.shapes if shape.name not in self.asleep]
        self.layout = Layout(self.awake, self.param_groups)
        self.rule_states = [rule.init(self.awake, steps) for rule in self.rules]

    def _places(self, pairs: Sequence[Pair]) -> list[Place]:
        """Where rules find the tensors of a step: the factors that train, and the form's own tensors beside them."""
        return self.layout.of({p.name: (*p.train, *self.layout.names[p.name][2:]) for p in pairs})

    def _penalise(self, pairs: Sequence[Pair], places: Sequence[Place], ctx: Ctx) -> None:
        seen = seen_in_step(self.param_groups, self.values, pairs, places)
        for rule, state in zip(self.rules, self.rule_states, strict=True):
            penalty = rule.penalty(state, seen, ctx)
            if penalty is not None:
                penalise(places, penalty, grads_of(self.param_groups))

    def _masks(
        self, makers: Sequence[Callable[..., Joint | None]], pairs: Sequence[Pair], places: Sequence[Place], ctx: Ctx
    ) -> list[Joint]:
        """Of the rules that mask something in this step."""
        seen = seen_in_step(self.param_groups, self.values, pairs, places)
        found = (make(state, seen, ctx) for make, state in zip(makers, self.rule_states, strict=True))
        return [mask for mask in found if mask is not None]

    def _whole(self, own: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """A form's own tensors, whole where somebody needs whole ones."""
        return dict(zip(own, wholes(list(own.values())), strict=True)) if self.values.whole else own

    def _per_slot(self, site: str) -> frozenset[str]:
        form = form_of(self.sites[site].layer, self.sites[site].adapter)
        return form.facts.per_slot if form is not None else frozenset()

    # ------------------------------------------------------------------------------------------------ between the steps

    def moment(self, **seen: Any) -> Moment:
        """What rules see after a step: values and gradients by (site, name), the dead slots, and what else was `seen`.

        Made when a rule reads it, so read it before the next step, and under FSDP2 on every rank or on none.
        """
        ctx = self._in_link()
        seen["expect"] = self.norms.expect
        return moment(self.param_groups, self.values, self.layout, self.awake, self.dead, ctx, **seen)

    def on_slots(self, changes: Mapping[str, Sequence[SlotChange]]) -> None:
        """Adjust the state of sites whose slots changed, each site's changes in order."""
        live = {n: ps for n, ps in live_pairs(self.param_groups).items() if n in changes} if changes else {}
        kept = {n: {f: p for f, p in ps.items() if self.state[p]} for n, ps in live.items()}
        live = {n: ps for n, ps in live.items() if kept[n]}
        for pair in self.values.pairs(live, {n: letters(kept[n]) for n in live}) if live else ():
            for change in changes[pair.name]:
                self.transform.on_slots(pair, {f: self.state[p] for f, p in kept[pair.name].items()}, change)
        for (site, own), p in live_own(self.param_groups).items() if changes else ():
            for change in changes.get(site, ()):
                if own in self._per_slot(site) and self.state[p]:
                    adam_slots(self.state[p], 0, change)

    def forget(self, names: Iterable[str]) -> None:
        """Clear the whole optimizer state (moments and step counters) of these sites and of what the form shares, as a
        knot of a chain needs."""
        wanted, live = set(names), live_pairs(self.param_groups)
        for name in wanted:
            for p in live[name].values():
                self.state.pop(p, None)
        for (site, _), p in live_own(self.param_groups).items():
            if site in wanted or not site:
                self.state.pop(p, None)
