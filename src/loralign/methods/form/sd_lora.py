"""What a link learnt is kept as a direction of length 1; how far to go along it goes on training.

    W_eff = W0 + Σ_{k<t} α_k·D_k + α_t·D_t        D_k = B_k·A_k / √(‖B_k·A_k‖² + ε²)

Shapes:  A (r, d_in) · B (d_out, r), live · α (tasks,), one for all modules · frozen: D_k as r slots each
Source:  Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", arXiv 2501.13198,
         eq. 3 and algorithm 1. Official code: WuYichen-97/SD-Lora-CL (backbone/lora.py, models/sdlora.py).
Differs: ε makes the start B = 0 a function (the paper divides 0 by 0) and the length of D_t a little less than 1. From
         the code, which divides by ‖B‖·‖A‖ (norm: factors), does not normalise the live term (current: raw), begins at
         α = 0.8 and puts all α back to that at every task: here the function stays the same at a switch. Under `raw` a
         shared α cannot take over norms that differ from module to module, so kept links stay as long as they are.
         The code trains by SGD with momentum whatever its config says; ours by AdamW.
Unverified: the paper's body could not be read: equations from a third party's summary, and the code.
Cost:    r²·(d_in + d_out) FLOPs for the norm, and 2·r·t·(d_in + d_out) per token; one number per task.
Export:  exact, rank r·tasks: α and norms are folded into B.
Args:    tasks: most links that there will be, the length of α. current: the live term has the length α_t (unit) or goes
         as it is (raw). norm: ‖B·A‖ (product) or ‖B‖·‖A‖ (factors). magnitude: α at the start of a task, paper 1.
         epsilon: ε, a Frobenius norm; small ones make the first gradients large.
Example:
    >>> import torch
    >>> from loralign.methods.form.sd_lora import directions
    >>> from loralign.types import Live
    >>> form = directions(tasks=2, epsilon=1e-6)
    >>> live = Live(torch.ones(1, 3), 5 * torch.ones(4, 1), torch.zeros(0, 3), torch.zeros(4, 0), {}, form.shared())
    >>> A, B = form.factors(live, ())
    >>> round(float((B.dense() @ A.dense()).norm()), 4)
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loralign.maths.bounds import Count, Epsilon, Positive, bounded
from loralign.maths.operators import Dense
from loralign.types import Facts, FormBase, Live, LoralignError, Operator

Current = Literal["unit", "raw"]
Norm = Literal["product", "factors"]


@dataclass(frozen=True)
class Directions(FormBase):
    tasks: int
    current: Current
    norm: Norm
    magnitude: float
    epsilon: float

    @property
    def facts(self) -> Facts:
        return Facts(commits=True, link=self.link, weights="alpha")

    def shared(self) -> Mapping[str, Tensor]:
        return {"alpha": torch.full((self.tasks,), self.magnitude)}

    def link(self, own: Live) -> tuple[Tensor, Tensor]:
        """D_t as (A, B)."""
        A, B = own.A, own.B
        if self.current == "raw":
            return A, B
        square = (B.T @ B * (A @ A.T)).sum() if self.norm == "product" else B.square().sum() * A.square().sum()
        return A, B * (square.clamp_min(0.0) + self.epsilon**2).rsqrt()

    def factors(self, own: Live, others: Sequence[Live]) -> tuple[Operator, Operator]:
        alpha, t = own.shared["alpha"], len(own.links)
        if t >= self.tasks:
            raise LoralignError(f"sd-lora has weights for {self.tasks} tasks, and another one begins: raise `tasks`")
        A, B = self.link(own)
        B = B * alpha[t].to(B.dtype)
        if not own.links:
            return Dense(A), Dense(B)
        each = alpha[:t].repeat_interleave(torch.tensor(own.links, device=alpha.device), output_size=own.A0.shape[0])
        kept = own.B0 * each.to(own.B0.dtype)
        return Dense(torch.cat([A, own.A0.to(A.dtype)])), Dense(torch.cat([B, kept.to(B.dtype)], dim=1))


@bounded
def directions(
    tasks: Count = 10,
    current: Current = "unit",
    norm: Norm = "product",
    magnitude: Positive = 1.0,
    epsilon: Epsilon = 0.1,
) -> Directions:
    """SD-LoRA's decoupled directions and magnitudes."""
    return Directions(tasks, current, norm, magnitude, epsilon)
