"""Move the factors so that the product follows the full gradient as closely as rank r allows.

    a = (1/s²)(BᵀB)⁻¹·gA + X·A        b = (1/s²)(I − P_B)·gB·(AAᵀ)⁻¹ − B·X        for any X (r, r)
    s(B·a + b·A) = P_B·G + G·P_A − P_B·G·P_A,  the point of that set which is closest to G
    (BᵀB)·X + X·(AAᵀ) = −(1/s²)(BᵀB)⁻¹·gA·Aᵀ                 the X with the least ‖a − gA‖² + ‖b − gB‖²
    one side frozen:   a = (1/s²)(BᵀB)⁻¹·gA  (product: P_B·G)   or   b = (1/s²)·gB·(AAᵀ)⁻¹  (product: G·P_A)
    moments="factor":  Adam on a and b
    moments="full":    m, v of g̃ = s(B·a + b·A) like W;  u = m̂/(√v̂ + ε);  gA = s·Bᵀ·u, gB = s·u·Aᵀ through (5), (7)
    moments="none":    A ← A − lr·a,  B ← B − lr·b

Shapes:  A, gA, a (r, d_in) · B, gB, b (d_out, r) · X (r, r) · G, u, m, v (d_out, d_in), G is never needed
Source:  Wang, Liang, He, Wang & Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242 v3,
         eq. 5–7. Official code: mrflogs/LoRA-Pro (vendored DeepSpeed stage_1_and_2.py, lorapro_full_adjustment).
Differs: from the code: s is the pair's (there 2), m̂ and v̂ count steps from 1 (there from 2), the clip acts on the
         gradients (there on the finished update), frozen W does not decay, X by two symmetric eigendecompositions
         (there complex ones), (BᵀB)⁻¹ is damped relative to its size too and cut where float32 knows nothing. Default
         is "factor", the authors' older release; their newer one and the paper's algorithm is "full".
Cost:    10·r²(d_in + d_out) FLOPs and one batched `eigh` of r by r matrices a step (`maths.jacobi`);
         "full": two. State: factor 8 B per trained number, full 8 B per number of W (52 GB for a 7B model), none 0.
Export:  exact.
Args:    moments: where Adam's averages live. x: "sylvester" (7), "zero" or "symmetric" (½·C·(AAᵀ)⁻¹, C the right side
         of (7)); the step of the product is the same. damping: δ of (BᵀB + δI)⁻¹ in units of its mean eigenvalue,
         1e-6 (paper: none). floor: smallest δ, in units of B², 1e-8 as in the code. From B = 0 the first a are as
         large as 1/δ, and Adam's memory of them holds A still for long in "factor" (records/2026-11-26-h100-study, 300
         steps, mean of two seeds: 3.007; with betas (0.9, 0.95) 2.920; "full" 2.861; LoRA 2.92). betas, eps: Adam's.
         momentum_dtype: what Adam's m is kept in, bfloat16: 2 B less of state per number.
         The rate of "full" is full fine-tuning's, s cancels. Clipping: the usual global norm of 1.
Example:
    >>> import torch
    >>> from loralign.methods.transform.lora_pro import closest
    >>> A, B, G = torch.tensor([[[1., 0.]]]), torch.tensor([[[1.], [0.]]]), torch.tensor([[[1., 2.], [3., 4.]]])
    >>> a, b = closest(A, B, B.mT @ G, G @ A.mT, torch.ones(1, 1, 1), damping=0.0, floor=0.0)
    >>> (B @ a + b @ A).tolist()
    [[[1.0, 2.0], [3.0, 0.0]]]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from loralign.maths.bounds import Betas, Epsilon, MomentumDtype, NotNegative, bounded
from loralign.maths.jacobi import eigh
from loralign.maths.linalg import gram, sylvester_spectral
from loralign.maths.lists import by_shape, momentum_like, scales, stacked
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import chain, descend
from loralign.types import Facts, Grad, LoralignError, Pair, Prepared, SlotChange, State, Transform
from loralign.types import Group as Pairs

CUT = 1e-6
"""Eigenvalues below this share of the largest are rounding, see `linalg`."""


class Spectrum(NamedTuple):
    """H = E·diag(λ)·Eᵀ of a Gram matrix: lam (..., r) ascending, E (..., r, r), δ (...) of the damping."""

    lam: Tensor
    E: Tensor
    delta: Tensor

    def at(self, k: int) -> Spectrum:
        return Spectrum(self.lam[k], self.E[k], self.delta[k])

    def inverse(self) -> Tensor:
        """(H + δI)⁻¹, 0 in the directions that the working precision does not know, so 0 where H = 0 and δ = 0."""
        lam = self.lam + self.delta[..., None]
        live = lam > CUT * lam[..., -1:].clamp_min(0)
        return self.E / torch.where(live, lam, torch.inf)[..., None, :] @ self.E.mT


Choice = Callable[[Spectrum, Spectrum, Tensor], Tensor]
"""(of BᵀB, of AAᵀ, C) -> X, where (BᵀB)·X + X·(AAᵀ) = C is (7)."""


def sylvester(HB: Spectrum, HA: Spectrum, C: Tensor) -> Tensor:
    return sylvester_spectral(HB.lam, HB.E, HA.lam, HA.E, C, rel=CUT)


def symmetric(HB: Spectrum, HA: Spectrum, C: Tensor) -> Tensor:
    return C @ HA.inverse() / 2


def zero(HB: Spectrum, HA: Spectrum, C: Tensor) -> Tensor:
    return torch.zeros_like(C)


def spectra(H: Tensor, damping: float, floor: float) -> Spectrum:
    """δ = damping·tr H/r + floor; H (..., r, r)."""
    lam, E = eigh(H)
    return Spectrum(lam, E, damping * H.diagonal(dim1=-2, dim2=-1).mean(-1) + floor)


class Group(NamedTuple):
    """n pairs of one shape: A, gA (n, r, d_in), B, gB (n, d_out, r), s or (n, 1, 1) of them; None for a frozen side."""

    A: Tensor
    B: Tensor
    gA: Tensor | None
    gB: Tensor | None
    s: Tensor | float


def adjusted(
    groups: Sequence[Group], choose: Choice, *, damping: float, floor: float
) -> list[tuple[Tensor | None, Tensor | None]]:
    """(a, b) of each group, None where frozen; what is r by r is done once for all of them."""
    sizes = [len(g.A) for g in groups]
    s2 = _squares(groups)
    if groups[0].gA is None or groups[0].gB is None:
        one = torch.cat([gram(g.B) if g.gB is None else gram(g.A.mT) for g in groups])
        inverse = (spectra(one, damping, floor).inverse() / s2).split(sizes)
        return [
            (None if g.gA is None else h @ g.gA, None if g.gB is None else g.gB @ h)
            for g, h in zip(groups, inverse, strict=True)
        ]
    HB, HA = (torch.cat([gram(x) for x in xs]) for xs in ([g.B for g in groups], [g.A.mT for g in groups]))
    both = spectra(torch.stack([HB, HA]), damping, floor)
    iB, iA = both.inverse()
    iB = iB / s2
    right = torch.cat([g.gA @ g.A.mT for g in groups])  # type: ignore[operator]
    left = torch.cat([g.B.mT @ g.gB for g in groups])  # type: ignore[operator]
    X = choose(both.at(0), both.at(1), -iB @ right).expand_as(right)  # eq. 7
    made: list[tuple[Tensor | None, Tensor | None]] = []
    parts = (whole.split(sizes) for whole in (X, iB, iA / s2, iB @ left @ iA + X))
    for g, x, h, k, y in zip(groups, *parts, strict=True):
        a = torch.baddbmm(x @ g.A, h, g.gA)  # eq. 5
        made.append((a, torch.baddbmm(g.gB @ k, g.B, y, alpha=-1)))
    return made


def _squares(groups: Sequence[Group]) -> Tensor | float:
    """s² of all pairs, one number where they agree."""
    found = {g.s for g in groups if not isinstance(g.s, Tensor)}
    if len(found) == 1 and not any(isinstance(g.s, Tensor) for g in groups):
        return float(found.pop() ** 2)
    return torch.cat([g.s if isinstance(g.s, Tensor) else g.A.new_full((len(g.A), 1, 1), g.s) for g in groups]) ** 2


def closest(
    A: Tensor,
    B: Tensor,
    gA: Tensor | None,
    gB: Tensor | None,
    s: Tensor | float,
    choose: Choice = sylvester,
    *,
    damping: float,
    floor: float,
) -> tuple[Tensor | None, Tensor | None]:
    """`adjusted` of one group."""
    return adjusted([Group(A, B, gA, gB, s)], choose, damping=damping, floor=floor)[0]


@dataclass(frozen=True)
class Adjusted:
    """Gradients to (a, b); keeps nothing."""

    choose: Choice
    damping: float
    floor: float
    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "shapes", "slots"}), transient=3.0)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        return {factor: {} for factor in pair.train}

    def prepare(self, group: Pairs) -> Prepared:
        return Prepared()

    def update(self, group: Pairs, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads = group.pairs, group.grads
        places = by_shape(pairs)
        groups = [_group([grads[k] for k in at], [pairs[k] for k in at]) for at in places]
        out: list[Grad] = [Grad(None, None)] * len(pairs)
        for at, made in zip(places, adjusted(groups, self.choose, damping=self.damping, floor=self.floor), strict=True):
            for k, g in zip(at, _split(*made, len(at)), strict=True):
                out[k] = g
        return out

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class FullMoments:
    """Adam on the equivalent full gradient: m (d_out, d_in) is kept with the first trained factor, v with the last."""

    choose: Choice
    damping: float
    floor: float
    betas: tuple[float, float]
    eps: float
    momentum_dtype: MomentumDtype = "float32"
    facts: ClassVar[Facts] = Facts(accepts=frozenset({"one_sided", "slots"}), transient=4.5)
    lr_ratio: float = 1.0

    def init(self, pair: Pair) -> State:
        like = pair.A.new_empty((), dtype=pair.A.dtype).expand(pair.B.shape[0], pair.A.shape[1])
        state: State = {factor: {} for factor in pair.train}
        state[pair.train[0]]["step"] = torch.zeros((), dtype=torch.float32, device=pair.A.device)
        state[pair.train[0]]["exp_avg"] = momentum_like(like, self.momentum_dtype)
        state[pair.train[-1]]["exp_avg_sq"] = momentum_like(like)
        return state

    def prepare(self, group: Pairs) -> Prepared:
        return Prepared()

    def update(self, group: Pairs, scalars: Mapping[str, Tensor], carry: Any) -> Sequence[Grad]:
        pairs, grads, state, ctx = group
        A, B, gA, gB, s = _group(grads, pairs)
        a, b = closest(A, B, gA, gB, s, zero, damping=self.damping, floor=self.floor)
        gA, gB = (None if g is None else torch.empty_like(g) for g in (gA, gB))
        for k, pair in enumerate(pairs):  # one full-size matrix at a time
            moments = {**state[k][pair.train[0]], **state[k][pair.train[-1]]}
            u = self._adam(pair.s * _product(A[k], B[k], a, b, k), moments)
            if gA is not None:
                gA[k] = pair.s * (B[k].mT @ u)
            if gB is not None:
                gB[k] = pair.s * (u @ A[k].mT)
        a, b = closest(A, B, gA, gB, s, self.choose, damping=self.damping, floor=self.floor)
        return _split(None if a is None else -ctx.lr_A * a, None if b is None else -ctx.lr_B * b, len(pairs))

    def _adam(self, g: Tensor, st: dict[str, Tensor]) -> Tensor:
        (beta1, beta2), m, v, t = self.betas, st["exp_avg"], st["exp_avg_sq"], st["step"].add_(1)
        now = torch.lerp(m.to(g.dtype), g, 1 - beta1)
        m.copy_(now)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2 ** t.double())).sqrt_().add_(self.eps)
        return (now / (1 - beta1 ** t.double())).div_(root)

    def on_slots(self, pair: Pair, state: State, change: SlotChange) -> None:
        """The moments belong to W, not to slots."""


def _group(grads: Sequence[Grad], pairs: Sequence[Pair]) -> Group:
    A, B = stacked([p.A for p in pairs]), stacked([p.B for p in pairs])
    gA, gB = (stacked(g) if g[0] is not None else None for g in zip(*grads, strict=True))
    return Group(A, B, gA, gB, scales(pairs, A))


def _product(A: Tensor, B: Tensor, a: Tensor | None, b: Tensor | None, k: int) -> Tensor:
    """B·a + b·A of pair k."""
    if a is None or b is None:
        return B @ a[k] if a is not None else b[k] @ A  # type: ignore[index]
    return torch.addmm(B @ a[k], b[k], A)


def _split(a: Tensor | None, b: Tensor | None, n: int) -> list[Grad]:
    sides = ([None] * n if side is None else side.unbind() for side in (a, b))
    return [Grad(*pair) for pair in zip(*sides, strict=True)]


@bounded
def equivalent_gradient(
    moments: Literal["factor", "full", "none"] = "factor",
    x: Literal["sylvester", "zero", "symmetric"] = "sylvester",
    damping: NotNegative = 1e-6,
    floor: NotNegative = 1e-8,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    momentum_dtype: MomentumDtype = "float32",
) -> Transform:
    """LoRA-Pro, with Adam's moments on the adjusted factors, on the full gradient, or without moments."""
    if moments == "none" and momentum_dtype != "float32":
        raise LoralignError("lora-pro with moments: none keeps no momentum: leave momentum_dtype out")
    choose = {"sylvester": sylvester, "symmetric": symmetric, "zero": zero}[x]
    adjusted = Adjusted(choose, damping, floor)
    forms: Mapping[str, Callable[[], Transform]] = {
        "factor": lambda: chain(adjusted, adamw(betas, eps, momentum_dtype)),
        "full": lambda: FullMoments(choose, damping, floor, (betas[0], betas[1]), eps, momentum_dtype),
        "none": lambda: chain(adjusted, descend()),
    }
    return forms[moments]()
