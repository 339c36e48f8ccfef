"""From a chosen step on, every change of the product counts 1 + λ times, as if W itself had been updated by λ of it.

    W_eff = W0 + s·B·A                                     until the snapshot (A_K, B_K)
    W_eff = W0 + s·[(1 + λ)·B | −λ·B_K]·[A ; A_K]           after it
    dL/dA = s·Bᵀ·G,  dL/dB = s·G·Aᵀ                         always those of the plain pair

Shapes:  A, A_K (r, d_in) · B, B_K (d_out, r) · G (d_out, d_in)
Source:  Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv
         2309.02411, algorithm 1: W ← W + λ·s·(B⁺A⁺ − BA) after each step t > K. Official code: none.
Differs: W is never written. For constant λ the paper's updates telescope to λ·s·(BA − B_K·A_K), so its W_eff is the one
         above, of rank 2r, with the same A and B at every step. `rule/delta_lora` takes the snapshot, as r frozen slots
         [−λ·B_K]·[A_K]; that they are there is what switches λ on.
Cost:    the forward of rank 2r, whose frozen half gets gradients that are thrown away; 4 B·r(d_in + d_out) frozen.
Export:  exact with rank 2r.
Args:    boost: λ, dimensionless, 2 in the paper's GPT-2 runs, 0.5 in its other runs; the rule takes the same. Dropout
         must be 0: with it dL/dW and dL/d(BA) differ.
Example:
    >>> import torch
    >>> from loralign.methods.form.delta_lora import boosted
    >>> from loralign.types import Live
    >>> A, B = torch.ones(1, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    >>> A1, B1 = (f.dense() for f in boosted(2.0).factors(Live(A, B, A.detach(), -2 * B.detach(), {}), ()))
    >>> (B1 @ A1).tolist(), torch.autograd.grad((B1 @ A1).sum(), A)[0].tolist()
    ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [[3.0, 3.0]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.maths.bounds import NotNegative, bounded
from loralign.maths.operators import Dense
from loralign.types import Facts, FormBase, Live, Operator


@dataclass(frozen=True)
class Boosted(FormBase):
    boost: float
    facts: ClassVar[Facts] = Facts(needs_no_dropout=True)

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        if own.A0.shape[0] == 0:
            return Dense(own.A), Dense(own.B)
        # values (A, (1 + λ)·B); A's gradient comes through (1 + λ)·B and is divided again, B's through the first term
        still = own.A.detach()
        A = still + (own.A - still) / (1 + self.boost)
        B = own.B + self.boost * own.B.detach()
        return Dense(torch.cat([A, own.A0.to(A.dtype)])), Dense(torch.cat([B, own.B0.to(B.dtype)], dim=1))


@bounded
def boosted(boost: NotNegative = 2.0) -> Boosted:
    """Delta-LoRA's forward."""
    return Boosted(boost)
