"""Precondition each factor's gradient by the Gram matrix of the other one, then Adam.

    gA ← (BᵀB + δI)⁻¹·gA        gB ← gB·(AAᵀ + δI)⁻¹

Shapes:  A, gA (r, d_in) · B, gB (d_out, r)
Source:  Zhang & Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347, scaled
         AdamW. Official code: pilancilab/Riemannian_Preconditioned_LoRA; PEFT optimizers (create_riemannian_optimizer).
Differs: one eigendecomposition per step instead of a pseudo-inverse per module. No factor 1/s², as in
         the codes. The step of the product counts P_B·G·P_A twice, `lora_pro` once.
Cost:    4·r²(d_in + d_out) FLOPs a step; Adam's state.
Export:  exact.
Args:    damping: δ, absolute, in units of B² and A², 1e-6 in the official code, 1e-2 in PEFT, where it outweighs BᵀB
         for long after B = 0. betas, eps, momentum_dtype: Adam's. Clipping: the usual global norm of 1, before the
         preconditioner.
Example:
    >>> from loralign.methods.transform.riemannian import scaled_gradient
    >>> sorted(scaled_gradient().facts.accepts)
    ['one_sided', 'shapes', 'slots']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, MomentumDtype, NotNegative, bounded
from loralign.maths.linalg import gram, psd_inverse
from loralign.maths.lists import by_shape, stacked
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import Chain, chain
from loralign.types import Facts, Grad, Group, Pair, Prepared, SlotChange, State


@dataclass(frozen=True)
class Scaled:
    """Gradients to preconditioned gradients; keeps nothing."""

    damping: float
    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "shapes", "slots"}), transient=1.5)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: {} for factor in pair.train}

    def prepare(self, group: Group) -> Prepared:
        return Prepared()

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads = group.pairs, group.grads
        places = by_shape(pairs)
        X = [[stacked([getattr(pairs[k], f) for k in at]) for at in places] for f in "BA"]
        H = torch.stack([torch.cat([gram(B) for B in X[0]]), torch.cat([gram(A.mT) for A in X[1]])])
        inverse = psd_inverse(H + self.damping * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device))
        out = [Grad(None, None)] * len(pairs)
        for at, iB, iA in zip(places, *(whole.split([len(at) for at in places]) for whole in inverse), strict=True):
            gA, gB = ([getattr(grads[k], f) for k in at] for f in "AB")
            a = [None] * len(at) if gA[0] is None else (iB @ stacked(gA)).unbind()
            b = [None] * len(at) if gB[0] is None else (stacked(gB) @ iA).unbind()
            for k, *both in zip(at, a, b, strict=True):
                out[k] = Grad(*both)
        return out

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing is kept."""


@bounded
def scaled_gradient(
    damping: NotNegative = 1e-6,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    momentum_dtype: MomentumDtype = "float32",
) -> Chain:
    """The Riemannian preconditioner, then Adam in the preconditioned coordinates."""
    return chain(Scaled(damping), adamw(betas, eps, momentum_dtype))
