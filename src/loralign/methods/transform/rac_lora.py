"""The exact step of a link with one frozen factor: the gradient projected onto the frozen factor's span, no moments.

    ΔB = −lr·gB·(AAᵀ)⁻¹/s²        so that W⁺ = W − lr·G·P_A        (A frozen)
    ΔA = −lr·(BᵀB)⁻¹·gA/s²        so that W⁺ = W − lr·P_B·G        (B frozen)

Shapes:  A, gA (r, d_in) · B, gB (d_out, r) · G = ∂f/∂W (d_out, d_in) · P_A = Aᵀ(AAᵀ)⁻¹A · P_B = B(BᵀB)⁻¹Bᵀ
Source:  Malinovsky et al., "Randomized Asymmetric Chain of LoRA", arXiv 2410.08305, equations 3 and 4: the minimiser of
         the quadratic bound over the free factor. Official code: none of this form.
Differs: none known. Steps after the first of a link go on from the product as it is.
Unverified: the paper's body could not be read; from reviews.
Cost:    2·r²·(d_in + d_out) FLOPs a step, no optimizer state.
Export:  exact.
Args:    none. Its rate is that of plain gradient descent on W, 1/L. Clipping: none, it would not be the exact step.
Example:
    >>> from loralign.methods.transform.rac_lora import projected_descent
    >>> projected_descent().init(None)
    {}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from loralign.maths.linalg import gram, psd_inverse
from loralign.maths.lists import scales, stacked
from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State, WorkFailed


@dataclass(frozen=True)
class ProjectedDescent:
    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "slots"}), transient=0.5)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads, ctx = group.pairs, group.grads, group.ctx
        if grads[0].A is not None and grads[0].B is not None:
            raise WorkFailed(f"this step is exact where one factor rests, and both train at {pairs[0].name}")
        if grads[0].A is None:
            iA = psd_inverse(gram(stacked([p.A for p in pairs]).mT))
            moved = stacked([g.B for g in grads]) @ (iA * (-ctx.lr_B / scales(pairs, iA) ** 2))
            return [Grad(None, b) for b in moved.unbind()]
        iB = psd_inverse(gram(stacked([p.B for p in pairs])))
        moved = (iB * (-ctx.lr_A / scales(pairs, iB) ** 2)) @ stacked([g.A for g in grads])
        return [Grad(a, None) for a in moved.unbind()]

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing is kept."""


def projected_descent() -> ProjectedDescent:
    """RAC-LoRA's exact step."""
    return ProjectedDescent()
