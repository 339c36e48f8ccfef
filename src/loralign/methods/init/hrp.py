"""HRP: start along the main directions of a short high-rank run, A = κ·V_rᵀ and B = 0 (or the other side).

    preheat at rank R > r:  W0 + s·B_h·A_h,  T steps;   B_h·A_h = U·S·Vᵀ
    A0 = κ·V_rᵀ,  B0 = 0        or        A0 = 0,  B0 = κ·U_r        so W_eff(0) = W0, on quantised bases too

Shapes:  W (d_out, d_in) · A_h (R, d_in) · B_h (d_out, R) · V_r (d_in, r) · U_r (d_out, r)
Source:  Chen et al., "HRP: High-Rank Preheating for Superior LoRA Initialization", arXiv 2502.07739, abstracts of v1
         and v3. No official code was found.
Unverified: the paper's body could not be read; a reconstruction from its abstracts. R, T, which factor the preheat
         trains, its optimizer and κ are not confirmed.
Differs: κ = √⅓ by default (the paper: presumably 1): rows as long as LoRA's own start, so LoRA's learning rate keeps
         its meaning. `hrp_sketch` takes no optimizer step: it accumulates the gradient of the moving factor, which
         gives LoRA-GA's right directions; Adam's normalised steps lead elsewhere: the two are different starts.
Cost:    once: T steps of LoRA at rank R (`hrp`), or K forward and backward passes (`hrp_sketch`), on training data:
         they count as training. Nothing per step.
Export:  exact.
Args:    rank: R; None = max(8r, 64) for `hrp`, max(4r, 32) for `hrp_sketch`; paper 128–256 (unverified).
         steps: T, 100 (paper ~100, unverified). train: factors that the preheat trains, "AB", "A" or "B"; "AB", sketch
         "A" (a frozen random A would confine V to its rows). accumulate: micro-batches per step, 1. micro_batches: of
         the sketch, 32, half of them per pass. lr: peak rate of the preheat's AdamW (10 % warm-up, clip 1); None =
         LoRA's prior. side: "A" or "B", the factor that holds the directions. kappa: κ, length of its rows or columns.
Example:
    >>> from loralign.methods.init.hrp import high_rank_preheat, high_rank_sketch
    >>> high_rank_preheat().needs.rank(16), high_rank_sketch().needs.steps
    (128, 0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralign.maths.bounds import Count, Positive, bounded
from loralign.methods.init.kaiming import kaiming
from loralign.types import Directions, Draw, Facts, LoralignError, Need, Preheated, Start, Train, Weight

LORA_ROWS = 3**-0.5
"""Length of a row of LoRA's own A: A·Aᵀ ≈ I/3."""


@dataclass(frozen=True)
class HighRank:
    facts: ClassVar[Facts] = Facts()
    side: Train
    kappa: float
    needs: Need

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        most = min(d_out, d_in)
        return "" if r <= most else f"it can start {most} slots at most"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        d_out, d_in = W.shape
        basis = None if evidence is None else evidence.V if self.side == "A" else evidence.U
        if evidence is None or basis is None:
            raise LoralignError(f"hrp has not been preheated at {W.name}: give `adapt` some batches")
        if not evidence.S[0] > 0:  # an expert that no token reached: nothing to follow, LoRA's own start
            return kaiming()(W, r, s, None, draw)
        directions = self.kappa * basis[:, :r]
        if self.side == "A":
            return Start(directions.T.contiguous(), torch.zeros(d_out, r))
        return Start(torch.zeros(r, d_in), directions.contiguous())


def _check(side: str, train: str, kappa: float) -> None:
    if side not in ("A", "B") or train not in ("AB", "A", "B") or not kappa > 0:
        raise LoralignError('side is "A" or "B", train is "AB", "A" or "B", kappa is positive')


@bounded
def high_rank_preheat(
    rank: Count | None = None,
    *,
    steps: Count = 100,
    train: str = "AB",
    accumulate: Count = 1,
    lr: Positive | None = None,
    side: str = "A",
    kappa: Positive = LORA_ROWS,
) -> HighRank:
    """HRP's start after T optimizer steps."""
    _check(side, train, kappa)
    R = (lambda r: rank) if rank else (lambda r: max(8 * r, 64))
    needs = Preheated(R, steps, train, micro_batches=steps * accumulate, accumulate=accumulate, lr=lr)  # type: ignore[arg-type]
    return HighRank(side, kappa, needs)  # type: ignore[arg-type]


@bounded
def high_rank_sketch(
    rank: Count | None = None,
    *,
    micro_batches: Count = 32,
    train: str = "A",
    side: str = "A",
    kappa: Positive = LORA_ROWS,
) -> HighRank:
    """HRP's start from accumulated gradients, without an optimizer step."""
    _check(side, train, kappa)
    if train == "AB":
        raise LoralignError('hrp-sketch accumulates one side first: train is "A" or "B"')
    R = (lambda r: rank) if rank else (lambda r: max(4 * r, 32))
    return HighRank(side, kappa, Preheated(R, 0, train, micro_batches=micro_batches))  # type: ignore[arg-type]
