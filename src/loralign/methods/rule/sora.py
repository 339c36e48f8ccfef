"""Shrink every gate by a constant after each step, so that gates that the loss does not hold up become exactly zero.

    g ← T_ξ(AdamW step of g)        T_ξ(x) = sign(x)·max(|x| − ξ, 0)

Shapes:  g (r,), the gate of a site; A and B step as plain LoRA's
Source:  Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models" (SoRA), arXiv 2311.11696. Official
         code: TsinghuaC3I/SoRA@c275ac2, sparse_optimizer.py.
Differs: from the code: its three masked writes cut at 2ξ (0.15 -> 0 for ξ = 0.1, here 0.05); it adds λ·mean|g| to the
         loss as well, here `l1` (off). Follows the paper's operator. A list of thresholds is one run after another.
Unverified: the paper's body was not at hand: its operator as abstract, README and code have it.
Cost:    r numbers a site; one pass over them a step.
Export:  exact; ranks differ by module, some may be 0.
Args:    threshold: ξ, absolute, 3e-4 in the script for STS-B, 1e-3 in the code; from |g| ≈ 1 it needs 1/ξ steps to act,
         and a zero gate comes back only while Adam's step (about the learning rate) exceeds it. l1: λ of the code's
         additional λ·mean|g|, 10 in its script; its gradient is λ·sign(g)/Σr.
Example:
    >>> from loralign.methods.rule.sora import soft_threshold
    >>> soft_threshold(threshold=1e-3).threshold
    0.001
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from loralign.maths.bounds import NotNegative, bounded
from loralign.types import NOTHING, Ctx, Facts, Joint, Moment, Plan, Prox, RuleBase, RuleNeed, RuleState, Stack

GATE = "gate"
log = logging.getLogger("loralign")


@dataclass(frozen=True)
class SoftThreshold(RuleBase):
    threshold: float
    l1: float
    needs: RuleNeed = NOTHING

    @property
    def facts(self) -> Facts:
        return Facts(events=True, allocates=True, needs_gate=True)

    def penalty(self, state: RuleState, stacks: Sequence[Stack], ctx: Ctx) -> Joint | None:
        slots = sum(len(stack.sites) * stack.r for stack in stacks)
        return [{GATE: self.l1 / slots * st.tensors[GATE].sign()} for st in stacks] if self.l1 and slots else None

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step == 0:
            if self.threshold and moment.total_steps * self.threshold < 1:
                said = "a gate of 1 needs %.0f steps to shrink to zero, the run has %d: raise `options.threshold`"
                log.info(said, 1 / self.threshold, moment.total_steps)
            return state, None
        if not self.threshold:
            return state, None
        return state, (Prox(tuple(site.name for site in moment.sites), GATE, self.threshold),)


@bounded
def soft_threshold(threshold: NotNegative = 1e-3, l1: NotNegative = 0.0) -> SoftThreshold:
    """SoRA's proximal step."""
    return SoftThreshold(threshold, l1)
