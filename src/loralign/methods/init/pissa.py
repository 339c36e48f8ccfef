"""PiSSA: start along the principal singular vectors of the weight.

    W0 ≈ U_r Σ_r V_rᵀ        A0 = (Σ_r/s)^½ V_rᵀ        B0 = U_r (Σ_r/s)^½        W_eff(0) = W0 + s(B0·A0 − B0·A0) = W0

Shapes:  W0 (d_out, d_in) · A0 (r, d_in) · B0 (d_out, r)
Source:  Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
         arXiv 2404.02948, eq. 2–4. Official code: MuLabPKU/PiSSA.
Differs: the residual W0 − s·B0·A0 is not written into the base, a frozen twin stands for it; signs are canonical;
         the SVD is randomised (the code: exact or `niter`).
Cost:    once: one top-r SVD per site. Memory of a rank-r adapter plus r frozen slots.
Export:  exact with rank 2r.
Args:    niter: subspace iterations of the SVD; a pretrained spectrum is flat, so more than the gradient's. 8.
Example:
    >>> from loralign.methods.init.pissa import principal_svd
    >>> principal_svd().niter
    8
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loralign.maths.bounds import Count, bounded
from loralign.maths.linalg import top_svd
from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Weight


@dataclass(frozen=True)
class PrincipalSVD:
    facts: ClassVar[Facts] = Facts()
    niter: int
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        most = min(d_out, d_in)
        return "" if r <= most else f"it can start {most} slots at most"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        U, S, V = top_svd(W.read(), r, niter=self.niter, generator=draw("pissa"))
        root = (S / s).sqrt()
        return Start((V * root).T.contiguous(), U * root, twin=True)


@bounded
def principal_svd(niter: Count = 8) -> PrincipalSVD:
    """PiSSA's start."""
    return PrincipalSVD(niter)
