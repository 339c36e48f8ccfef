"""Both factors small and random; a gate that is zero keeps the product zero.

    A_ij, B_ij ~ N(0, 0.02²)        c = 0, so W_eff = W0

Shapes:  A (r, d_in) · B (d_out, r)
Source:  Zhang et al., "AdaLoRA", arXiv 2303.10512; official code: QingruZhang/AdaLoRA@d10f5eb, loralib/adalora.py.
Differs: drawn from a generator keyed by (seed, module name).
Cost:    none.
Export:  exact.
Args:    none.
Example:
    >>> import torch
    >>> from loralign.methods.init.gaussian import gaussian
    >>> from loralign.types import Weight
    >>> W = Weight("w", (600, 400), lambda: torch.zeros(600, 400))
    >>> f = gaussian()(W, 2, 1.0, None, lambda purpose, step=0: torch.Generator().manual_seed(0))
    >>> round(float(f.B.std()), 2), f.A.shape
    (0.02, torch.Size([2, 400]))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Weight

STD = 0.02


@dataclass(frozen=True)
class Gaussian:
    facts: ClassVar[Facts] = Facts()
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        A = STD * torch.randn(r, d_in, generator=draw("init A"))
        return Start(A, STD * torch.randn(d_out, r, generator=draw("init B")))


def gaussian() -> Gaussian:
    """A and B of standard deviation 0.02."""
    return Gaussian()
