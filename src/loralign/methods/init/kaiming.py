"""LoRA's own start: A uniform, B zero.

    A_ij ~ U(−1/√d_in, 1/√d_in)        B = 0        (so A·Aᵀ ≈ I/3 and W_eff = W0)

Shapes:  A (r, d_in) · B (d_out, r)
Source:  Hu et al., "LoRA", arXiv 2106.09685, §4.1. Official code: microsoft/LoRA loralib/layers.py; PEFT's
         `kaiming_uniform_(A, a=√5)` has this bound.
Differs: from the paper (Gaussian A): uniform, as both codes do. Drawn from a generator keyed by (seed, module name).
Cost:    none.
Export:  exact.
Args:    none.
Example:
    >>> import torch
    >>> from loralign.methods.init.kaiming import kaiming
    >>> from loralign.types import NOTHING, Weight
    >>> W = Weight("w", (6, 4), lambda: torch.zeros(6, 4))
    >>> f = kaiming()(W, 2, 1.0, None, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> bool(f.A.abs().max() <= 0.5), bool((f.B == 0).all())
    (True, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Train, Weight


@dataclass(frozen=True)
class Kaiming:
    facts: ClassVar[Facts] = Facts()
    train: Train = "AB"
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        A = (2 * torch.rand(r, d_in, generator=draw("init A")) - 1) / d_in**0.5
        return Start(A, torch.zeros(d_out, r), train=self.train)


def kaiming() -> Kaiming:
    """A uniform, B zero."""
    return Kaiming()


def kaiming_frozen() -> Kaiming:
    """The same start with A constant: only B trains."""
    return Kaiming(train="B")
