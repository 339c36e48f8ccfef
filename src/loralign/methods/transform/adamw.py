"""Adam on each factor by itself, bias-corrected; decoupled weight decay belongs to the optimizer around it.

    m ← β1·m + (1 − β1)·g        v ← β2·v + (1 − β2)·g²        update = −lr · (m / (1 − β1ᵗ)) / (√(v / (1 − β2ᵗ)) + ε)

Shapes:  g, m, v like the factor, A (r, d_in) or B (d_out, r)
Source:  Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2; Kingma & Ba,
         arXiv 1412.6980, algorithm 1. Official code: torch.optim.AdamW, whose fused kernel this calls.
Differs: none; the update is formed on a zero buffer (one more pass over the adapter) so that masks can act on it.
Cost:    8 bytes of state per trained number; one fused call per factor kind.
Export:  exact.
Args:    betas: (β1, β2), 0.9 and 0.999. eps: ε, 1e-8.
Example:
    >>> from loralign.methods.transform.adamw import adamw
    >>> adamw().lr_ratio
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, bounded
from loralign.maths.lists import adam_state, adam_updates
from loralign.types import Ctx, Grad, Pair, SlotPlan, State


@dataclass(frozen=True)
class AdamW:
    betas: tuple[float, float]
    eps: float
    accepts: frozenset[str] = frozenset({"one_sided", "gated", "bf16", "sharded", "shapes", "zero"})
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: adam_state(getattr(pair, factor)) for factor in pair.train}

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        return {}

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        A = adam_updates([g.A for g in grads], [st.get("A") for st in state], ctx.lr_A, self.betas, self.eps)
        B = adam_updates([g.B for g in grads], [st.get("B") for st in state], ctx.lr_B, self.betas, self.eps)
        return [Grad(a, b) for a, b in zip(A, B, strict=True)]

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        """Dead slots lose their moments; new ones start with m = 0 and the mean v of their tensor.

        (With v = 0 under a late step counter, Adam's next updates would be up to 6.6·lr instead of at most lr.)
        """
        fresh = (*plan.on, *(d for d, _ in plan.copy))
        for factor, st in state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                slots = st[key] if factor == "A" else st[key].T
                mean = slots.mean(dim=0)
                slots[list(plan.off)] = 0.0
                slots[list(fresh)] = mean if key == "exp_avg_sq" else torch.zeros_like(mean)


@bounded
def adamw(betas: Betas = (0.9, 0.999), eps: Epsilon = 1e-8) -> AdamW:
    """Adam on each factor."""
    return AdamW(tuple(betas), eps)  # type: ignore[arg-type]
