"""The five axes: what an init, a form, a transform, a rule and an outer loop are; protocols, no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from loralign.types.facts import Facts
from loralign.types.needs import NOTHING, Directions, Draw, Need, RuleNeed, Train, Weight
from loralign.types.slots import (
    Grad,
    InputSquares,
    Joint,
    Live,
    Named,
    Operator,
    Pair,
    Plan,
    RuleState,
    SiteShape,
    SlotChange,
    Stack,
    Start,
    State,
)


@runtime_checkable
class Init(Protocol):
    """What the live slots (and their frozen twin) hold before step 0, and at the start of each link of a chain."""

    @property
    def facts(self) -> Facts: ...

    @property
    def needs(self) -> Need: ...

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        """ "" where it can start r slots on a matrix of this shape, else why not. Asked before anything is spent."""
        ...

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start: ...


@runtime_checkable
class Form(Protocol):
    """Which tensors train and how they become the factors (A, B) that forward, merge and export all read."""

    @property
    def facts(self) -> Facts: ...

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        """Start values of the form's own trainable tensors by name; stored on the layer as `lora_<name>`."""
        ...

    def constants(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        """The form's own constant tensors by name (indices, for instance); kept in checkpoints."""
        ...

    def shared(self) -> Mapping[str, Tensor]:
        """Start values of tensors that belong to the model and are trained once, whatever the number of sites."""
        ...

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        """Other sites whose tensors `factors` reads, nearest first (only cross-layer forms have any)."""
        ...

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        """A (R, d_in) and B (d_out, R) so that W_eff = W0 + s·B·A; differentiable in the trained tensors."""
        ...


class FormBase:
    """What a form has where it says nothing: no tensors but the stock factors, and no neighbours."""

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    def constants(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {}

    def shared(self) -> Mapping[str, Tensor]:
        return {}

    def neighbours(self, name: str, sites: Sequence[str]) -> Sequence[str]:
        return ()


@dataclass(frozen=True)
class Ctx:
    """What a transform or rule may know of the step: rates of A and B, 1-based step, keyed draws. Rules count steps
    from the start of a link of a chain, which is their run."""

    lr_A: float
    lr_B: float
    step: int
    draw: Callable[[str, str], torch.Generator]
    """draw(purpose, module name) -> generator keyed by (seed, purpose, step, name): equal on every rank."""
    total_steps: int = 0
    """Optimizer steps of the rule's run, 0 where unknown."""


class Group(NamedTuple):
    """Pairs that step together: of one shape (of one rank, where the transform accepts "shapes"), with the same factors
    trained, on one device."""

    pairs: Sequence[Pair]
    grads: Sequence[Grad]
    state: Sequence[State]
    ctx: Ctx


class Prepared(NamedTuple):
    """scalars: summed over all groups before any update, for instance a global norm squared. carry: for `update` of
    the same group."""

    scalars: Mapping[str, Tensor] = {}
    carry: Any = None


@runtime_checkable
class Transform(Protocol):
    """Gradients of pairs to updates of pairs; a function of its arguments that changes state in place."""

    @property
    def facts(self) -> Facts: ...

    @property
    def lr_ratio(self) -> float:
        """lr of B over lr of A."""
        ...

    def init(self, pair: Pair) -> State: ...

    def prepare(self, group: Group) -> Prepared: ...

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        """One update per pair, to be *added* to the live tensors; the learning rate is already in it."""
        ...

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Adjust one pair's state after slots were switched, revived or copied."""
        ...


@dataclass(frozen=True)
class Moment:
    """What a rule sees after optimizer step `step` of a link of a chain, or of the run, which has `total_steps`; before
    the first one (step 0) gradients are none of it.

    tensors: values by (site, name). grads: this step's gradients. stacks: both, sites of one shape as one, for what is
    done at every step. All are made when they are read. dead: slots that do not train, by site. losses: of
    the validation rows with these slots alone, for each of several {site: bool (r,)}; a site that is not named keeps
    its slots. Processes share them, so ask for many at once. Only for rules that need `Validation`. inputs: of all
    sites, by their width; only for rules that need `Inputs`. expect: (holds, why) -> None raises WorkFailed(why) where
    a number on the device is false: at once, or where norms are read late, when the next step begins.
    """

    step: int
    total_steps: int
    sites: Sequence[SiteShape]
    tensors: Named
    grads: Named
    stacks: Sequence[Stack]
    dead: Mapping[str, frozenset[int]]
    draw: Callable[[str, str], torch.Generator]
    losses: Callable[[Sequence[Mapping[str, Tensor]]], Sequence[float]] | None = None
    inputs: Sequence[InputSquares] | None = None
    expect: Callable[[Tensor, str], None] | None = None


@runtime_checkable
class Rule(Protocol):
    """A penalty, masks or slot events. The object is frozen data: what it remembers is a `RuleState`, which the driver
    keeps, hands in and stores in checkpoints; it may be changed in place. None: nothing to add, all ones.

    Penalties and masks belong to every step, so they see the tensors that train in stacks, and answer with one mapping
    for each: a few calls for all sites of a shape, and nothing that makes the host wait for the device."""

    @property
    def facts(self) -> Facts: ...

    @property
    def needs(self) -> RuleNeed: ...

    def init(self, sites: Sequence[SiteShape], total_steps: int) -> RuleState: ...

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        """Gradient of the regulariser, added before clipping."""
        ...

    def grad_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        """Multiplied into gradients, before the transform."""
        ...

    def update_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        """Multiplied into updates, weight decay included."""
        ...

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        """After an optimizer step, and once before the first one (moment.step = 0).

        None where nothing is due, which follows from the step alone, so that all processes know it without asking one
        another; a plan, be it empty, where something is.
        """
        ...


class RuleBase:
    """What a rule does where it says nothing: it needs, remembers, adds, masks and plans nothing."""

    needs: RuleNeed = NOTHING

    def init(self, sites: Sequence[SiteShape], total_steps: int) -> RuleState:
        return {}

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return None

    def grad_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return None

    def update_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return None

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        return state, None


@dataclass(frozen=True)
class Episode:
    """One link of an outer loop, as plain data, so that a stopped run resumes without replay.

    index: 0-based. steps: optimizer steps of the link. sites: names that train, None for all. train: the trained
    factors. init: of this link's live slots, None: the recipe's. reset: clear the optimizer state of what trains at
    its start. warm_up_steps: learning-rate re-warm-up. restart: the schedule starts again and runs its whole course
    in this link. keep_slots: at its start, frozen slots of each site become the best so many; None: all stay. slots: of
    every site so many train and are committed, the others stay zero; None: all. absorb: at its end, a link that the
    committed ones make up but for this share of its norm² is not committed, their weights take it over; None: never.
    """

    index: int
    steps: int
    sites: tuple[str, ...] | None = None
    train: Train = "AB"
    init: Init | None = None
    reset: bool = True
    warm_up_steps: int = 0
    restart: bool = False
    keep_slots: int | None = None
    slots: int | None = None
    absorb: float | None = None


@runtime_checkable
class Outer(Protocol):
    """Episodes by number; pure. Committing slots and collecting evidence belong to the driver."""

    @property
    def facts(self) -> Facts: ...

    def episode(self, index: int, total_steps: int, sites: Sequence[str], draw: Draw) -> Episode | None:
        """Link `index` of a run of so many steps, None after the last. draw: keyed by the recipe's seed alone."""
        ...
