"""Adam on the product: the same step for every way to write B·A, momentum and curvature carried along.

    Aᵀ = Q·R,  QᵀQ = I           ḡ = gB·R⁻¹ = s·G·Q          P = Q_tᵀ·Q_{t−1}                           (for B; for A
    V ← β2'·P·V·Pᵀ + (1 − β2')·ḡᵀḡ/d_out                                                          transpose and swap)
    ρ ← β2'·(ρ + d),  d = min(max_i[λ_i(V) − λ_i(PVPᵀ)]₊, [tr V − tr PVPᵀ]₊)       the mass that left the subspace
    M ← β1'·M·Pᵀ + (1 − β1')·ḡ·f(V),   f: λ → 1/(√(λ + ρ) + ε)
    B ← B − lr·M·R⁻ᵀ             β' = β(1 − βᵗ⁻¹)/(1 − βᵗ), so no bias is left

Shapes:  A, gA (r, d_in) · B, gB, ḡ, M (d_out, r) · Q (d_in, r) · R, P, V (r, r) · ρ ()
Source:  Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", arXiv
         2410.20625 v2, algorithm 1 (there Z = A·Bᵀ: their A is our B). Official code: gkevinyen5418/LoRA-RITE
         (lora_rite.py).
Differs: Q is an eigenbasis of Aᵀ, neither polar (paper) nor QR (code): every step is equivariant under Q → Q·O, so the
         updates are the same. From the code: the escaped mass ρ is on (there off by default), directions of A or of
         the gradients with less than 1e-6 of the largest eigenvalue do not move (there 1/0 turns the whole update to
         0), gradients are not skipped at an RMS above 1 and updates are not capped, state survives a resume.
         At B = 0 A rests, one step later it moves by O(1)·‖A‖ whatever lr is: the product moves by O(lr).
Cost:    14·r²(d_in + d_out) FLOPs, two batched `eigh` of r by r a step (torch takes them one by one on CUDA above
         r = 32); state 16 B per trained number (M and Q) + r².
Export:  exact.
Args:    betas: (β1, β2). eps: ε, in units of the RMS of ḡ, 1e-6. clip: largest norm of ḡ over all pairs, 1 in the code,
         0 is off. escape: share of d that counts, 1 in the paper, 0 in the code.
         lr: each direction of W moves by s·lr·√d_out. Clipping: this one only, the table sets max_grad_norm to 0 (the
         norm of gA and gB depends on how the product is written).
Example:
    >>> import torch
    >>> from loralign.transform.lora_rite import invariant_adam
    >>> from loralign.types import Pair
    >>> state = invariant_adam().init(Pair("w", torch.ones(2, 5), torch.zeros(7, 2), 1.0, "AB"))
    >>> {key: tuple(value.shape) for key, value in state["B"].items()}
    {'step': (), 'first': (7, 2), 'second': (2, 2), 'spectrum': (2,), 'escaped': (), 'basis': (5, 2)}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loralign.linalg import gram
from loralign.optim_lists import stacked
from loralign.types import Ctx, Grad, LoralignError, Pair, SlotPlan, State

CUT = 1e-6
"""Eigenvalues below this share of the largest are rounding, see `linalg`."""


class Side(NamedTuple):
    """n pairs, one factor. g: (n, m, r), m its long side. X: (n, k, r), the other factor upright. kept: n states."""

    factor: str
    g: Tensor
    X: Tensor
    kept: list[dict[str, Tensor]]

    def stack(self, key: str) -> Tensor:
        return torch.stack([st[key] for st in self.kept])


def _sides(grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair]) -> list[Side]:
    found = []
    for factor, other in (("A", "B"), ("B", "A")):
        if getattr(grads[0], factor) is not None:
            g, X = stacked([getattr(x, factor) for x in grads]), stacked([getattr(p, other) for p in pairs])
            g, X = (g.mT, X) if factor == "A" else (g, X.mT)
            found.append(Side(factor, g, X, [st[factor] for st in state]))
    return found


def whitening(H: Tensor) -> Tensor:
    """T (..., r, r) with X·T orthonormal, from H = XᵀX; zero columns where X has no such direction. So H⁺ = T·Tᵀ.

    H = D·Ĥ·D with unit diagonal, Ĥ = E·Λ·Eᵀ, T = D⁻¹·E·Λ^(−½); a slot is not dead for being small.
    """
    size = H.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(size > 0, 1 / size, 0.0)
    lam, E = torch.linalg.eigh(H * unit[..., :, None] * unit[..., None, :])
    live = lam > CUT * lam[..., -1:].clamp_min(CUT)
    return unit[..., :, None] * E * torch.where(live, lam, torch.inf).rsqrt()[..., None, :]


def bases(sides: Sequence[Side], T: Tensor) -> tuple[list[Tensor], Tensor]:
    """Q of every side, (n, k, r), and R⁻¹ of all, (sides·n, r, r): X·R⁻¹ = Q, one correction against rounding.

    T: the `whitening` of all sides.
    """
    Qs = [side.X @ t for side, t in zip(sides, T.chunk(len(sides)), strict=True)]
    mend = 1.5 * torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) - 0.5 * torch.cat([gram(Q) for Q in Qs])
    return [Q @ f for Q, f in zip(Qs, mend.chunk(len(sides)), strict=True)], T @ mend


def _group_key(pairs: Sequence[Pair]) -> str:
    return f"whitening of {pairs[0].name} and those with it"


@dataclass(frozen=True)
class InvariantAdam:
    betas: tuple[float, float]
    eps: float
    clip: float
    escape: float
    accepts: frozenset[str] = frozenset({"one_sided"})
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        r, d_in, d_out = pair.A.shape[0], pair.A.shape[1], pair.B.shape[0]
        like = torch.zeros((), dtype=torch.promote_types(pair.A.dtype, torch.float32), device=pair.A.device)
        state: State = {}
        for factor, m, k in (("A", d_in, d_out), ("B", d_out, d_in)):
            if factor in pair.train:
                state[factor] = {
                    "step": like.to(torch.float32, copy=True),
                    "first": like.new_zeros(m, r),
                    "second": like.new_zeros(r, r),
                    "spectrum": like.new_zeros(r),
                    "escaped": like.new_zeros(()),
                    "basis": like.new_zeros(k, r),
                }
        return state

    def measure(
        self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx
    ) -> Mapping[str, Tensor]:
        """Σ‖ḡ‖² over all pairs, and for `update` the whitening of this group, under its own key."""
        sides = _sides(grads, state, pairs)
        T = whitening(torch.cat([gram(side.X) for side in sides]))
        if not self.clip:
            return {_group_key(pairs): T}
        square = T.mT @ torch.cat([gram(side.g) for side in sides]) @ T  # ḡᵀḡ
        return {"unmagnified": square.diagonal(dim1=-2, dim2=-1).sum(), _group_key(pairs): T}

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        sides = _sides(grads, state, pairs)
        Qs, R_inv = bases(sides, ctx.scalars[_group_key(pairs)])
        parts = R_inv.chunk(len(sides))
        g_bar = [side.g @ part for side, part in zip(sides, parts, strict=True)]
        if self.clip:
            scale = (self.clip / ctx.scalars["unmagnified"].sqrt()).clamp(max=1.0)
            g_bar = [g * scale for g in g_bar]
        torch._foreach_add_([st["step"] for side in sides for st in side.kept], 1.0)
        beta1, beta2 = self._decays(torch.cat([side.stack("step") for side in sides]).to(R_inv.dtype))

        P = torch.cat([Q.mT @ side.stack("basis") for side, Q in zip(sides, Qs, strict=True)])
        seen = torch.cat([gram(g) / g.shape[-2] for g in g_bar])
        before = [torch.cat([side.stack(key) for side in sides]) for key in ("second", "spectrum", "escaped")]
        fresh, root = self._curvature(P, seen, beta2, *before)
        shape = root * (1 - beta1)[:, None, None]
        carry = P.mT * beta1[:, None, None]

        updates: dict[str, Sequence[Tensor | None]] = {"A": [None] * len(pairs), "B": [None] * len(pairs)}
        made = zip(sides, g_bar, Qs, parts, shape.chunk(len(sides)), carry.chunk(len(sides)), strict=True)
        for k, (side, g, Q, part, f, c) in enumerate(made):
            M = torch.baddbmm(g @ f, side.stack("first"), c)
            keep = {"first": M, "basis": Q, **{key: value.chunk(len(sides))[k] for key, value in fresh.items()}}
            for key, value in keep.items():
                torch._foreach_copy_([st[key] for st in side.kept], list(value.unbind()))
            lr = ctx.lr_A if side.factor == "A" else ctx.lr_B
            step = M @ (part.mT * -lr)
            updates[side.factor] = (step.mT.contiguous() if side.factor == "A" else step).unbind()
        return [Grad(a, b) for a, b in zip(updates["A"], updates["B"], strict=True)]

    def _decays(self, t: Tensor) -> list[Tensor]:
        """β'; by expm1, since 1 − βᵗ would lose digits in float32."""
        return [b * torch.expm1(math.log(b) * (t - 1)) / torch.expm1(math.log(b) * t) for b in self.betas]

    def _curvature(
        self, P: Tensor, seen: Tensor, beta2: Tensor, V: Tensor, before: Tensor, rho: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """New V, its eigenvalues and ρ, and (V + ρI)^(−½), ε beside the root, 0 where nothing was ever seen.

        One decomposition for the transported V, whose eigenvalues ρ needs, and the new one; the old one's are kept.
        """
        moved = P @ V @ P.mT
        V = torch.lerp(seen, moved, beta2[:, None, None])
        if self.escape:
            (after, lam), (_, E) = torch.linalg.eigh(torch.stack([moved, V]))
            total = before.sum(-1) - moved.diagonal(dim1=-2, dim2=-1).sum(-1)
            lost = torch.minimum((before - after).amax(-1), total).clamp_min(0)
            rho = beta2 * (rho + self.escape * lost)
        else:
            lam, E = torch.linalg.eigh(V)
        size = lam.clamp_min(0) + rho[..., None]
        live = size > CUT * size[..., -1:]
        root = (E / (torch.where(live, size, torch.inf).sqrt() + self.eps)[..., None, :]) @ E.mT
        return {"second": V, "spectrum": lam, "escaped": rho}, root

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        """Nothing: the state lives in the bases of the factors, and P carries it to the new ones."""


def invariant_adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, clip: float = 1.0, escape: float = 1.0
) -> InvariantAdam:
    """LoRA-RITE."""
    if clip < 0 or escape < 0:
        raise LoralignError(f"lora-rite: clip and escape must be 0 (off) or positive, not {clip} and {escape}")
    return InvariantAdam((betas[0], betas[1]), eps, clip, escape)
