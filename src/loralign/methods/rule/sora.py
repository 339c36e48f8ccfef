"""Shrink every gate by a constant after each step, so that gates that the loss does not hold up become exactly zero.

    g ← T_ξ(AdamW step of g)        T_ξ(x) = sign(x)·max(|x| − ξ, 0)
    target_rank, an extension of ours: ξ starts as what would take the surplus gates to zero by the end of the course;
    at every n-th step ξ ← 1.05·ξ where fewer gates are within ξ than a budget that falls linearly to target_rank·N
    wants off by then, else ξ/1.05; at its end the smallest |g| are cut, for good

Shapes:  g (r,), the gate of a site; A and B step as plain LoRA's
Source:  Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models" (SoRA), arXiv 2311.11696. Official
         code: TsinghuaC3I/SoRA@c275ac2, sparse_optimizer.py.
Differs: from the code: its three masked writes cut at 2ξ (0.15 -> 0 for ξ = 0.1, here 0.05); it adds λ·mean|g| to the
         loss as well, here `l1` (off). Follows the paper's operator. A list of thresholds is one run after another.
         `target_rank` is in neither: there the number of slots at the end is what it comes to.
Unverified: the paper's body was not at hand: its operator as abstract, README and code have it.
Cost:    r numbers a site; one pass over them a step.
Export:  exact; ranks differ by module, some may be 0.
Args:    threshold: ξ, absolute, 3e-4 in the script for STS-B, 1e-3 in the code, and here where nothing is said; from
         |g| ≈ 1 it needs 1/ξ steps to act, and a zero gate comes back only while Adam's step (about the learning rate)
         exceeds it. l1: λ of the code's additional λ·mean|g|, 10 in its script; its gradient is λ·sign(g)/Σr.
         target_rank: mean rank at the end, instead of a threshold. last: share of the run after the cut.
Example:
    >>> from loralign.methods.rule.sora import soft_threshold
    >>> soft_threshold(threshold=1e-3).threshold
    0.001
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loralign.maths.bounds import Count, NotNegative, Share, bounded
from loralign.maths.budget import Window, lowest, too_short, window
from loralign.methods.rule.combine import GATE, final, gates_of, keep
from loralign.types import (
    Ctx,
    Facts,
    Joint,
    LoralignError,
    Moment,
    Plan,
    Prox,
    RuleBase,
    RuleState,
    SiteShape,
    Stack,
    Zero,
)

log = logging.getLogger("loralign")

EVENTS = 100
"""Times at which ξ is set anew, of a run."""

GROWTH = 1.05


def steered(xi: float, sizes: Tensor, zeros: int) -> float:
    """The next ξ for these |g|, of which `zeros` are to be off by now."""
    return xi * GROWTH if int((sizes <= xi).sum()) < zeros else xi / GROWTH


@dataclass(frozen=True)
class Target:
    """A mean rank, and when it is reached."""

    rank: int
    last: float

    def window(self, total_steps: int) -> Window:
        return window(total_steps, 0.0, self.last, max(1, total_steps // EVENTS))

    def zeros(self, t: int, course: Window, sites: Sequence[SiteShape]) -> int:
        """Slots that are to be off after step t."""
        return round(sum(site.r - self.rank for site in sites) * course.progress(t))


@dataclass(frozen=True)
class SoftThreshold(RuleBase):
    threshold: float
    l1: float
    target: Target | None = None

    @property
    def facts(self) -> Facts:
        common = Facts(events=True, allocates=True, needs_gate=True)
        if self.target is None:
            return common
        target = self.target
        return replace(
            common,
            least_rank=target.rank,
            least_option="target_rank",
            too_short=lambda total: too_short(total, 0.0, target.last),
            acts_by=lambda total: target.window(total).stop + 1,
        )

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        slots = sum(len(stack.sites) * stack.r for stack in stacks)
        return [{GATE: self.l1 / slots * st.tensors[GATE].sign()} for st in stacks] if self.l1 and slots else None

    def update_mask(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        return final(state, stacks)

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if self.target is not None:
            return self._steer(self.target, state, moment)
        if moment.step == 0:
            if self.threshold and moment.total_steps * self.threshold < 1:
                said = "a gate of 1 needs %.0f steps to shrink to zero, the run has %d: raise `options.threshold`"
                log.info(said, 1 / self.threshold, moment.total_steps)
            return state, None
        return state, _shrink(moment, self.threshold)

    def _steer(self, target: Target, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        t, course = moment.step, target.window(moment.total_steps)
        if t > course.stop:
            return self._cut(target, state, moment, course) if t == course.stop + 1 else (state, None)
        if t % course.interval == 0:
            sizes = torch.cat(list(gates_of(moment).values())).abs().double()
            if t == 0:  # what takes as many as are to be off at the end to zero until then, if nothing holds them up
                zeros = target.zeros(course.stop, course, moment.sites)
                xi = float(sizes.sort().values[zeros - 1]) / course.stop if zeros else 0.0
            else:
                xi = steered(float(state["threshold"]), sizes, target.zeros(t, course, moment.sites))
            state["threshold"] = torch.tensor(xi, dtype=torch.float64)
        return state, _shrink(moment, float(state["threshold"])) if t else None

    def _cut(self, target: Target, state: RuleState, moment: Moment, course: Window) -> tuple[RuleState, Plan | None]:
        sizes = {name: c.abs() for name, c in gates_of(moment).items()}
        dropped = lowest(sizes, target.zeros(moment.step, course, moment.sites))
        keep(state, moment, dropped)
        xi = float(state["threshold"])
        late = [float(sizes[name][j]) - xi for name, at in dropped.items() for j in at if sizes[name][j] > xi]
        said = "%d slots were still on when the budget was cut to %d a module, with gates up to %.2g"
        log.info(said, len(late), target.rank, max(late, default=0.0))
        return state, tuple(Zero(site, GATE, at) for site, at in dropped.items())


def _shrink(moment: Moment, threshold: float) -> Plan | None:
    return (Prox(tuple(site.name for site in moment.sites), GATE, threshold),) if threshold else None


@bounded
def soft_threshold(
    threshold: NotNegative | None = None, l1: NotNegative = 0.0, target_rank: Count | None = None, last: Share = 0.2
) -> SoftThreshold:
    """SoRA's proximal step."""
    if target_rank is None:
        return SoftThreshold(1e-3 if threshold is None else threshold, l1)
    if threshold is not None:
        raise LoralignError("a target_rank finds the threshold by itself: leave one of the two out")
    return SoftThreshold(0.0, l1, Target(target_rank, last))
