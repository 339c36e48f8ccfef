"""Transforms: the papers' oracles in float64, and what every transform must keep (batching, state, hard cases)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loralign.carrier.sites import sites
from loralign.maths.draws import keyed_generator
from loralign.methods.transform.adamw import adamw
from loralign.methods.transform.combine import chain, descend, per
from loralign.methods.transform.lora_fa import projected_gradient
from loralign.methods.transform.lora_plus import ratio_lr
from loralign.methods.transform.lora_pro import (
    Spectrum,
    closest,
    equivalent_gradient,
    spectra,
    sylvester,
    symmetric,
    zero,
)
from loralign.methods.transform.lora_rite import invariant_adam
from loralign.methods.transform.muon import matrix_sign, spectral
from loralign.methods.transform.riemannian import scaled_gradient
from loralign.optim.pairs import PairOptimizer
from loralign.types import Ctx, Grad, Group, LoralignError, Pair, SlotChange, State, Train, Transform, WorkFailed
from oracles import lora_fa, lora_plus, lora_pro, lora_rite, muon, riemannian
from oracles import spectral as spectral_oracle

EXACT = {"damping": 0.0, "floor": 0.0}
MAKE: Mapping[str, Callable[[], Transform]] = {
    "adamw": adamw,
    "descend": descend,
    "lora-plus": ratio_lr,
    "lora-pro factor": equivalent_gradient,
    "lora-pro full": lambda: equivalent_gradient("full"),
    "lora-pro none": lambda: equivalent_gradient("none"),
    "lora-rite": invariant_adam,
    "lora-rite bare": lambda: invariant_adam(clip=0.0, escape=0.0),
    "riemannian": scaled_gradient,
    "lora-fa": projected_gradient,
    "muon": matrix_sign,
    "spectral": spectral,
    "spectral without state": lambda: spectral(0.0),
    "per": lambda: per(A=equivalent_gradient(), B=invariant_adam()),
}
B_ONLY = ("lora-fa",)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(d_out: int = 12, d_in: int = 10, r: int = 3, *, s: float = 2.0, seed: int = 0, train: Train = "AB") -> Pair:
    A, B = normal(r, d_in, seed=2 * seed), normal(d_out, r, seed=2 * seed + 1)
    return Pair(f"w{seed}", A, B, s, train)


def grads_of(p: Pair, G: Tensor) -> Grad:
    gA, gB = p.s * p.B.T @ G, p.s * G @ p.A.T
    return Grad(gA if "A" in p.train else None, gB if "B" in p.train else None)


def step(
    transform: Transform,
    pairs: Sequence[Pair],
    grads: Sequence[Grad],
    state: Sequence[State],
    *,
    lr: float = 0.1,
    t: int = 1,
) -> list[Grad]:
    """One update of pairs of any shapes, grouped and prepared as PairOptimizer does."""

    def draw(purpose: str, name: str) -> torch.Generator:
        return keyed_generator(0, purpose, t, name)

    ctx = Ctx(lr, lr * transform.lr_ratio, t, draw)
    groups: dict[Any, list[int]] = {}
    for k, p in enumerate(pairs):
        shape = len(p.A) if "shapes" in transform.facts.accepts else (p.A.shape, p.B.shape)
        groups.setdefault((shape, p.train), []).append(k)
    scalars: dict[str, Tensor] = {}
    parts = [Group(*([x[k] for k in at] for x in (pairs, grads, state)), ctx) for at in groups.values()]
    prepared = [transform.prepare(part) for part in parts]
    for one in prepared:
        assert transform.facts.global_scalars or not one.scalars
        for key, value in one.scalars.items():
            scalars[key] = scalars[key] + value if key in scalars else value
    out: list[Grad] = [Grad(None, None)] * len(pairs)
    for at, part, one in zip(groups.values(), parts, prepared, strict=True):
        for k, update in zip(at, transform.update(part, scalars, one.carry), strict=True):
            out[k] = update
    return out


def moved(p: Pair, u: Grad) -> Pair:
    return p._replace(A=p.A if u.A is None else p.A + u.A, B=p.B if u.B is None else p.B + u.B)


def run(
    transform: Transform, pairs: Sequence[Pair], slope: Callable[[int, Tensor], Tensor], steps: int, lr: float
) -> list[list[Tensor]]:
    """W_eff − W0 of every pair after each step; slope: (pair index, W_eff − W0) -> G."""
    state, trace, now = [transform.init(p) for p in pairs], [], list(pairs)
    for t in range(1, steps + 1):
        grads = [grads_of(p, slope(k, p.s * p.B @ p.A)) for k, p in enumerate(now)]
        now = [moved(p, u) for p, u in zip(now, step(transform, now, grads, state, lr=lr, t=t), strict=True)]
        trace.append([p.s * p.B @ p.A for p in now])
    return trace


def quadratic(
    seed: int = 50, d_out: int = 12, d_in: int = 10, rank: int | None = None
) -> Callable[[int, Tensor], Tensor]:
    """Slope of ½‖L(W − W*)R‖², another one for every pair; rank: of the gradients at most."""
    L, R = normal(d_out, d_out, seed=seed) / d_out**0.5, normal(d_in, d_in, seed=seed + 1) / d_in**0.5
    if rank is not None:
        L = L[:rank]

    def slope(k: int, W: Tensor) -> Tensor:
        return L.T @ (L @ (W - normal(d_out, d_in, seed=seed + 2 + k)) @ R) @ R.T

    return slope


def close(x: Tensor, y: Tensor, tol: float = 1e-10) -> None:
    assert torch.isfinite(x).all()
    assert (x - y).norm() <= tol * max(float(y.norm()), 1e-30), float((x - y).norm() / y.norm())


def raw_closest(p: Pair, g: Grad, choose: Any = sylvester, **kwargs: float) -> tuple[Tensor, Tensor]:
    s = torch.full((1, 1, 1), p.s, dtype=torch.float64)
    sides = [None if x is None else x[None] for x in g]
    a, b = closest(p.A[None], p.B[None], sides[0], sides[1], s, choose, **{**EXACT, **kwargs})
    return (None if a is None else a[0], None if b is None else b[0])  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------- LoRA-Pro


def random_X(HB: Spectrum, HA: Spectrum, C: Tensor) -> Tensor:
    return normal(*C.shape, seed=99)


@pytest.mark.parametrize("choose", [sylvester, symmetric, zero, random_X])
def test_R1_R2_product_is_the_projection_for_any_X(choose: Any) -> None:
    p, G = pair(), normal(12, 10, seed=7)
    g = grads_of(p, G)
    a, b = raw_closest(p, g, choose)
    made, want = p.s * (p.B @ a + b @ p.A), lora_pro.closest(p.A, p.B, G)
    close(made, want)
    P_B, P_A = lora_pro.projectors(p.A, p.B)
    rest = (torch.eye(12) - P_B) @ G @ (torch.eye(10) - P_A)
    close((G - made).square().sum(), rest.square().sum())
    close((g.A * a).sum() + (g.B * b).sum(), made.square().sum())


def test_R3_sylvester_solves_and_stays_closest_to_the_plain_gradients() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    g = grads_of(p, G)
    HB, HA = p.B.T @ p.B, p.A @ p.A.T
    C = -torch.linalg.inv(HB) @ g.A @ p.A.T / p.s**2
    X = sylvester(spectra(HB, **EXACT), spectra(HA, **EXACT), C)
    assert (HB @ X + X @ HA - C).norm() < 1e-12 * C.norm()

    def distance(choose: Any) -> float:
        a, b = raw_closest(p, g, choose)
        return float((a - g.A).square().sum() + (b - g.B).square().sum())

    best = distance(sylvester)
    rivals = [zero, symmetric] + [lambda *H, i=i: X + normal(3, 3, seed=200 + i) * 10 ** (-(i % 5)) for i in range(100)]
    assert all(best <= distance(rival) * (1 + 1e-12) for rival in rivals)


def test_R4_the_two_by_two_case() -> None:
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p, G = Pair("w", one, one.T, 1.0, "AB"), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    expected = {
        zero: ([1.0, 2.0], [0.0, 3.0]),
        sylvester: ([0.5, 2.0], [0.5, 3.0]),
        symmetric: ([0.5, 2.0], [0.5, 3.0]),
    }
    for choose, (a, b) in expected.items():
        got = raw_closest(p, grads_of(p, G), choose)
        assert [got[0].flatten().tolist(), got[1].flatten().tolist()] == [a, b]
        assert (p.B @ got[0] + got[1] @ p.A).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_R5_a_descent_step_moves_W_by_the_projection() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    transform = equivalent_gradient("none", damping=0.0, floor=0.0)
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        (u,) = step(transform, [p], [grads_of(p, G)], [transform.init(p)], lr=lr)
        q, want = moved(p, u), -lr * lora_pro.closest(p.A, p.B, G)
        errors.append(float((p.s * (q.B @ q.A - p.B @ p.A) - want).norm() / want.norm()))
    assert errors[2] < errors[1] / 9 < errors[0] / 80


def test_R6_full_moments_at_full_rank_are_full_fine_tuning() -> None:
    p, slope, lr = pair(r=10), quadratic(), 1e-4
    adam, W = lora_pro.FactorAdam(lr), p.s * p.B @ p.A
    for _ in range(20):
        W = W + adam.step((slope(0, W),))[0]
    got = run(equivalent_gradient("full", damping=0.0, floor=0.0), [p], slope, 20, lr)[-1][0]
    start = p.s * p.B @ p.A
    close(got - start, W - start, 1e-3)


def test_R7_same_product_same_step() -> None:
    p, G, T = pair(), normal(12, 10, seed=7), normal(3, 3, seed=8)
    q = p._replace(A=torch.linalg.inv(T) @ p.A, B=p.B @ T)
    made = []
    for each in (p, q):
        a, b = raw_closest(each, grads_of(each, G))
        made.append(each.B @ a + b @ each.A)
    close(made[1], made[0])


def test_R8_zero_B() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    p = p._replace(B=torch.zeros_like(p.B))
    g, P_A = grads_of(p, G), lora_pro.projectors(p.A, p.B)[1]
    for kwargs in (EXACT, {"damping": 1e-6, "floor": 0.0}, {"damping": 0.0, "floor": 1e-8}):
        a, b = raw_closest(p, g, **kwargs)
        assert (a == 0).all()
        close(b, g.B @ torch.linalg.inv(p.A @ p.A.T) / p.s**2, 1e-5)
        close(p.s * b @ p.A, G @ P_A, 1e-5)


@pytest.mark.parametrize("x", ["zero", "sylvester"])
def test_R9_balance_of_the_factors(x: Any) -> None:
    p, c, slope = pair(), 3.0, quadratic()
    q = p._replace(A=p.A * c, s=p.s / c)
    transform = equivalent_gradient("none", x, **EXACT)
    first, second = (run(transform, [each], slope, 10, 1e-2) for each in (p, q))
    if x == "zero":
        for mine, other in zip(first, second, strict=True):
            close(other[0], mine[0])
    lr = 1e-5  # to first order only
    first, second = (run(transform, [each], slope, 1, lr) for each in (p, q))
    start = p.s * p.B @ p.A
    close(second[0][0] - start, first[0][0] - start, 1e-3)


@pytest.mark.parametrize("train", ["A", "B"])
def test_one_side_has_its_own_projection(train: Train) -> None:
    p, G = pair(train=train), normal(12, 10, seed=7)
    P_B, P_A = lora_pro.projectors(p.A, p.B)
    a, b = raw_closest(p, grads_of(p, G))
    made, want = (p.B @ a, P_B @ G) if train == "A" else (b @ p.A, G @ P_A)
    close(p.s * made, want)
    assert (a is None) != (b is None)


@pytest.mark.parametrize("train", ["A", "B"])
def test_damping_is_a_share_of_the_mean_eigenvalue_and_the_floor_is_none(train: Train) -> None:
    p, G = pair(train=train), normal(12, 10, seed=7)
    H = p.B.T @ p.B if train == "A" else p.A @ p.A.T
    g = grads_of(p, G)
    for damping, floor in ((0.3, 0.0), (0.0, 0.3)):
        damped = (
            torch.linalg.inv(H + (damping * torch.linalg.eigvalsh(H).mean() + floor) * torch.eye(3, dtype=H.dtype))
            / p.s**2
        )
        a, b = raw_closest(p, g, damping=damping, floor=floor)
        close(*((a, damped @ g.A) if train == "A" else (b, g.B @ damped)))


def test_equals_the_published_adjustment() -> None:
    for seed, (d_out, d_in, r) in enumerate([(48, 40, 8), (256, 32, 16), (12, 10, 1), (12, 10, 10)]):
        p = pair(d_out, d_in, r, seed=seed)
        g = grads_of(p, normal(d_out, d_in, seed=90))
        want = lora_pro.published(p.A, p.B, g.A, g.B, p.s)
        got = raw_closest(p, g, floor=1e-8)
        close(got[0], want[0], 1e-12 if r < 10 else 1e-9)
        close(got[1], want[1], 1e-12 if r < 10 else 1e-9)


@pytest.mark.parametrize("train", ["AB", "A", "B"])
@pytest.mark.parametrize("moments", ["factor", "full", "none"])
def test_lora_pro_equals_its_oracle_over_steps(moments: Any, train: Train) -> None:
    p, slope, lr = pair(train=train), quadratic(), 1e-2
    got = run(equivalent_gradient(moments, **EXACT), [p], slope, 5, lr)
    full, factor = lora_pro.FullAdam(lr), lora_pro.FactorAdam(lr)
    for t in range(5):
        G = slope(0, p.s * p.B @ p.A)
        if moments == "full":
            dA, dB = full.step(p.A, p.B, G, p.s, train)
        else:
            a, b = lora_pro.adjusted(p.A, p.B, p.s * p.B.T @ G, p.s * G @ p.A.T, p.s, train)
            dA, dB = factor.step((a, b)) if moments == "factor" else (-lr * a, -lr * b)
        p = p._replace(A=p.A + dA, B=p.B + dB)
        close(got[t][0], p.s * p.B @ p.A, 1e-9)


def test_a_nearly_dead_direction_does_not_explode() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    B = p.B.clone()
    B[:, 2] = B[:, 1] * (1 + 1e-9)
    a, b = raw_closest(p._replace(B=B), grads_of(p._replace(B=B), G), damping=1e-6, floor=1e-8)
    assert a.norm() < 100 and b.norm() < 100


# ------------------------------------------------------------------------------------------------------- LoRA-RITE


def rite(**kwargs: float) -> Transform:
    return invariant_adam(**{"clip": 0.0, "eps": 1e-30, **kwargs})


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("escape", [0.0, 1.0])
def test_T1_T2_every_factorisation_takes_the_same_path(escape: float, clip: float) -> None:
    p, slope = pair(), quadratic()
    transform = invariant_adam(clip=clip, escape=escape)
    want = run(transform, [p], slope, 20, 0.03)
    for T in (normal(3, 3, seed=8), 1e3 * torch.eye(3, dtype=torch.float64)):
        q = p._replace(A=torch.linalg.inv(T) @ p.A, B=p.B @ T)
        for mine, other in zip(want, run(transform, [q], slope, 20, 0.03), strict=True):
            close(other[0], mine[0])
    adam = [run(adamw(), [each], slope, 20, 0.03)[-1][0] for each in (p, q)]
    assert (adam[1] - adam[0]).norm() > 0.1 * adam[0].norm()


def test_T3_rank_one() -> None:
    p, G, lr = pair(r=1), normal(12, 10, seed=7), 0.1
    g = grads_of(p, G)
    for eps in (1e-30, 1e-2):
        transform = invariant_adam(clip=0.0, eps=eps)
        (u,) = step(transform, [p], [g], [transform.init(p)], lr=lr)
        g_bar = g.B / p.A.norm()
        rms = g_bar.square().mean().sqrt()
        close(u.B, -lr * g_bar / (rms + eps) / p.A.norm())


def test_T4_first_step_moves_all_directions_equally() -> None:
    p, G, lr = pair(), normal(12, 10, seed=7), 0.1
    g = grads_of(p, G)
    (u,) = step(rite(), [p], [g], [rite().init(p)], lr=lr)
    Q, R = torch.linalg.qr(p.A.T)
    g_bar = g.B @ torch.linalg.inv(R)
    lam, E = torch.linalg.eigh(g_bar.T @ g_bar / 12)
    close(u.B @ p.A, -lr * g_bar @ E @ torch.diag(lam**-0.5) @ E.T @ Q.T)
    close(torch.linalg.svdvals(u.B @ p.A)[:3], torch.full((3,), lr * 12**0.5, dtype=torch.float64))
    close(torch.linalg.svdvals(p.B @ u.A)[:3], torch.full((3,), lr * 10**0.5, dtype=torch.float64))


def test_T5_T6_transport() -> None:
    p, transform = pair(train="B"), rite()
    state = transform.init(p)
    seen = torch.zeros(3, 3, dtype=torch.float64)
    Q, _ = torch.linalg.qr(p.A.T)
    for t in range(1, 5):  # A rests: plain averages, nothing escapes
        g = grads_of(p, normal(12, 10, seed=20 + t))
        step(transform, [p], [g], [state], t=t)
        g_bar = p.s * normal(12, 10, seed=20 + t) @ Q
        beta = 0.999 * (1 - 0.999 ** (t - 1)) / (1 - 0.999**t)
        seen = beta * seen + (1 - beta) * g_bar.T @ g_bar / 12
        basis = Q.T @ state["B"]["basis"]
        close(basis @ state["B"]["second"] @ basis.T, seen)
        assert abs(float(state["B"]["escaped"])) < 1e-12
    q, both = pair(), rite()
    kept = [both.init(q)]
    for t in range(1, 8):
        before = float(kept[0]["B"]["second"].trace())
        (u,) = step(both, [q], [grads_of(q, normal(12, 10, seed=30 + t))], kept, t=t)
        q = moved(q, u)
        basis_then = kept[0]["B"]["basis"]
        P = torch.linalg.qr(q.A.T)[0].T @ basis_then
        assert (torch.linalg.svdvals(P) <= 1 + 1e-12).all() and before >= 0
        assert float(kept[0]["B"]["escaped"]) >= 0 and float(kept[0]["A"]["escaped"]) >= 0
    assert float(kept[0]["B"]["escaped"]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero_B", [True, False])
def test_T7_rank_deficient_gradients(dtype: torch.dtype, zero_B: bool) -> None:
    p, slope, lr = pair(r=4), quadratic(rank=2), 1e-2
    B = torch.zeros_like(p.B) if zero_B else p.B
    p = p._replace(A=p.A.to(dtype), B=B.to(dtype))
    transform = invariant_adam()
    state, sizes = [transform.init(p)], []
    for t in range(1, 61):
        G = slope(0, (p.s * p.B @ p.A).double())
        (u,) = step(transform, [p], [grads_of(p, G.to(dtype))], state, lr=lr, t=t)
        assert torch.isfinite(u.A).all() and torch.isfinite(u.B).all()
        assert u.B.norm() > 0.1 * lr
        p = moved(p, u)
        sizes.append(float(slope(0, (p.s * p.B @ p.A).double()).norm()))
    assert sizes[-1] < 0.8 * slope(0, torch.zeros(12, 10).double()).norm() if zero_B else sizes[-1] < sizes[0]
    assert p.A.norm() < 100 and p.B.norm() < 100


def test_T9_unbalanced_factors_take_the_same_path() -> None:
    p, c, slope = pair(), 7.0, quadratic()
    q = p._replace(B=p.B / c, s=p.s * c)
    want, got = run(rite(), [p], slope, 10, 0.03), run(rite(), [q], slope, 10, 0.03 / c)
    for mine, other in zip(want, got, strict=True):
        close(other[0], mine[0])


@pytest.mark.parametrize("train", ["AB", "A", "B"])
@pytest.mark.parametrize("basis", [lora_rite.qr, lora_rite.polar])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_rite_equals_its_oracle_over_steps(basis: Any, clip: float, train: Train) -> None:
    pairs, slope, lr = [pair(seed=k, train=train) for k in range(2)], quadratic(), 0.05
    got = run(invariant_adam(clip=clip), pairs, slope, 8, lr)
    slow, now = [lora_rite.Rite(lr, basis, train=train) for _ in pairs], list(pairs)
    for t in range(8):
        gs = []
        for k, p in enumerate(now):
            G = slope(k, p.s * p.B @ p.A)
            gs.append((p.s * p.B.T @ G, p.s * G @ p.A.T))
        norm = sum(o.norm(p.A, p.B, *g) for o, p, g in zip(slow, now, gs, strict=True)) ** 0.5
        scale = min(1.0, clip / norm) if clip else 1.0
        moves = [o.step(p.A, p.B, *g, scale) for o, p, g in zip(slow, now, gs, strict=True)]
        now = [p._replace(A=p.A + dA, B=p.B + dB) for p, (dA, dB) in zip(now, moves, strict=True)]
        for k, p in enumerate(now):
            close(got[t][k], p.s * p.B @ p.A, 1e-9)


# ------------------------------------------------------------------------------------- the others, and the combinators


def test_riemannian_equals_its_oracle() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    g, transform = grads_of(p, G), scaled_gradient(1e-2).first
    (got,) = step(transform, [p], [g], [{}])
    for mine, want in zip(got, riemannian.scaled(p.A, p.B, g.A, g.B, 1e-2), strict=True):
        close(mine, want, 1e-12)
    P_B, P_A = lora_pro.projectors(p.A, p.B)
    (got,) = step(scaled_gradient(0.0).first, [p], [g], [{}])
    close(p.s * (p.B @ got.A + got.B @ p.A), p.s**2 * (P_B @ G + G @ P_A))  # the intersection counts twice


def test_lora_fa_equals_its_oracle_and_leaves_A() -> None:
    for train in ("AB", "B"):
        p, G = pair(train=train), normal(12, 10, seed=7)
        transform = projected_gradient()
        (got,) = step(transform.first, [p], [grads_of(p, G)], [{}])
        close(got.B, lora_fa.projected(p.A, grads_of(p, G).B, p.s), 1e-12)
        close(p.s * got.B @ p.A, G @ lora_pro.projectors(p.A, p.B)[1])
        (u,) = step(transform, [p], [grads_of(p, G)], [transform.init(p)])
        assert u.A is None and u.B is not None
    p = pair(train="A")
    with pytest.raises(WorkFailed, match="B of w0 does not train"):
        step(transform, [p], [grads_of(p, G)], [transform.init(p)])


def test_muon_equals_its_oracle() -> None:
    p, transform, lr = pair(), matrix_sign(), 0.1
    state, slow = [transform.init(p)], (muon.Muon(lr), muon.Muon(lr))
    for t in range(1, 6):
        g = grads_of(p, normal(12, 10, seed=t))
        (u,) = step(transform, [p], [g], state, lr=lr, t=t)
        close(u.A, slow[0].step(g.A), 1e-9)
        close(u.B, slow[1].step(g.B), 1e-9)
    assert 0.5 < float(torch.linalg.svdvals(u.B)[0]) / (lr * 0.2 * 12**0.5) < 1.3


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_spectral_equals_its_oracle_and_without_momentum_keeps_nothing(momentum: float) -> None:
    p, transform, lr = pair(), spectral(momentum), 0.1
    state, slow = [transform.init(p)], (spectral_oracle.Spectral(lr, momentum), spectral_oracle.Spectral(lr, momentum))
    for t in range(1, 6):
        g = grads_of(p, normal(12, 10, seed=t))
        (u,) = step(transform, [p], [g], state, lr=lr, t=t)
        close(u.A, slow[0].step(g.A), 1e-9)
        close(u.B, slow[1].step(g.B), 1e-9)
    assert [bool(st) for st in state[0].values()] == [momentum > 0] * 2


def test_spectral_beside_torchs_own_muon() -> None:
    """The same factors under torch.optim.Muon: as close as its five rounds in bf16, of 2⁻⁸ each, allow."""
    A, B = torch.nn.Parameter(normal(8, 48).float()), torch.nn.Parameter(normal(40, 8, seed=1).float())
    given = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    peer = torch.optim.Muon([A, B], lr=0.1, **given)  # type: ignore[arg-type]
    p, transform = Pair("w", A.detach().clone(), B.detach().clone(), 1.0, "AB"), spectral()
    state = [transform.init(p)]
    for t in range(1, 5):
        A.grad, B.grad = normal(8, 48, seed=2 * t).float(), normal(40, 8, seed=2 * t + 1).float()
        before = A.detach().clone(), B.detach().clone()
        (u,) = step(transform, [p], [Grad(A.grad, B.grad)], state, lr=0.1, t=t)
        peer.step()
        for ours, after, was in zip(u, (A, B), before, strict=True):
            assert ours is not None
            theirs = after.detach() - was
            assert (ours - theirs).norm() < 5e-2 * theirs.norm(), t


def test_momentum_in_half_precision() -> None:
    p, g = pair(), grads_of(pair(), normal(12, 10, seed=1))
    p, g = p._replace(A=p.A.float(), B=p.B.float()), Grad(*(x.float() for x in g if x is not None))
    half, full = spectral(momentum_dtype="bfloat16"), spectral()
    states = [half.init(p)], [full.init(p)]
    assert {x["momentum"].dtype for x in states[0][0].values()} == {torch.bfloat16}
    for t in range(1, 4):
        (u,), (v,) = step(half, [p], [g], states[0], t=t), step(full, [p], [g], states[1], t=t)
        assert (u.A - v.A).norm() < 2e-2 * v.A.norm() and (u.B - v.B).norm() < 2e-2 * v.B.norm()


def test_chain_and_per() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    g = grads_of(p, G)
    both = chain(descend(), adamw())
    (u,), (v,) = (step(t, [p], [x], [t.init(p)]) for t, x in ((both, g), (adamw(), Grad(-0.1 * g.A, -0.1 * g.B))))
    assert torch.equal(u.A, v.A) and torch.equal(u.B, v.B)
    sides = per(A=adamw(), B=ratio_lr(4.0, descend()))
    assert sides.lr_ratio == 4.0
    (u,) = step(sides, [p], [g], [sides.init(p)])
    (a,) = step(adamw(), [p], [g], [adamw().init(p)])
    assert torch.equal(u.A, a.A)
    close(u.B, -0.4 * g.B)
    with pytest.raises(LoralignError, match="both keep"):
        chain(adamw(), adamw()).init(p)


# ------------------------------------------------------------------------------------------------- every transform


def case(name: str) -> tuple[list[Pair], list[Grad]]:
    """Pairs of two shapes with gradients, fp32."""
    train: Train = "B" if name in B_ONLY else "AB"
    pairs = [pair(*shape, seed=k, train=train) for k, shape in enumerate([(12, 10, 3)] * 3 + [(5, 30, 3)] * 2)]
    grads = [grads_of(p, normal(*p.B.shape[:1], *p.A.shape[1:], seed=70 + k)) for k, p in enumerate(pairs)]
    return [p._replace(s=1.0 + k) for k, p in enumerate(pairs)], grads


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    return type(x)(*(v.to(dtype) if isinstance(v, Tensor) else v for v in x))


def same(first: Sequence[Grad], second: Sequence[Grad], tol: float = 1e-12) -> None:
    for x, y in zip(first, second, strict=True):
        for mine, other in zip(x, y, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                close(mine.double(), other.double(), tol)


@pytest.mark.parametrize("name", MAKE)
def test_batched_equals_looped_and_order_does_not_matter(name: str) -> None:
    transform, (pairs, grads) = MAKE[name](), case(name)
    state = [transform.init(p) for p in pairs]
    backwards = [transform.init(p) for p in pairs[::-1]]
    alone = [transform.init(p) for p in pairs]
    for t in (1, 2):
        grads = [as_dtype(g, torch.float64) for g in grads]
        batched = step(transform, pairs, grads, state, t=t)
        same(step(transform, pairs[::-1], grads[::-1], backwards, t=t)[::-1], batched)
        if not transform.facts.global_scalars or name == "lora-rite bare":
            looped = [step(transform, [p], [g], [s], t=t)[0] for p, g, s in zip(pairs, grads, alone, strict=True)]
            same(looped, batched)


@pytest.mark.parametrize("name", MAKE)
def test_each_factor_has_its_own_rate(name: str) -> None:
    """B's rate does not reach A, nor A's B; both are proportional to the first update."""
    transform, (pairs, grads) = MAKE[name](), case(name)
    made = {}
    for rates in ((0.1, 0.1), (0.1, 0.3), (0.0, 0.3)):
        state = [transform.init(p) for p in pairs[:3]]
        group = Group(pairs[:3], grads[:3], state, Ctx(*rates, 1, CTX.draw))
        prepared = transform.prepare(group)
        made[rates] = transform.update(group, prepared.scalars, prepared.carry)
    for alike, apart, still in zip(*made.values(), strict=True):
        if alike.A is not None:
            close(apart.A, alike.A, 1e-12)
            assert not still.A.any()
        close(apart.B, 3 * alike.B, 1e-12)
        close(still.B, 3 * alike.B, 1e-12)


CTX = Ctx(0.1, 0.1, 1, lambda purpose, name: torch.Generator())


@pytest.mark.parametrize("name", MAKE)
def test_float32_follows_float64_and_half_is_upcast(name: str) -> None:
    pairs, grads = case(name)
    want = step(MAKE[name](), pairs, grads, [MAKE[name]().init(p) for p in pairs])
    for dtype, tol in ((torch.float32, 1e-3), (torch.bfloat16, 0.3)):
        low = [as_dtype(p, dtype) for p in pairs]
        transform = MAKE[name]()
        got = step(transform, low, [as_dtype(g, dtype) for g in grads], [transform.init(p) for p in low])
        assert all(x is None or x.dtype in (torch.float32, dtype) for u in got for x in u)
        if "sharded" in transform.facts.accepts or "none" in name or dtype == torch.float32:
            same(got, want, tol)


HARD: Mapping[str, Callable[[], tuple[Pair, Tensor]]] = {
    "r = 1": lambda: (pair(r=1), normal(12, 10, seed=7)),
    "r = min(d)": lambda: (pair(r=10), normal(12, 10, seed=7)),
    "r > min(d)": lambda: (pair(4, 30, 6), normal(4, 30, seed=7)),
    "thin": lambda: (pair(3, 200, 2), normal(3, 200, seed=7)),
    "zero gradient": lambda: (pair(), torch.zeros(12, 10).double()),
    "B = 0": lambda: ((p := pair())._replace(B=torch.zeros_like(p.B)), normal(12, 10, seed=7)),
    "A = B = 0": lambda: ((p := pair())._replace(A=torch.zeros_like(p.A), B=torch.zeros_like(p.B)), normal(12, 10)),
    "rank-1 gradient": lambda: (pair(), normal(12, 1, seed=7) @ normal(1, 10, seed=8)),
    "equal columns of B": lambda: ((p := pair())._replace(B=p.B[:, :1].expand(12, 3).clone()), normal(12, 10)),
    "tiny": lambda: (pair(), normal(12, 10, seed=7) * 1e-12),
    "huge": lambda: (pair(), normal(12, 10, seed=7) * 1e12),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("name", MAKE)
def test_hard_cases_stay_finite(name: str, hard: str) -> None:
    p, G = HARD[hard]()
    for train in ("B",) if name in B_ONLY else ("AB", "A", "B"):
        for dtype in (torch.float32, torch.float64):
            q, transform = as_dtype(p, dtype)._replace(train=train), MAKE[name]()
            state, before = [transform.init(q)], [q.A.clone(), q.B.clone()]
            shapes = [t.shape for side in state[0].values() for t in side.values()]
            for t in (1, 2, 3):
                g = grads_of(q, G.to(dtype))
                copy = [None if x is None else x.clone() for x in g]
                (u,) = step(transform, [q], [g], state, lr=1e-3, t=t)
                for factor, update in zip("AB", u, strict=True):
                    assert (update is None) == (factor not in train)
                    if update is not None:
                        assert update.shape == getattr(q, factor).shape and update.dtype == dtype
                        assert torch.isfinite(update).all()
                        assert G.any() or not update.any()
                for x, y in zip(g, copy, strict=True):
                    assert x is None or torch.equal(x, y)
                if t == 1:
                    assert torch.equal(q.A, before[0]) and torch.equal(q.B, before[1])
                    tensors = [t for side in state[0].values() for t in side.values()]  # joined once, then in place
                q = moved(q, u)
            after = [t for side in state[0].values() for t in side.values()]
            assert all(x is y for x, y in zip(tensors, after, strict=True))
            assert [t.shape for t in after] == shapes
            assert all(torch.isfinite(t).all() for t in after)


class Count(TorchDispatchMode):
    """Dispatched operations that would launch work: everything but views and allocations."""

    FREE = ("view", "detach", "unbind", "split", "slice", "select", "transpose", "expand", "as_strided", "unsqueeze")
    FREE += ("squeeze", "diagonal", "alias", "empty", "_unsafe_view", "permute", "_local_scalar_dense", "t.default")
    FREE += ("promote_types", "scalar_tensor", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in MAKE if n != "lora-pro full"])
def test_number_of_operations_does_not_grow_with_pairs(name: str) -> None:
    counts = []
    for n in (2, 4, 8):
        train: Train = "B" if name in B_ONLY else "AB"
        pairs = [as_dtype(pair(seed=k, train=train), torch.float32) for k in range(n)]
        grads = [as_dtype(grads_of(p, normal(12, 10).float()), torch.float32) for p in pairs]
        transform = MAKE[name]()
        state = [transform.init(p) for p in pairs]
        with Count() as count:
            step(transform, pairs, grads, state)
        counts.append(len(count.ops))
    assert counts[0] == counts[1] == counts[2] <= 160, counts


@pytest.mark.parametrize("name", MAKE)
def test_state_can_be_planned_without_memory(name: str) -> None:
    p = pair()
    state = MAKE[name]().init(p._replace(A=p.A.to("meta"), B=p.B.to("meta")))
    tensors = [t for side in state.values() for t in side.values()]
    assert all(t.device.type == "meta" for t in tensors)
    if name == "lora-pro full":
        assert sum(t.numel() for t in tensors) == 2 * 12 * 10 + 1


@pytest.mark.parametrize("name", MAKE)
def test_moments_follow_the_slots(name: str) -> None:
    """Slots that died, are new or were overwritten have no first moment, the others keep theirs; a copy has its
    source's second moment. (State that is no factor's, as of a whole matrix, knows no slots.)"""
    transform, (pairs, grads) = MAKE[name](), case(name)
    state = [transform.init(p) for p in pairs]
    for t, change in enumerate((SlotChange(off=(0,), fresh=(1,)), SlotChange(copied=((0, 2),))), 1):
        step(transform, pairs, grads, state, t=t)
        for p, st in zip(pairs, state, strict=True):
            before = {f: {k: x.clone() for k, x in own.items()} for f, own in st.items()}
            transform.on_slots(p, st, change)
            for factor, own in st.items():
                for key in {"momentum", "exp_avg", "exp_avg_sq"} & own.keys():
                    if own[key].shape == getattr(p, factor).shape:
                        was, now = (x[key].movedim("AB".index(factor), 0) for x in (before[factor], own))
                        check_moments(was, now, change, first=key != "exp_avg_sq")
    for u in step(transform, pairs, grads, state, t=3):
        assert all(x is None or torch.isfinite(x).all() for x in u)


def check_moments(was: Tensor, now: Tensor, change: SlotChange, *, first: bool) -> None:
    """was, now: (r, ...) before and after."""
    new = {*change.off, *change.fresh, *(to for to, _ in change.copied)}
    assert bool(was.any(1).all())
    assert all(torch.equal(now[j], was[j]) for j in set(range(len(now))) - new)
    assert not any(bool(now[j].any()) for j in (new if first else change.off))
    assert first or all(torch.equal(now[to], was[source]) for to, source in change.copied)


# ------------------------------------------------------------------------------------------------ through PairOptimizer


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.norm(self.two(torch.tanh(self.one(x))))))


def toy(dtype: torch.dtype = torch.float32, start: float = 0.3) -> Any:
    """A PEFT model of three sites of two shapes, B not zero, the norm trains as well."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = get_peft_model(Toy().to(dtype), LoraConfig(r=2, target_modules=["one", "two", "three"], lora_alpha=4))
    torch.set_rng_state(state)
    model = model.to(dtype)
    for k, site in enumerate(sites(model)):
        B = site.layer.lora_B["default"].weight
        B.data.copy_(start * normal(*B.shape, seed=k))
    for p in model.base_model.model.norm.parameters():
        p.requires_grad_(True)
    return model


def optimizer_for(model: Any, transform: Transform, **kwargs: Any) -> PairOptimizer:
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    return PairOptimizer(sites(model), rest, transform, **{"lr": 1e-2, "max_grad_norm": 0.0, **kwargs})


def backward(model: Any, t: int) -> float:
    dtype = next(model.parameters()).dtype
    x, y = normal(16, 10, seed=100 + t).to(dtype), normal(16, 4, seed=500).to(dtype)
    for p in model.parameters():
        p.grad = None
    loss = (model(x) - y).square().mean()
    loss.backward()
    return float(loss.detach())


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in MAKE), ("lora-rite", torch.float64), ("lora-pro full", torch.float64)],
)
def test_T8_R10_save_load_next_step_is_identical(name: str, dtype: torch.dtype) -> None:
    model = toy(dtype)
    optimizer = optimizer_for(model, MAKE[name]())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
    for t in range(3):
        backward(model, t)
        optimizer.step()
        schedule.step()
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": trained(model)}, buffer)
    buffer.seek(0)
    backward(model, 9)
    optimizer.step()
    want = trained(model)

    saved = torch.load(buffer, weights_only=True)
    other = toy(dtype)
    other.load_state_dict(saved["model"], strict=False)
    again = optimizer_for(other, MAKE[name]())
    again.load_state_dict(saved["optimizer"])
    backward(other, 9)
    again.step()
    for key, value in trained(other).items():
        assert torch.equal(value, want[key]), key
    assert again.applied == 3


@pytest.mark.parametrize("name", [n for n in MAKE if n not in ("descend",)])
def test_it_learns(name: str) -> None:
    model = toy()
    optimizer = optimizer_for(model, MAKE[name](), max_grad_norm=1.0, lr=3e-3 if "full" in name else 1e-2)
    losses = []
    for _ in range(25):
        losses.append(backward(model, 0))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_P1_ratio_one_is_adam(decay: float) -> None:
    runs = []
    for transform in (adamw(), ratio_lr(1.0)):
        model = toy()
        optimizer = optimizer_for(model, transform, weight_decay=decay)
        for t in range(5):
            backward(model, t)
            optimizer.step()
        runs.append(trained(model))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_equals_torch_with_two_groups(decay: float) -> None:
    ours, theirs = toy(torch.float64), toy(torch.float64)
    optimizer = optimizer_for(ours, ratio_lr(8.0), weight_decay=decay)
    named = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad and "lora" in n]
    A, B = ([p for n, p in named if side in n] for side in ("lora_A", "lora_B"))
    reference = lora_plus.optimizer(A, B, 1e-2, 8.0, decay)
    rest = torch.optim.AdamW(theirs.base_model.model.norm.parameters(), lr=1e-2, weight_decay=0.0)
    for t in range(5):
        backward(ours, t)
        optimizer.step()
        backward(theirs, t)
        reference.step()
        rest.step()
    for key, value in trained(ours).items():
        close(value, trained(theirs)[key], 1e-10)


def test_P2_descent_scales_B_by_the_ratio() -> None:
    p, G = pair(), normal(12, 10, seed=7)
    plain, fast = (step(t, [p], [grads_of(p, G)], [t.init(p)])[0] for t in (descend(), ratio_lr(8.0, descend())))
    assert torch.equal(fast.A, plain.A)
    close(fast.B, 8.0 * plain.B, 1e-15)


def test_P3_P4_schedules_keep_the_ratio_and_every_tensor_is_in_one_group() -> None:
    model = toy()
    optimizer = optimizer_for(model, ratio_lr(8.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 3) * (1 - t / 20))
    for t in range(10):
        rate = {g["role"]: g["lr"] for g in optimizer.param_groups}
        assert rate["B"] == pytest.approx(8.0 * rate["A"], rel=1e-12)
        backward(model, t)
        optimizer.step()
        schedule.step()
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g["lr"] for g in optimizer.param_groups if g["role"] == "rest"} == {
        rate["A"] * schedule.get_last_lr()[0] / rate["A"]
    }


def test_P5_first_step_from_zero_B() -> None:
    model = toy(torch.float64, start=0.0)
    before = trained(model)
    optimizer = optimizer_for(model, ratio_lr(8.0), lr=1e-3)
    backward(model, 0)
    optimizer.step()
    for key, value in trained(model).items():
        if "lora_A" in key:
            assert torch.equal(value, before[key])
        elif "lora_B" in key:
            assert float((value - before[key]).abs().max()) == pytest.approx(8e-3, rel=1e-4)


def test_lora_plus_refuses_what_balances_the_factors_itself() -> None:
    with pytest.raises(LoralignError, match="use it alone"):
        ratio_lr(16.0, invariant_adam())
    with pytest.raises(LoralignError, match="must be above 0"):
        ratio_lr(0.0)


@pytest.mark.parametrize("name", [n for n in MAKE if n != "lora-pro full"])
def test_a_whole_step_does_not_launch_more_for_more_layers(name: str) -> None:
    counts = []
    for layers in (2, 4, 8):
        body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        model = get_peft_model(body, LoraConfig(r=2, target_modules=r"\d+"))
        optimizer = optimizer_for(model, MAKE[name](), max_grad_norm=1.0, weight_decay=0.1)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        model(x).square().sum().backward()
        optimizer.step()
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1e6)  # so that the clip acts
        with Count() as count:
            optimizer.step()
        counts.append(len(count.ops))
    assert counts[0] == counts[1] == counts[2] <= 180, counts
