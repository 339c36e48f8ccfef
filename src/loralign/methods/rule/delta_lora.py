"""Take Delta-LoRA's snapshot: once, after K + 1 optimizer steps, the product becomes r frozen slots of weight −λ.

    frozen slots += [−λ·B_K]·[A_K]        (A_K, B_K): values after step K + 1;  `form/delta_lora` reads them

Shapes:  A_K (r, d_in) · B_K (d_out, r)
Source:  Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv
         2309.02411, algorithm 1: W is updated after steps t > K, t from 0, so the first product that enters is the one
         after K + 1 steps. Official code: none.
Differs: none; K = 0 is the earliest (in a port it disables the method).
Cost:    once, a copy of A and B.
Export:  exact with rank 2r.
Args:    boost: λ, as in the form. wait_steps: K, optimizer steps, 500 for GPT-2 and 1000 for BART in the paper; a run
         that ends before it is plain LoRA.
Example:
    >>> from loralign.methods.rule.delta_lora import snapshot
    >>> snapshot(wait_steps=10).wait_steps
    10
"""

from __future__ import annotations

from dataclasses import dataclass

from loralign.maths.bounds import NotNegative, Steps, bounded
from loralign.types import Facts, Freeze, Moment, Plan, RuleBase, RuleState


@dataclass(frozen=True)
class Snapshot(RuleBase):
    boost: float
    wait_steps: int

    @property
    def facts(self) -> Facts:
        return Facts(events=True, wait_steps=self.wait_steps, freezes=1)

    def step(self, state: RuleState, moment: Moment) -> tuple[RuleState, Plan | None]:
        if moment.step != self.wait_steps + 1:
            return state, None
        return state, tuple(Freeze(site.name, -self.boost) for site in moment.sites)


@bounded
def snapshot(boost: NotNegative = 2.0, wait_steps: Steps = 500) -> Snapshot:
    """Delta-LoRA's start of the base update."""
    return Snapshot(boost, wait_steps)
