"""A trained number for every slot stands between A and B.

    W_eff = W0 + s·B·diag(φ(c))·A        φ(c) = c  (a gate)      or      φ(c) = r·softmax(c/τ)  (a beam)

Shapes:  A (r, d_in) · B (d_out, r) · c (r,)
Source:  Zhang et al., "AdaLoRA", arXiv 2303.10512, §3.1 (c: singular values, 0 at the start), QingruZhang/AdaLoRA@
         d10f5eb; Ding et al., "SoRA", arXiv 2311.11696 (c ~ N(0, 1)); Mao et al., "Dynamic Rank Distribution", arXiv
         2405.17357 (c = 0); Gu et al., "BeamLoRA", arXiv 2502.13604 (softmax, c = 0, so φ = 1).
Differs: none in the formula; φ(c) is multiplied into B, which every reader of the factors then sees.
Cost:    r numbers a site, one product of the size of B a forward.
Export:  exact; slots whose gate is zero are left out.
Args:    tau: τ of the beam, dimensionless, 0.05 in BeamLoRA's code at learning rates of 1e-4 and above, else 0.03.
         gate_lr: learning rate of c over that of A and B, 1 in the codes (SoRA's has an option for it).
Example:
    >>> import torch
    >>> from loralign.methods.form.gated import gated
    >>> from loralign.types import Live
    >>> own = Live(torch.ones(2, 3), torch.ones(4, 2), torch.zeros(0, 3), torch.zeros(4, 0), {"gate": torch.zeros(2)})
    >>> [bool(f.dense().any()) for f in gated().factors(own, ())]
    [True, False]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralign.maths.bounds import Positive, bounded
from loralign.maths.operators import Dense
from loralign.types import Draw, Facts, FormBase, Live, Operator, Weight


@dataclass(frozen=True)
class Gated(FormBase):
    facts: Facts
    start: Callable[[int, Draw], Tensor]
    """(r, draw) -> c before the first step."""
    phi: Callable[[Tensor], Tensor]

    def trained(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        return {"gate": self.start(r, draw)}

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        A, B = own.A, own.B * self.phi(own.own["gate"]).to(own.B.dtype)
        if own.A0.shape[0] == 0:
            return Dense(A), Dense(B)
        return Dense(torch.cat([A, own.A0.to(A.dtype)])), Dense(torch.cat([B, own.B0.to(B.dtype)], dim=1))


def _zeros(r: int, draw: Draw) -> Tensor:
    return torch.zeros(r)


def _normal(r: int, draw: Draw) -> Tensor:
    return torch.randn(r, generator=draw("gate"))


def _same(c: Tensor) -> Tensor:
    return c


@dataclass(frozen=True)
class _Beam:
    tau: float

    def __call__(self, c: Tensor) -> Tensor:
        return c.shape[0] * torch.softmax(c / self.tau, dim=0)


_GATE = frozenset({"gate"})


def _facts(gate_lr: float, **more: Any) -> Facts:
    return Facts(gated=True, commits=True, per_slot=_GATE, own_lr=gate_lr, **more)


@bounded
def gated(gate_lr: Positive = 1.0) -> Gated:
    """A gate that starts at zero: AdaLoRA's singular values, dynamic-rank LoRA's."""
    return Gated(_facts(gate_lr, switches=_GATE, own_decay=True), _zeros, _same)


@bounded
def normal_gated(gate_lr: Positive = 1.0) -> Gated:
    """A gate drawn from N(0, 1), without weight decay: SoRA's."""
    return Gated(_facts(gate_lr, switches=_GATE), _normal, _same)


@bounded
def beam(tau: Positive = 0.05, gate_lr: Positive = 1.0) -> Gated:
    """BeamLoRA's shares of r, which sum to r."""
    return Gated(_facts(gate_lr, shares=True, own_decay=True), _zeros, _Beam(tau))
