"""OLoRA: start from the leading columns of the weight's QR factorisation.

    W0 = Q·R        B0 = Q[:, :r]        A0 = R[:r]        W_eff(0) = W0 + s(B0·A0 − B0·A0) = W0

Shapes:  W0 (d_out, d_in) · A0 (r, d_in) · B0 (d_out, r), B0ᵀB0 = I
Source:  Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775, algorithm 1.
         Official code: PEFT's `init_lora_weights="olora"`.
Differs: W0 − s·B0·A0 is not written into the base, a frozen twin stands for it. Only the first r columns are
         factorised (Q[:, :r] depends on no others) and R[:r] = Q[:, :r]ᵀ·W0.
Cost:    once: a QR of (d_out, r) and one product per site. Memory of a rank-r adapter plus r frozen slots.
Export:  exact with rank 2r.
Args:    none.
Example:
    >>> from loralign.methods.init.olora import leading_qr
    >>> leading_qr().needs
    Nothing(draws=0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.types import NOTHING, Directions, Draw, Facts, Need, Start, Weight


@dataclass(frozen=True)
class LeadingQR:
    facts: ClassVar[Facts] = Facts()
    needs: Need = NOTHING

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        most = min(d_out, d_in)
        return "" if r <= most else f"it can start {most} slots at most"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        full = W.read()
        Q, _ = torch.linalg.qr(full[:, :r])
        return Start(Q.T @ full, Q, twin=True)


def leading_qr() -> LeadingQR:
    """OLoRA's start."""
    return LeadingQR()
