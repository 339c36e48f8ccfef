"""A scorer and a law make a rule: slots of lowest score are gated off for now, and for good where the law settles.

    observe -> score -> due? -> the lowest b0 − b(t) slots of all sites: gate ← 0 (they train on, and may come back)
    at the law's stop the mask becomes final: gates of dropped slots are held at zero, A and B as they are

A scorer keeps averages in the rule's state; a law is a course of the budget. `adalora` and `dynamic_rank` are two of
the combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loralign.maths.budget import (
    NOT_FINITE,
    BySite,
    Slots,
    Window,
    in_order,
    lowest,
    narrowed,
    too_short,
    widened,
    window,
)
from loralign.types import (
    Ctx,
    Facts,
    Joint,
    LoralignError,
    Moment,
    Plan,
    RuleBase,
    RuleState,
    SiteShape,
    Stack,
    Zero,
    ZeroWhere,
)

GATE = "gate"
KEPT = "kept|"
OFF = "off"
FOREIGN = "was made for other stacks (an older version, or other devices): resume it as it was made, or start anew"
"""What to say of a checkpoint's tensors that fit no stack of the run."""


class Scorer(Protocol):
    """Averages over optimizer steps, and the score of every slot that follows from them."""

    transient: ClassVar[float]
    """As in `Facts`: of a look at a step."""

    def observe(self, state: RuleState, moment: Moment) -> None: ...

    def scores(self, state: RuleState, moment: Moment) -> Mapping[str, Tensor]:
        """(r,) by site, the higher the better."""
        ...


def slots_of(stacks: Sequence[Stack], joint: Sequence[Tensor]) -> BySite:
    """(r,) by site of what was computed for stacks, (n, r) each; where the first one lies."""
    device = joint[0].device
    flat = torch.cat([scores.reshape(-1).to(device) for scores in joint])
    sizes, order = _by_name(_shapes(stacks), device)
    return BySite(sizes, flat[order])


def lowest_in(stacks: Sequence[Stack], scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """As `lowest`, True in (n, r) by the keys of the stacks; the host does not wait for it."""
    flat = (scores if isinstance(scores, BySite) else in_order(scores)).flat
    order = _by_name(_shapes(stacks), flat.device)[1]
    last = flat.double().sort(descending=True, stable=True).indices[len(flat) - count :]
    off = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).index_fill_(0, order[last], True)
    parts = off.split([len(stack.sites) * stack.r for stack in stacks])
    return {stack.key: part.view(-1, stack.r) for stack, part in zip(stacks, parts, strict=True)}


def finite(scores: Mapping[str, Tensor]) -> Tensor:
    """Whether all are, where they lie."""
    return (scores if isinstance(scores, BySite) else in_order(scores)).flat.isfinite().all()


def _shapes(stacks: Sequence[Stack]) -> tuple[tuple[tuple[str, ...], int], ...]:
    return tuple((stack.sites, stack.r) for stack in stacks)


@lru_cache
def _by_name(stacks: tuple[tuple[tuple[str, ...], int], ...], device: torch.device) -> tuple[dict[str, int], Tensor]:
    """r by site, and where its slots lie in the tensors of the stacks, in the order of the names."""
    starts: dict[str, tuple[int, int]] = {}
    start = 0
    for sites, r in stacks:
        for site in sites:
            starts[site] = start, r
            start += r
    found = {site: starts[site] for site in sorted(starts)}
    order = torch.tensor([k + j for k, r in found.values() for j in range(r)], dtype=torch.int64, device=device)
    return {site: r for site, (_, r) in found.items()}, order


def gates_of(moment: Moment) -> BySite:
    """(r,) by site, on the CPU, which waits once."""
    return in_order(slots_of(moment.stacks, [stack.tensors[GATE] for stack in moment.stacks]))


def average(state: RuleState, key: str, like: Tensor) -> Tensor:
    """A running average of the state, zero where it is new, on the device of `like`."""
    known = state.get(key)
    if known is None or known.device != like.device or known.dtype != like.dtype:
        state[key] = torch.zeros_like(like) if known is None else known.to(like)
    return state[key]


def keep(state: RuleState, moment: Moment, dropped: Slots) -> None:
    """All but these slots are kept from now on: the mask becomes final."""
    for stack in moment.stacks:
        gates = stack.tensors[GATE]
        on = torch.ones(gates.shape, dtype=torch.bool)
        off = [(k, j) for k, site in enumerate(stack.sites) for j in dropped.get(site, ())]
        if off:
            on[tuple(zip(*off, strict=True))] = False
        state[KEPT + stack.key] = on.to(gates.device)


def final(state: RuleState, stacks: Sequence[Stack]) -> Joint | None:
    """Gates that were dropped for good stay where they are, at zero."""
    if not any(key.startswith(KEPT) for key in state):
        return None
    if any(KEPT + stack.key not in state for stack in stacks):
        raise LoralignError(f"the checkpoint's final mask {FOREIGN}")
    found = [(state[KEPT + stack.key], stack.at) for stack in stacks]
    return [{GATE: on if at is None else on[list(at)]} for on, at in found]


class Regulariser(Protocol):
    def __call__(self, stacks: Sequence[Stack]) -> Joint | None:
        """Its gradient."""
        ...


def unregularised(stacks: Sequence[Stack]) -> None:
    return None


@dataclass(frozen=True)
class Law:
    """When and how far the budget shrinks.

    ratio: slots at the start over those at the end. first, last: shares of the run before and after the window.
    interval: optimizer steps between events, None: 500 events in a run. budget: (t, window, b0, bT) -> slots.
    """

    ratio: float
    first: float
    last: float
    interval: int | None
    budget: Callable[[int, Window, int, int], int]

    def window(self, total_steps: int) -> Window:
        return window(total_steps, self.first, self.last, self.interval)

    def slots(self, ranks: Mapping[str, int]) -> Mapping[str, int]:
        return {name: widened(r, self.ratio) for name, r in ranks.items()}

    def ends(self, sites: Sequence[SiteShape]) -> tuple[int, int]:
        """b0 and bT over all sites."""
        return sum(s.r for s in sites), sum(narrowed(s.r, self.ratio) for s in sites)

    def acts_by(self, total_steps: int) -> int:
        return self.window(total_steps).stop + 1

    def too_short(self, total_steps: int) -> str:
        return too_short(total_steps, self.first, self.last)


@dataclass(frozen=True)
class Shrink(RuleBase):
    """Any scorer with any law, on a form with a gate that is zero where a slot is off."""

    scorer: Scorer
    law: Law
    regulariser: Regulariser = unregularised
    regularised_to_the_end: bool = True
    """A fact of the method: the regulariser acts after the law has settled, too."""

    @property
    def facts(self) -> Facts:
        law = self.law
        schedule: dict[str, Any] = {"slots": law.slots, "too_short": law.too_short, "acts_by": law.acts_by}
        return Facts(events=True, allocates=True, needs_gate=True, transient=self.scorer.transient, **schedule)

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        if not self.regularised_to_the_end and ctx.total_steps and ctx.step - 1 > self.law.window(ctx.total_steps).stop:
            return None
        return self.regulariser(stacks)

    def update_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return final(state, stacks)

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 0:
            return state, None
        t, law = moment.step - 1, self.law.window(moment.total_steps)
        if t < law.stop:
            self.scorer.observe(state, moment)
        if not law.due(t):
            return state, None
        b0, bT = self.law.ends(moment.sites)
        count, scores = b0 - self.law.budget(t, law, b0, bT), self.scorer.scores(state, moment)
        if t == law.stop:
            dropped = lowest(scores, count)
            keep(state, moment, dropped)
            return state, tuple(Zero(site, GATE, at) for site, at in dropped.items())
        if not count:
            return state, ()
        assert moment.expect is not None
        moment.expect(finite(scores), NOT_FINITE)
        state |= {f"{OFF}|{key}": off for key, off in lowest_in(moment.stacks, scores, count).items()}
        return state, (ZeroWhere(GATE, OFF),)


def window_shares(first: float, last: float) -> None:
    """Raise LoralignError where the shares before and after a window leave nothing."""
    if first + last >= 1:
        raise LoralignError(f"{first} of the run before and {last} after the budget shrinks leave nothing: lower them")
