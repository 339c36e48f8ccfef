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
    >>> from loralign.methods.transform.lora_rite import invariant_adam
    >>> from loralign.types import Pair
    >>> state = invariant_adam().init(Pair("w", torch.ones(2, 5), torch.zeros(7, 2), 1.0, "AB"))
    >>> {key: tuple(value.shape) for key, value in state["B"].items()}
    {'step': (), 'first': (7, 2), 'second': (2, 2), 'spectrum': (2,), 'escaped': (), 'basis': (5, 2)}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, NotNegative, bounded
from loralign.maths.linalg import gram
from loralign.maths.lists import kept, stacked
from loralign.types import Ctx, Grad, Pair, SlotPlan, State

CUT = 1e-6
"""Eigenvalues below this share of the largest are rounding, see `linalg`."""


class Side(NamedTuple):
    """n factors of the same sides. g: (n, m, r), m their long side. X: (n, k, r), the other factors upright.

    of_A, of_B: the pairs they belong to, A's first.
    """

    of_A: list[int]
    of_B: list[int]
    g: Tensor
    X: Tensor

    def states(self, state: Sequence[State]) -> list[dict[str, Tensor]]:
        return [*(state[k]["A"] for k in self.of_A), *(state[k]["B"] for k in self.of_B)]


def _members(grads: Sequence[Grad], pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """(pairs of A, pairs of B) of each shape (m, k)."""
    groups: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    trained = grads[0].A is not None, grads[0].B is not None
    for k, p in enumerate(pairs):
        d_out, d_in = p.B.shape[0], p.A.shape[1]
        if trained[0]:
            groups.setdefault((d_in, d_out), ([], []))[0].append(k)
        if trained[1]:
            groups.setdefault((d_out, d_in), ([], []))[1].append(k)
    return list(groups.values())


def _side(of_A: list[int], of_B: list[int], grads: Sequence[Grad], pairs: Sequence[Pair]) -> Side:
    g, X = [], []
    if of_A:
        g.append(stacked([grads[k].A for k in of_A]).mT)
        X.append(stacked([pairs[k].B for k in of_A]))
    if of_B:
        g.append(stacked([grads[k].B for k in of_B]))
        X.append(stacked([pairs[k].A for k in of_B]).mT)
    return Side(of_A, of_B, *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (g, X)))


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
    """Q of every side, (n, k, r), and R⁻¹ of all, (pairs, r, r): X·R⁻¹ = Q, one correction against rounding.

    T: the `whitening` of all sides.
    """
    sizes = [len(side.g) for side in sides]
    Qs = [side.X @ t for side, t in zip(sides, T.split(sizes), strict=True)]
    mend = 1.5 * torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) - 0.5 * torch.cat([gram(Q) for Q in Qs])
    return [Q @ f for Q, f in zip(Qs, mend.split(sizes), strict=True)], T @ mend


def _key(pairs: Sequence[Pair], what: object) -> str:
    """Of what `measure` hands to `update` of the same pairs."""
    return f"{pairs[0].name} and those with it: {what}"


@dataclass(frozen=True)
class InvariantAdam:
    betas: tuple[float, float]
    eps: float
    clip: float
    escape: float
    accepts: frozenset[str] = frozenset({"one_sided", "shapes"})
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
        """Σ‖ḡ‖² over all pairs; and for `update` the whitening and the stacks, under keys of their own."""
        sides = [_side(*members, grads, pairs) for members in _members(grads, pairs)]
        T = whitening(torch.cat([gram(side.X) for side in sides]))
        found = {_key(pairs, "T"): T}
        for k, side in enumerate(sides):
            found[_key(pairs, (k, "g"))], found[_key(pairs, (k, "X"))] = side.g, side.X
        if self.clip:
            square = T.mT @ torch.cat([gram(side.g) for side in sides]) @ T  # ḡᵀḡ
            found["unmagnified"] = square.diagonal(dim1=-2, dim2=-1).sum()
        return found

    def update(self, grads: Sequence[Grad], state: Sequence[State], pairs: Sequence[Pair], ctx: Ctx) -> Sequence[Grad]:
        sides = [
            Side(*members, ctx.scalars[_key(pairs, (k, "g"))], ctx.scalars[_key(pairs, (k, "X"))])
            for k, members in enumerate(_members(grads, pairs))
        ]
        sizes = [len(side.g) for side in sides]
        own = [side.states(state) for side in sides]
        states = list(chain.from_iterable(own))
        Qs, R_inv = bases(sides, ctx.scalars[_key(pairs, "T")])
        scale = (self.clip / ctx.scalars["unmagnified"].sqrt()).clamp(max=1.0) if self.clip else 1.0
        g_bar = [side.g @ part for side, part in zip(sides, (R_inv * scale).split(sizes), strict=True)]
        t = kept(states, "step").add_(1.0)
        beta1, beta2 = self._decays(t.to(R_inv.dtype))

        first, basis = ([kept(part, key) for part in own] for key in ("first", "basis"))
        P = torch.cat([Q.mT @ then for Q, then in zip(Qs, basis, strict=True)])
        seen = torch.cat([gram(g) / g.shape[-2] for g in g_bar])
        root = self._curvature(P, seen, beta2, *(kept(states, key) for key in ("second", "spectrum", "escaped")))

        alike = ctx.lr_A == ctx.lr_B
        common = -ctx.lr_A if alike else -1.0
        parts = (root * (1 - beta1)[:, None, None], P.mT * beta1[:, None, None], R_inv.mT * common)
        A: list[Tensor | None] = [None] * len(pairs)
        B: list[Tensor | None] = [None] * len(pairs)
        for side, g, Q, M, was, f, carry, back in zip(
            sides, g_bar, Qs, first, basis, *(whole.split(sizes) for whole in parts), strict=True
        ):
            M.copy_(torch.baddbmm(g @ f, M, carry))
            was.copy_(Q)
            a, b = (M @ back).split([len(side.of_A), len(side.of_B)])
            a = a.mT.contiguous()
            if not alike:
                a, b = a * ctx.lr_A, b * ctx.lr_B
            for k, row in zip(side.of_A, a.unbind(), strict=True):
                A[k] = row
            for k, row in zip(side.of_B, b.unbind(), strict=True):
                B[k] = row
        return [Grad(*both) for both in zip(A, B, strict=True)]

    def _decays(self, t: Tensor) -> list[Tensor]:
        """β'; by expm1, since 1 − βᵗ would lose digits in float32."""
        return [b * torch.expm1(math.log(b) * (t - 1)) / torch.expm1(math.log(b) * t) for b in self.betas]

    def _curvature(self, P: Tensor, seen: Tensor, beta2: Tensor, V: Tensor, before: Tensor, rho: Tensor) -> Tensor:
        """(V + ρI)^(−½) of the new V and ρ, ε beside the root, 0 where nothing was ever seen; V, its eigenvalues
        `before` and ρ are changed in place.

        One decomposition for the transported V, whose eigenvalues ρ needs, and the new one; the old one's are kept.
        """
        moved = P @ V @ P.mT
        V.copy_(torch.lerp(seen, moved, beta2[:, None, None]))
        if self.escape:
            (after, lam), (_, E) = torch.linalg.eigh(torch.stack([moved, V]))
            total = before.sum(-1) - moved.diagonal(dim1=-2, dim2=-1).sum(-1)
            lost = torch.minimum((before - after).amax(-1), total).clamp_min(0)
            rho.add_(lost, alpha=self.escape).mul_(beta2)
        else:
            lam, E = torch.linalg.eigh(V)
        size = lam.clamp_min(0) + rho[..., None]
        live = size > CUT * size[..., -1:]
        root = (E / (torch.where(live, size, torch.inf).sqrt() + self.eps)[..., None, :]) @ E.mT
        before.copy_(lam)
        return root

    def on_plan(self, pair: Pair, state: State, plan: SlotPlan) -> None:
        """Nothing: the state lives in the bases of the factors, and P carries it to the new ones."""


@bounded
def invariant_adam(
    betas: Betas = (0.9, 0.999), eps: Epsilon = 1e-6, clip: NotNegative = 1.0, escape: NotNegative = 1.0
) -> InvariantAdam:
    """LoRA-RITE."""
    return InvariantAdam((betas[0], betas[1]), eps, clip, escape)
