"""Keep the slots whose numbers matter steadily to the loss, as many as a shrinking budget allows.

    I = |w·g|    Ī ← β1·Ī + (1 − β1)·I    Ū ← β2·Ū + (1 − β2)·|I − Ī|    s(w) = Ī·Ū            w: every trained number
    S_j = s(c_j) + mean_i s(B_ij) + mean_k s(A_jk)
    b(t) = ⌊bT + (b0 − bT)·(1 − (t − t_i)/(T − t_f − t_i))³⌋     every ΔT steps: c ← 0 for the b0 − b(t) lowest S_j
    R = γ/2N·Σ(‖AAᵀ − I‖ + ‖BᵀB − I‖)                            γ·dR/dA, γ·dR/dB join the gradients

Shapes:  A (r, d_in) · B (d_out, r) · c, S (r,) · N sites
Source:  Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.
         Official code: QingruZhang/AdaLoRA@d10f5eb, loralib/adalora.py.
Differs: where paper and code differ, the code is followed (norm not squared, mean over matrices, values after the step
         with the gradient of that step, t from 0). Exact counts on ties (the code's threshold drops more, and fails
         where nothing is to be dropped); the budget is settled at t = T − t_f. s = alpha/r of the target rank, not of
         the one at the start. The regulariser joins the gradient and never the loss, so evaluation losses are clean.
Unverified: the paper's text was not at hand: its equations as its official code has them.
Cost:    two fp32 numbers for every trained one, about ten elementwise passes a step; 6·r²(d_in + d_out) FLOPs for R.
Export:  exact; ranks differ by module, some may be 0.
Args:    start_ratio: slots at the start over those at the end, 1.5. first, last: t_i/T and t_f/T, shares of the run
         before and after the budget shrinks; official scripts 0.07 to 0.3 and 0.1 to 0.4. interval: ΔT, optimizer
         steps, 1 to 100 in the scripts; None: T/500. betas: (β1, β2), 0.85 both. orthogonal: γ, 0.1 in most official
         scripts, 0.5 in PEFT.
Example:
    >>> import torch
    >>> from loralign.methods.rule.adalora import sensitivity
    >>> mean, spread, one = [torch.zeros(1)], [torch.zeros(1)], [torch.ones(1)]
    >>> for _ in range(2):
    ...     sensitivity(one, one, mean, spread, (0.85, 0.85))
    >>> round(float(mean[0]), 4), round(float(spread[0]), 5)
    (0.2775, 0.21675)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import AtLeastOne, Betas, Count, NotNegative, Share, bounded
from loralign.maths.budget import cubic_budget
from loralign.methods.rule.combine import GATE, Law, Shrink, average, slots_of, window_shares
from loralign.methods.rule.rm_lora import slopes
from loralign.types import Joint, Moment, RuleState, Stack

MEAN, SPREAD = "mean", "spread"
PARTS = ("A", "B", GATE)
Tensors = list[Tensor]


@torch.no_grad()
def sensitivity(w: Tensors, g: Tensors, mean: Tensors, spread: Tensors, betas: tuple[float, float]) -> None:
    """One observation of |w·g| into Ī and Ū, in place; lists of tensors."""
    seen = torch._foreach_mul(w, g)
    torch._foreach_abs_(seen)
    torch._foreach_lerp_(mean, seen, 1 - betas[0])
    torch._foreach_sub_(seen, mean)
    torch._foreach_abs_(seen)
    torch._foreach_lerp_(spread, seen, 1 - betas[1])


@dataclass(frozen=True)
class Sensitivity:
    betas: tuple[float, float]
    transient: ClassVar[float] = 2.0

    def observe(self, state: RuleState, moment: Moment) -> None:
        each = [(stack, part) for stack in moment.stacks for part in PARTS]
        w, g = [st.tensors[part] for st, part in each], [st.grads[part] for st, part in each]
        mean, spread = (
            [average(state, f"{kind}|{st.key}|{part}", like) for (st, part), like in zip(each, w, strict=True)]
            for kind in (MEAN, SPREAD)
        )
        sensitivity(w, g, mean, spread, self.betas)

    def scores(self, state: RuleState, moment: Moment) -> Mapping[str, Tensor]:
        each = [f"{stack.key}|{part}" for part in PARTS for stack in moment.stacks]
        s = torch._foreach_mul([state[f"{MEAN}|{k}"] for k in each], [state[f"{SPREAD}|{k}"] for k in each])
        n = len(moment.stacks)
        A, B = [x.mean(2) for x in s[:n]], [x.mean(1) for x in s[n : 2 * n]]
        return slots_of(moment.stacks, torch._foreach_add(torch._foreach_add(s[2 * n :], B), A))


@dataclass(frozen=True)
class Orthogonal:
    """RM-LoRA's regulariser too."""

    gamma: float

    def __call__(self, stacks: Sequence[Stack]) -> Joint | None:
        return slopes(stacks, self.gamma)


@bounded
def sensitivity_budget(
    start_ratio: AtLeastOne = 1.5,
    first: Share = 0.1,
    last: Share = 0.3,
    interval: Count | None = None,
    betas: Betas = (0.85, 0.85),
    orthogonal: NotNegative = 0.1,
) -> Shrink:
    """AdaLoRA's allocation of the budget."""
    window_shares(first, last)
    law = Law(start_ratio, first, last, interval, cubic_budget)
    return Shrink(Sensitivity((betas[0], betas[1])), law, Orthogonal(orthogonal))
