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
Cost:    14·r²(d_in + d_out) FLOPs, two batched `eigh` of r by r a step (`maths.jacobi`); state 8 B per trained number
         (M and Q), 6 with M in bfloat16, + r².
Export:  exact.
Args:    betas: (β1, β2). eps: ε, in units of the RMS of ḡ, 1e-6. clip: largest norm of ḡ over all pairs, 1 in the code,
         0 is off. escape: share of d that counts, 1 in the paper, 0 in the code. momentum_dtype: what M is kept in.
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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, MomentumDtype, NotNegative, bounded
from loralign.maths.jacobi import eigh
from loralign.maths.linalg import gram
from loralign.maths.lists import kept, momentum_like, stacked
from loralign.types import Ctx, Facts, Grad, Group, Pair, Prepared, SlotChange, State

CUT = 1e-6
"""Eigenvalues below this share of the largest are rounding, see `linalg`."""


class Side(NamedTuple):
    """n factors of the same sides: (m, r), m their long side, beside factors of (k, r).

    of_A, of_B: the pairs they belong to, A's first.
    """

    of_A: list[int]
    of_B: list[int]

    @property
    def size(self) -> int:
        return len(self.of_A) + len(self.of_B)

    def gradients(self, grads: Sequence[Grad]) -> Tensor:
        """(n, m, r), a copy."""
        parts = [stacked([grads[k].A for k in self.of_A]).mT] if self.of_A else []
        parts += [stacked([grads[k].B for k in self.of_B])] if self.of_B else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def others(self, pairs: Sequence[Pair]) -> Tensor:
        """(n, k, r), the other factors upright, a copy."""
        parts = [stacked([pairs[k].B for k in self.of_A])] if self.of_A else []
        parts += [stacked([pairs[k].A for k in self.of_B]).mT] if self.of_B else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def states(self, state: Sequence[State]) -> list[dict[str, Tensor]]:
        return [*(state[k]["A"] for k in self.of_A), *(state[k]["B"] for k in self.of_B)]


def _sides(grads: Sequence[Grad], pairs: Sequence[Pair]) -> list[Side]:
    """The factors of each shape (m, k)."""
    found: dict[tuple[int, int], Side] = {}
    trained = grads[0].A is not None, grads[0].B is not None
    for k, p in enumerate(pairs):
        d_out, d_in = p.B.shape[0], p.A.shape[1]
        if trained[0]:
            found.setdefault((d_in, d_out), Side([], [])).of_A.append(k)
        if trained[1]:
            found.setdefault((d_out, d_in), Side([], [])).of_B.append(k)
    return list(found.values())


def _long(sides: Sequence[Side], pairs: Sequence[Pair]) -> list[int]:
    """m of every side."""
    return [pairs[s.of_A[0]].A.shape[1] if s.of_A else pairs[s.of_B[0]].B.shape[0] for s in sides]


def whitening(H: Tensor) -> Tensor:
    """T (..., r, r) with X·T orthonormal, from H = XᵀX; zero columns where X has no such direction. So H⁺ = T·Tᵀ.

    H = D·Ĥ·D with unit diagonal, Ĥ = E·Λ·Eᵀ, T = D⁻¹·E·Λ^(−½); a slot is not dead for being small.
    """
    size = H.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(size > 0, 1 / size, 0.0)
    lam, E = eigh(H * unit[..., :, None] * unit[..., None, :])
    live = lam > CUT * lam[..., -1:].clamp_min(CUT)
    return unit[..., :, None] * E * torch.where(live, lam, torch.inf).rsqrt()[..., None, :]


class Carry(NamedTuple):
    """What `update` needs of `prepare`, small tensors of all sides, (n, r, r). T: whitening. seen: gᵀg."""

    T: Tensor
    seen: Tensor


@dataclass(frozen=True)
class InvariantAdam:
    betas: tuple[float, float]
    eps: float
    clip: float
    escape: float
    momentum_dtype: MomentumDtype = "float32"
    facts: ClassVar[Facts] = Facts(
        accepts=frozenset({"one_sided", "shapes", "slots"}), global_scalars=True, transient=2.0
    )
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        r, d_in, d_out = pair.A.shape[0], pair.A.shape[1], pair.B.shape[0]
        like = torch.zeros((), dtype=torch.promote_types(pair.A.dtype, torch.float32), device=pair.A.device)
        state: State = {}
        for factor, m, k in (("A", d_in, d_out), ("B", d_out, d_in)):
            if factor in pair.train:
                state[factor] = {
                    "step": like.to(torch.float32, copy=True),
                    "first": momentum_like(like.expand(m, r), self.momentum_dtype),
                    "second": like.new_zeros(r, r),
                    "spectrum": like.new_zeros(r),
                    "escaped": like.new_zeros(()),
                    "basis": like.new_zeros(k, r),
                }
        return state

    def prepare(self, group: Group) -> Prepared:
        """Σ‖ḡ‖² over all pairs. One side's stacks are held at a time, here and in `update`."""
        sides = _sides(group.grads, group.pairs)
        T = whitening(torch.cat([gram(side.others(group.pairs)) for side in sides]))
        seen = torch.cat([gram(side.gradients(group.grads)) for side in sides])
        square = (T.mT @ seen @ T).diagonal(dim1=-2, dim2=-1).sum()  # ḡᵀḡ
        return Prepared({"unmagnified": square} if self.clip else {}, Carry(T, seen))

    def update(self, group: Group, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads, state, ctx = group
        sides = _sides(grads, pairs)
        sizes = [side.size for side in sides]
        own = [side.states(state) for side in sides]
        states = list(chain.from_iterable(own))
        basis = [kept(part, "basis") for part in own]
        R_inv, P = self._bases(sides, pairs, carry.T, basis)
        scale = (self.clip / scalars["unmagnified"].sqrt()).clamp(max=1.0) if self.clip else 1.0
        back = R_inv.mT
        R_inv = R_inv * scale
        t = kept(states, "step").add_(1.0)
        beta1, beta2 = self._decays(t.to(R_inv.dtype))
        long = torch.cat([R_inv.new_full((n, 1, 1), m) for n, m in zip(sizes, _long(sides, pairs), strict=True)])
        seen = R_inv.mT @ carry.seen @ R_inv / long
        root = self._curvature(P, seen, beta2, *(kept(states, key) for key in ("second", "spectrum", "escaped")))
        parts = (R_inv @ root * (1 - beta1)[:, None, None], P.mT * beta1[:, None, None], back)
        A: list[Tensor | None] = [None] * len(pairs)
        B: list[Tensor | None] = [None] * len(pairs)
        for side, states_here, *maps in zip(sides, own, *(whole.split(sizes) for whole in parts), strict=True):
            a, b = self._moved(side, kept(states_here, "first"), grads, maps, ctx)
            for k, row in zip(side.of_A, a.unbind(), strict=True):
                A[k] = row
            for k, row in zip(side.of_B, b.unbind(), strict=True):
                B[k] = row
        return [Grad(*both) for both in zip(A, B, strict=True)]

    @staticmethod
    def _bases(
        sides: Sequence[Side], pairs: Sequence[Pair], T: Tensor, basis: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """R⁻¹ and P = Q_tᵀ·Q_{t−1} of all sides, (n, r, r); Q = X·R⁻¹, one correction against rounding, replaces
        the old basis in place."""
        R_inv, P = [], []
        for side, t, then in zip(sides, T.split([side.size for side in sides]), basis, strict=True):
            Q = side.others(pairs) @ t
            mend = 1.5 * torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) - 0.5 * gram(Q)
            Q = Q @ mend
            R_inv.append(t @ mend)
            P.append(Q.mT @ then)
            then.copy_(Q)
        return torch.cat(R_inv), torch.cat(P)

    @staticmethod
    def _moved(side: Side, M: Tensor, grads: Sequence[Grad], maps: Sequence[Tensor], ctx: Ctx) -> tuple[Tensor, Tensor]:
        """(n, r, m) and (n, m, r): the updates of one side's A and B; M, its first moment, is changed in place."""
        f, carry, back = maps
        g = side.gradients(grads)  # here: a caller that torch.compile watches keeps what it passed on
        now = (g @ f).baddbmm_(M.to(g.dtype), carry)
        M.copy_(now)
        del g
        a, b = (now @ back).split([len(side.of_A), len(side.of_B)])
        return a.mT.mul(-ctx.lr_A).contiguous(), b.mul(-ctx.lr_B)

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
            (after, lam), (_, E) = eigh(torch.stack([moved, V]))
            total = before.sum(-1) - moved.diagonal(dim1=-2, dim2=-1).sum(-1)
            lost = torch.minimum((before - after).amax(-1), total).clamp_min(0)
            rho.add_(lost, alpha=self.escape).mul_(beta2)
        else:
            lam, E = eigh(V)
        size = lam.clamp_min(0) + rho[..., None]
        live = size > CUT * size[..., -1:]
        root = (E / (torch.where(live, size, torch.inf).sqrt() + self.eps)[..., None, :]) @ E.mT
        before.copy_(lam)
        return root

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing: the state lives in the bases of the factors, and P carries it to the new ones."""


@bounded
def invariant_adam(
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-6,
    clip: NotNegative = 1.0,
    escape: NotNegative = 1.0,
    momentum_dtype: MomentumDtype = "float32",
) -> InvariantAdam:
    """LoRA-RITE."""
    return InvariantAdam((betas[0], betas[1]), eps, clip, escape, momentum_dtype)
