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
    >>> mean, spread = torch.zeros(1), torch.zeros(1)
    >>> for _ in range(2):
    ...     sensitivity([torch.ones(1)], [torch.ones(1)], [mean], [spread], (0.85, 0.85))
    >>> round(float(mean), 4), round(float(spread), 5)
    (0.2775, 0.21675)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralign.maths.bounds import AtLeastOne, Betas, Count, NotNegative, Share, bounded
from loralign.maths.budget import cubic_budget
from loralign.methods.rule.combine import GATE, Law, Shrink, window_shares
from loralign.methods.rule.rm_lora import slopes
from loralign.types import Moment, Named, RuleState, SiteShape

MEAN, SPREAD = "mean", "spread"
Many = Sequence[Tensor]


@torch.no_grad()
def sensitivity(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    mean: Sequence[Tensor],
    spread: Sequence[Tensor],
    betas: tuple[float, float],
) -> None:
    """One observation of |w·g| into Ī and Ū, in place."""
    seen = torch._foreach_abs(torch._foreach_mul(list(w), list(g)))
    torch._foreach_lerp_(list(mean), seen, 1 - betas[0])
    torch._foreach_sub_(seen, list(mean))
    torch._foreach_abs_(seen)
    torch._foreach_lerp_(list(spread), seen, 1 - betas[1])


@dataclass(frozen=True)
class Sensitivity:
    betas: tuple[float, float]

    def observe(self, state: RuleState, moment: Moment) -> None:
        w = {key: value.to(torch.promote_types(value.dtype, torch.float32)) for key, value in moment.tensors.items()}
        for (site, name), value in w.items():
            for kind in (MEAN, SPREAD):
                known = state.get(f"{kind}|{site}|{name}")
                state[f"{kind}|{site}|{name}"] = torch.zeros_like(value) if known is None else known.to(value)
        g = [moment.grads[key].to(w[key]) if key in moment.grads else torch.zeros_like(w[key]) for key in w]
        mean, spread = ([state[f"{kind}|{site}|{name}"] for site, name in w] for kind in (MEAN, SPREAD))
        sensitivity(list(w.values()), g, mean, spread, self.betas)

    def scores(self, state: RuleState, sites: Sequence[SiteShape]) -> Mapping[str, Tensor]:
        return {site.name: self._score(state, site) for site in sites}

    def _score(self, state: RuleState, site: SiteShape) -> Tensor:
        found = {n: state[f"{MEAN}|{site.name}|{n}"] * state[f"{SPREAD}|{site.name}|{n}"] for n in ("A", "B", GATE)}
        return found[GATE] + found["B"].mean(0) + found["A"].mean(1)


@dataclass(frozen=True)
class Orthogonal:
    """RM-LoRA's regulariser too."""

    gamma: float

    def __call__(self, tensors: Named) -> Named | None:
        factors = {key: X for key, X in tensors.items() if key[1] in "AB"}
        return slopes(factors, self.gamma / len(factors)) if self.gamma and factors else None


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
