"""Overwrite the slots of least weight by copies of what the heaviest ones were some steps before.

    φ = r·softmax(c/τ) of every site; all slots of all sites by φ, the heaviest first; kept: cumulated mass ≤ p(t)·Σr
    p(t) = 1 − (1 − p0)(1 + cos(πt/T_end))/2, 1 from T_end on
    a site with K slots that are not kept: its K heaviest are donors d, matched at random to the K lightest l
    A[l] ← A'[d], B[:, l] ← B'[:, d] (A', B': snapshot ΔT/2 before)      c_l, c_d ← (c_l + c_d)/2, moments of c ← 0

Shapes:  A (r, d_in) · B (d_out, r) · c, φ (r,)
Source:  Gu et al., "BeamLoRA: Beam-Constraint Low-Rank Adaptation", arXiv 2502.13604. Official code:
         gccnlp/BeamLoRA@2610c6a, train.py.
Differs: from the code: moments of an overwritten slot start as those of any copied slot (its write to them has no
         effect, the loser's stay); K is at most r/2, so that no donor is overwritten; no event where p = 1 (rounding
         prunes one there); pairs are drawn from a generator keyed by (seed, step, module). As there: the snapshot is
         taken after step ΔT/2 + 1, an event at step t uses p(t − 1), the slot that crosses the cut is overwritten.
Unverified: the paper's body was not at hand: its law and actions as its code has them.
Cost:    two products per event; a snapshot of A and B; r numbers a site.
Export:  exact; rank r everywhere.
Args:    tau: τ, as in the form. keep: p0, 0.95. interval: ΔT, optimizer steps, 3000 of 37k in the code's script; None:
         a twelfth of the run. until: T_end as a share of the run, 2/3.
Example:
    >>> import torch
    >>> from loralign.methods.rule.beamlora import beyond
    >>> [len(at) for at in beyond({"a": torch.ones(60), "b": torch.ones(40)}, 0.95).values()]
    [5]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Positive, Share, bounded
from loralign.maths.budget import Slots, cut, in_order
from loralign.methods.rule.combine import GATE, slots_of
from loralign.types import Copy, Facts, Moment, Plan, RuleBase, RuleState, Set

SNAPSHOT = "snapshot"


def threshold(t: float, end: float, p0: float) -> float:
    """p(t)."""
    return 1.0 if t >= end else 1 - (1 - p0) * (1 + math.cos(math.pi * t / end)) / 2


def beyond(phi: Mapping[str, Tensor], p: float) -> Slots:
    """The slots after the cumulated mass exceeds p of the whole, by site."""
    return cut(phi, lambda values: int((values.cumsum(0) <= p * values.sum() * (1 + 1e-12)).sum()))


@dataclass(frozen=True)
class Beam(RuleBase):
    tau: float
    keep: float
    interval: int | None
    until: float

    @property
    def facts(self) -> Facts:
        return Facts(events=True, allocates=True, needs_shares=True, too_short=self.too_short, acts_by=self.every)

    def every(self, total_steps: int) -> int:
        return self.interval or max(1, total_steps // 12)

    def too_short(self, total_steps: int) -> str:
        every = self.every(total_steps)
        if total_steps >= 2 * every and threshold(every - 1, self.until * total_steps, self.keep) < 1:
            return ""
        return (
            f"its first event comes after step {every}, and a run of {total_steps} optimizer steps has no room for it: "
            "train longer, or lower `options.interval`"
        )

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        t, T = moment.step, moment.total_steps
        if t == 0:
            return state, None
        every = self.every(T)
        if (t - 1) % every == every // 2:
            for stack in moment.stacks:
                for side in "AB":
                    rows = zip(stack.sites, stack.tensors[side].clone().unbind(), strict=True)
                    state |= {f"{SNAPSHOT}|{site}|{side}": row for site, row in rows}
        p = threshold(t - 1, self.until * T, self.keep)
        if t % every or T - t < every or p >= 1 - 1e-6:
            return state, None
        gates = [st.tensors[GATE].double() for st in moment.stacks]
        shares = [c.shape[1] * torch.softmax(c / self.tau, 1) for c in gates]
        phi, c = (in_order(slots_of(moment.stacks, found)) for found in (shares, gates))
        lost = beyond(phi, p)
        made = [pair for name, at in lost.items() if (pair := self._copy(name, at, phi[name], c[name], moment))]
        return state, tuple(verb for alike in zip(*made, strict=True) for verb in alike)

    def _copy(
        self, name: str, losers: Sequence[int], phi: Tensor, gates: Tensor, moment: Moment
    ) -> tuple[Copy, Set] | None:
        order = phi.sort(descending=True, stable=True).indices.tolist()
        count = min(len(losers), len(order) // 2)
        if not count:
            return None
        drawn = torch.randperm(count, generator=moment.draw("beam", name)).tolist()
        worst, donors = order[len(order) - count :], [order[k] for k in drawn]
        c = gates.tolist()
        for low, high in zip(worst, donors, strict=True):
            c[low] = c[high] = (c[low] + c[high]) / 2
        copied = Copy(name, tuple(worst), tuple(donors), SNAPSHOT)
        return copied, Set(name, GATE, tuple(range(len(c))), tuple(c))


@bounded
def beam_copies(
    tau: Positive = 0.05, keep: Share = 0.95, interval: Count | None = None, until: Positive = 0.6667
) -> Beam:
    """BeamLoRA's expansion of heavy slots into the places of light ones."""
    return Beam(tau, keep, interval, until)
