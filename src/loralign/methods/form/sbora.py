"""One factor is rows or columns of the identity, so the other one *is* r columns or r rows of the update.

    fixed A:  A = E_I        y = x·W0ᵀ + s·x[..., I]·Bᵀ        column i_j of W moves by s·B[:, j]
    fixed B:  B = E_Iᵀ       y = x·W0ᵀ, y[..., I] += s·x·Aᵀ    row i_j of W moves by s·A[j]

Shapes:  I (r,), distinct · A (r, d_in) · B (d_out, r)
Source:  Po et al., "SBoRA: Low-Rank Adaptation with Regional Weight Updates", arXiv 2407.05413. Official code:
         cityuhkai/SBoRA, no usable licence: written from the formulas of its two figures.
Differs: indices are drawn by (seed, module) and kept with the adapter; there they are drawn by Python's global
         generator and held as a Parameter. Dropout acts on the r gathered features; there on all of x.
         Preset "paper": r, alpha and the scripts' dropout; targets (q, k, v, up, down: o and gate stay as they are) and
         warm-up (100 steps) are the file's to say.
Cost:    half of LoRA's trained numbers on square matrices. Fixed A: no product with A, r features kept for backward
         instead of x. Fixed B: x is kept as LoRA keeps it.
Export:  exact.
Args:    place: which r indices of the seed's order are taken, 0-based; adapters of one seed and rank with different
         places touch different columns (rows), so that their sum is exact and has no interference.
Unverified: the paper's body.
Example:
    >>> import torch
    >>> from loralign.methods.form.sbora import fixed_A
    >>> from loralign.types import Live, Weight
    >>> draw = lambda purpose, step=0: torch.Generator().manual_seed(0)
    >>> own = fixed_A().constants(Weight("w", (2, 4), lambda: torch.zeros(2, 4)), 1, draw)
    >>> B, none = torch.tensor([[1.0], [2.0]]), torch.zeros(0, 4)
    >>> A1, B1 = fixed_A().factors(Live(none, B, none, B[:, :0], own), ())
    >>> (B1.dense() @ A1.dense()).count_nonzero(dim=0).tolist()
    [2, 0, 0, 0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from loralign.maths.bounds import Place, bounded
from loralign.maths.draws import block_of
from loralign.maths.operators import Dense, Gather, Scatter
from loralign.types import Draw, Facts, FormBase, Live, Operator, Weight


@dataclass(frozen=True)
class StandardBasis(FormBase):
    place: int
    facts: Facts
    """facts.stock: the factor that trains."""

    def constants(self, W: Weight, r: int, draw: Draw) -> Mapping[str, Tensor]:
        size = W.shape[1] if self.facts.stock == "B" else W.shape[0]
        return {"basis": block_of(size, r, self.place, draw("basis"))}

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        basis = own.own["basis"]
        if self.facts.stock == "B":
            return Gather(basis, own.A.shape[1]), Dense(own.B)
        return Dense(own.A), Scatter(basis, own.B.shape[0])


@bounded
def fixed_A(place: Place = 0) -> StandardBasis:
    """SBoRA-FA: B trains, r columns of W move."""
    return StandardBasis(place, Facts(stock="B"))


@bounded
def fixed_B(place: Place = 0) -> StandardBasis:
    """SBoRA-FB: A trains, r rows of W move."""
    return StandardBasis(place, Facts(stock="A"))
