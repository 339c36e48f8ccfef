"""LoRA-GA: start along the leading singular vectors of the initial gradient; the first step is full fine-tuning's.

    G = Σ σ_i u_i v_iᵀ        A0 = c·V[:, I_A]ᵀ        B0 = c·U[:, I_B]        W_eff(0) = W0 + s(B0·A0 − B0·A0) = W0
    stable: c = d_out^¼/√γ        gd: c = 1/s        unit: c = 1        weight: c = mean_{i≤r} √(σ_i(W)/s)

Shapes:  G, W (d_out, d_in) · U (d_out, 2r) · V (d_in, 2r) · A0 (r, d_in) · B0 (d_out, r)
Source:  Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, theorems "gradient
         approximation" and "rank stability", algorithm 1. Official code: Outsider565/LoRA-GA, forked peft/tuners/lora.
Differs: from paper and code: W0 is not overwritten, the constant −s·B0·A0 is a frozen twin (so quantised bases,
         `disable_adapter` and reload work). From the paper's body: √γ, as its algorithm and the code have (typo
         confirmed by the author). Signs are canonical (largest entry of every u_i and v_i positive; paper and code
         leave them to the SVD). `norm_clip` of the code multiplies the offset by max|W0|/max|s·B0·A0|, here too. PEFT's
         `init_lora_weights="lora_ga"` is another algorithm: it multiplies B by σ, leaves A at unit norm and so follows
         the scale of the loss.
Cost:    once: the gradient over a few micro-batches and one top-2r SVD per site. Memory of a rank-r adapter plus r
         frozen slots.
Export:  exact with rank 2r.
Args:    gamma: γ, larger = smaller start; paper 16 (T5) and 64 (Llama), code 16.
         direction: which of the 2r vectors go where; ArB2r (A = 1..r, B = r+1..2r, default), A2rBr, ArBr, random.
         scale: stable | gd | unit | weight. norm_clip: False. micro_batches: averaged, 8.
         sketch: how the gradient is sketched; None = exact, which the code has.
Example:
    >>> from loralign.methods.init.lora_ga import gradient_svd
    >>> gradient_svd(gamma=64).needs.per_rank
    2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Positive, bounded
from loralign.maths.linalg import canonical_columns, top_svd
from loralign.methods.init.kaiming import kaiming
from loralign.types import Directions, Draw, Facts, LoralignError, Need, Sketch, Start, TopGradient, Weight

Split = Callable[[int, Draw], tuple[Tensor, Tensor]]
Scale = Callable[[Weight, int, float], float]


def _ArB2r(r: int, draw: Draw) -> tuple[Tensor, Tensor]:
    return torch.arange(r), torch.arange(r, 2 * r)


def _A2rBr(r: int, draw: Draw) -> tuple[Tensor, Tensor]:
    return torch.arange(r, 2 * r), torch.arange(r)


def _ArBr(r: int, draw: Draw) -> tuple[Tensor, Tensor]:
    return torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)


def _random(r: int, draw: Draw) -> tuple[Tensor, Tensor]:
    order = torch.randperm(2 * r, generator=draw("lora-ga direction"))
    return order[:r], order[r:]


DIRECTIONS: dict[str, Split] = {"ArB2r": _ArB2r, "A2rBr": _A2rBr, "ArBr": _ArBr, "random": _random}


def _weight_scale(W: Weight, r: int, s: float) -> float:
    return float((top_svd(W.read(), r)[1] / s).sqrt().mean())


def scales(gamma: float) -> dict[str, Scale]:
    """c of the module docstring, by name."""
    return {
        "stable": lambda W, r, s: W.shape[0] ** 0.25 / gamma**0.5,
        "gd": lambda W, r, s: 1.0 / s,
        "unit": lambda W, r, s: 1.0,
        "weight": _weight_scale,
    }


@dataclass(frozen=True)
class GradientSVD:
    facts: ClassVar[Facts] = Facts()
    split: Split
    scale: Scale
    norm_clip: bool
    needs: Need

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        most = min(d_out, d_in) // 2  # A and B take r singular vectors each, and none twice
        return "" if r <= most else f"it can start {most} slots at most"

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        if evidence is None or evidence.U is None or evidence.V is None:
            raise LoralignError(f"lora-ga has no gradient for {W.name}: give `adapt` some batches")
        if not evidence.S[0] > 0:  # an expert that no token reached: nothing to follow, LoRA's own start
            return kaiming()(W, r, s, None, draw)
        in_A, in_B = self.split(r, draw)
        c = self.scale(W, r, s)
        A = c * canonical_columns(evidence.V)[:, in_A].T.contiguous()
        B = c * canonical_columns(evidence.U)[:, in_B].contiguous()
        if self.norm_clip:
            limit = float(W.read().abs().max() / (s * (B @ A)).abs().max())
            A, B = A * min(1.0, limit) ** 0.5, B * min(1.0, limit) ** 0.5
        return Start(A, B, twin=True)


@bounded
def gradient_svd(
    gamma: Positive = 16.0,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    norm_clip: bool = False,
    micro_batches: Count = 8,
    sketch: Sketch | None = Sketch(),  # noqa: B008 - a frozen value
) -> GradientSVD:
    """LoRA-GA's start."""
    if direction not in DIRECTIONS or scale not in scales(gamma):
        raise LoralignError(f"direction is one of {sorted(DIRECTIONS)}, scale one of {sorted(scales(gamma))}")
    if sketch is not None and (sketch.width < 2 or sketch.passes < 1 or sketch.held_out < 0):
        raise LoralignError(
            "a sketch has width 2 at least (2·r columns are needed), 1 pass and 0 held-out micro-batches"
        )
    needs = TopGradient(per_rank=2, micro_batches=micro_batches, sketch=sketch)
    return GradientSVD(DIRECTIONS[direction], scales(gamma)[scale], norm_clip, needs)
