"""One factor is r rows (columns) of the identity and constant, the other one zero and trains.

    fixed A:  A = E_I, B = 0          fixed B:  B = E_Iᵀ, A = 0          (so W_eff = W0)

Shapes:  I (r,), distinct · A (r, d_in) · B (d_out, r)
Source:  Po et al., "SBoRA", arXiv 2407.05413. Official code: cityuhkai/SBoRA, no usable licence: written from its
         figures, in which A of SBoRA-FB starts at zero, too.
Differs: indices keyed by (seed, module): the same draw as the form's, so that the stock tensors hold the one-hot factor
         and any checkpoint is an adapter.
Cost:    none.
Export:  exact.
Args:    place: as the form's.
Unverified: the paper's body.
Example:
    >>> import torch
    >>> from loralign.methods.init.sbora import unit_rows
    >>> from loralign.types import Weight
    >>> W = Weight("w", (2, 4), lambda: torch.zeros(2, 4))
    >>> start = unit_rows()(W, 1, 1.0, None, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> start.A.tolist(), unit_rows(place=4).fits(2, 4, 1)
    ([[1.0, 0.0, 0.0, 0.0]], 'it can start 0 slots at most at place 4')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loralign.maths.bounds import Place, bounded
from loralign.maths.draws import block_of
from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Weight


@dataclass(frozen=True)
class Units:
    train: Literal["A", "B"]
    """The factor that is zero."""
    place: int = 0
    facts: ClassVar[Facts] = Facts()
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        size = d_in if self.train == "B" else d_out
        most = size // (self.place + 1)
        at = f" at place {self.place}" if self.place else ""
        return "" if r <= most else f"it can start {most} slots at most{at}"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        size = d_in if self.train == "B" else d_out
        units = torch.nn.functional.one_hot(block_of(size, r, self.place, draw("basis")), size).float()
        if self.train == "B":
            return Start(units, torch.zeros(d_out, r), train="B")
        return Start(torch.zeros(r, d_in), units.T.contiguous(), train="A")


@bounded
def unit_rows(place: Place = 0) -> Units:
    """SBoRA-FA's start."""
    return Units("B", place)


@bounded
def unit_columns(place: Place = 0) -> Units:
    """SBoRA-FB's start."""
    return Units("A", place)
