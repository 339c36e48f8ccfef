"""A scorer and a law make a rule: slots of lowest score are gated off for now, and for good where the law settles.

    observe -> score -> due? -> the lowest b0 − b(t) slots of all sites: gate ← 0 (they train on, and may come back)
    at the law's stop the mask becomes final: gates of dropped slots are held at zero, A and B as they are

A scorer keeps averages in the rule's state; a law is a course of the budget. `adalora` and `dynamic_rank` are two of
the combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loralign.maths.budget import Window, lowest, narrowed, too_short, widened, window
from loralign.types import (
    NOTHING,
    Ctx,
    Facts,
    LoralignError,
    Moment,
    Named,
    Plan,
    RuleBase,
    RuleNeed,
    RuleState,
    SiteShape,
    Zero,
)

GATE = "gate"


class Scorer(Protocol):
    """Averages over optimizer steps, and the score of every slot that follows from them."""

    def observe(self, state: RuleState, moment: Moment) -> None: ...

    def scores(self, state: RuleState, moment: Moment) -> Mapping[str, Tensor]:
        """(r,) by site, the higher the better."""
        ...


def batches(moment: Moment) -> dict[str, list[str]]:
    """The sites of each shape (and device, where there are several) by a name for them: what can be stacked."""
    devices: dict[torch.device, int] = {}
    found: dict[str, list[str]] = {}
    for site in moment.sites:
        place = devices.setdefault(moment.tensors[site.name, "A"].device, len(devices))
        found.setdefault(f"{site.r}x{site.d_out}x{site.d_in}" + f"@{place}" * (place > 0), []).append(site.name)
    return found


def average(state: RuleState, key: str, like: Tensor) -> Tensor:
    """A running average of the state, zero where it is new, on the device of `like`."""
    known = state.get(key)
    state[key] = torch.zeros_like(like) if known is None else known.to(like)
    return state[key]


class Regulariser(Protocol):
    def __call__(self, tensors: Named) -> Named | None:
        """Its gradient, by (site, name)."""
        ...


def unregularised(tensors: Named) -> None:
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
    needs: RuleNeed = NOTHING

    @property
    def facts(self) -> Facts:
        law = self.law
        schedule: dict[str, Any] = {"slots": law.slots, "too_short": law.too_short, "acts_by": law.acts_by}
        return Facts(events=True, allocates=True, needs_gate=True, **schedule)

    def penalty(self, state: RuleState, tensors: Named, ctx: Ctx) -> Named | None:
        if not self.regularised_to_the_end and ctx.total_steps and ctx.step - 1 > self.law.window(ctx.total_steps).stop:
            return None
        return self.regulariser(tensors)

    def update_mask(self, state: RuleState, tensors: Named, ctx: Ctx) -> Named | None:
        """Gates that were dropped for good stay where they are, at zero."""
        kept = {key.removeprefix("kept|"): value for key, value in state.items() if key.startswith("kept|")}
        return {(site, GATE): on.to(tensors[site, GATE]) for site, on in kept.items() if (site, GATE) in tensors}

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 0:
            return state, None
        t, law = moment.step - 1, self.law.window(moment.total_steps)
        if t < law.stop:
            self.scorer.observe(state, moment)
        if not law.due(t):
            return state, None
        b0, bT = self.law.ends(moment.sites)
        dropped = lowest(self.scorer.scores(state, moment), b0 - self.law.budget(t, law, b0, bT))
        if t == law.stop:
            for site in moment.sites:
                on = torch.ones(site.r, dtype=torch.bool)
                on[list(dropped.get(site.name, ()))] = False
                state[f"kept|{site.name}"] = on
        return state, tuple(Zero(site, GATE, at) for site, at in dropped.items())


def window_shares(first: float, last: float) -> None:
    """Raise LoralignError where the shares before and after a window leave nothing."""
    if first + last >= 1:
        raise LoralignError(f"{first} of the run before and {last} after the budget shrinks leave nothing: lower them")
