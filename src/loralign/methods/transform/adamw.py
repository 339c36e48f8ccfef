"""Adam on each factor by itself, bias-corrected; decoupled weight decay belongs to the optimizer around it.

    m ← β1·m + (1 − β1)·g        v ← β2·v + (1 − β2)·g²        update = −lr · (m / (1 − β1ᵗ)) / (√(v / (1 − β2ᵗ)) + ε)

Shapes:  g, m, v like the factor, A (r, d_in) or B (d_out, r)
Source:  Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2; Kingma & Ba,
         arXiv 1412.6980, algorithm 1. Official code: torch.optim.AdamW, whose fused kernel this calls.
Differs: none; the update is formed on a zero buffer (one more pass over the adapter) so that masks can act on it.
Cost:    8 bytes of state per trained number, 6 with m in bfloat16; one fused call per factor kind.
Export:  exact.
Args:    betas: (β1, β2), 0.9 and 0.999. eps: ε, 1e-8. momentum_dtype: what m is kept in; v stays fp32.
Example:
    >>> from loralign.methods.transform.adamw import adamw
    >>> adamw().lr_ratio
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, MomentumDtype, bounded
from loralign.maths.lists import adam_slots, adam_state, adam_updates
from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State


@dataclass(frozen=True)
class AdamW:
    betas: tuple[float, float]
    eps: float
    momentum_dtype: MomentumDtype = "float32"
    lr_ratio: float = 1.0

    @property
    def facts(self) -> Facts:
        return Facts(
            accepts=frozenset({"one_sided", "gated", "bf16", "sharded", "shapes", "slots", "elementwise"}),
            transient=0.5 if self.momentum_dtype == "bfloat16" else 0.0,
        )

    def init(self, pair: Pair) -> State:
        return {factor: adam_state(getattr(pair, factor), self.momentum_dtype) for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        _, grads, state, ctx = group
        A = adam_updates([g.A for g in grads], [st.get("A") for st in state], ctx.lr_A, self.betas, self.eps)
        B = adam_updates([g.B for g in grads], [st.get("B") for st in state], ctx.lr_B, self.betas, self.eps)
        return [Grad(a, b) for a, b in zip(A, B, strict=True)]

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        for factor, st in state.items():
            adam_slots(st, 0 if factor == "A" else 1, change)


@bounded
def adamw(betas: Betas = (0.9, 0.999), eps: Epsilon = 1e-8, momentum_dtype: MomentumDtype = "float32") -> AdamW:
    """Adam on each factor."""
    return AdamW((betas[0], betas[1]), eps, momentum_dtype)
