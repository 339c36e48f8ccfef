"""loralign.maths against dense float64 results of torch.linalg, over random, thin, zero and rank-deficient input."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import blake2b

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralign.maths import draws, linalg

F64 = torch.float64
some = settings(max_examples=40, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 12)
seeds = st.integers(0, 10**6)


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return draws.keyed_normal(shape, "test", seed, *shape).to(dtype)


def low_rank(m: int, n: int, rank: int, *, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return gauss(m, rank, seed=seed, dtype=dtype) @ gauss(rank, n, seed=seed + 1, dtype=dtype)


def spectrum(S: Tensor, m: int, n: int, *, seed: int = 0) -> Tensor:
    """U·diag(S)·Vᵀ (m, n), float64, with Haar U and V."""
    U = torch.linalg.qr(gauss(m, len(S), seed=seed)).Q
    V = torch.linalg.qr(gauss(n, len(S), seed=seed + 1)).Q
    return (U * S.to(F64)) @ V.T


def psd(r: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    X = gauss(r, r if rank is None else rank, seed=seed)
    return X @ X.T


def close(a: Tensor, b: Tensor, tol: float) -> None:
    """max|a − b| ≤ tol·max(1, max|b|), no NaN."""
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    assert a.shape == b.shape
    assert bool(torch.isfinite(a).all())
    assert float((a.double() - b.double()).abs().max()) <= tol * scale


def orthonormal(Q: Tensor, tol: float) -> None:
    close(Q.mT @ Q, torch.eye(Q.shape[-1], dtype=Q.dtype).expand(*Q.shape[:-2], -1, -1), tol)


def canonical(U: Tensor) -> None:
    assert bool((U.gather(-2, U.abs().argmax(-2, keepdim=True)) >= 0).all())


# ---------------------------------------------------------------------------------------------------------------- draws


def test_keyed_draws_are_functions_of_the_key() -> None:
    key = (7, "init A", 0, "model.layers.3.q_proj")
    assert torch.equal(draws.keyed_normal((3, 5), *key), draws.keyed_normal((3, 5), *key))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws.orthonormal(3, 8, draws.keyed_generator(*key))
    linalg.top_svd(gauss(300, 200), 4)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    others = [
        (8, *key[1:]),
        (7, "init B", *key[2:]),
        (*key[:2], 1, key[3]),
        (*key[:3], "model.layers.3.k_proj"),
        key[:3],
    ]
    for other in others:
        assert not torch.equal(draws.keyed_normal((3, 5), *key), draws.keyed_normal((3, 5), *other))


def test_keys_are_not_concatenated() -> None:
    keys = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1, 23),
        (12, 3),
        ("1", 23),
        ("1, 23",),
        (),
        ("",),
        ("é",),
        ("e\u0301",),
    ]
    seeds = [draws.keyed_generator(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == len(keys)
    assert max(seeds) > 2**32, "64 bits of hash"
    assert draws.keyed_generator(True).initial_seed() == draws.keyed_generator(1).initial_seed()
    with pytest.raises(TypeError):
        draws.keyed_generator(0.5)  # type: ignore[arg-type]


def test_keyed_draws_agree_across_processes() -> None:
    drawn = "draws.orthonormal(2, 3, draws.keyed_generator(1)).tolist()"
    expression = f"draws.keyed_normal((4,), 3, 'é', 'q').tolist(), {drawn}"
    alone = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("draws", {draws.__file__!r})
draws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draws)
print(({expression}))
"""
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONUTF8": "1"}
    out = subprocess.run([sys.executable, "-c", alone], env=env, capture_output=True, text=True, check=True).stdout
    here = (draws.keyed_normal((4,), 3, "é", "q").tolist(), draws.orthonormal(2, 3, draws.keyed_generator(1)).tolist())
    assert out.strip() == str(here)


def test_seed_is_the_hash_of_the_documented_bytes() -> None:
    digest = blake2b(b"(0, 'init A', 'q')", digest_size=8).digest()
    assert draws.keyed_generator(0, "init A", "q").initial_seed() == int.from_bytes(digest, "little")


def test_normal_moments() -> None:
    y = draws.keyed_normal((100, 1000), 0)
    assert y.dtype == torch.float32 and abs(float(y.mean())) < 2e-2 and abs(float(y.var()) - 1) < 2e-2


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (4, 9), (9, 4), (6, 6), (7, 1)])
def test_haar_is_orthonormal_and_uniform(rows: int, cols: int) -> None:
    Q = draws.orthonormal(rows, cols, draws.keyed_generator("h", rows, cols))
    assert Q.shape == (rows, cols) and Q.is_contiguous()
    orthonormal(Q.mT if rows <= cols else Q, 1e-6)
    mean = torch.stack([draws.orthonormal(rows, cols, draws.keyed_generator(i)) for i in range(600)]).mean(0)
    assert float(mean.abs().max()) < 5 / 600**0.5, "plain QR of a Gaussian has a biased diagonal"


# ---------------------------------------------------------------------------------------------------------------- signs


@some
@given(m=sides, n=sides, k=st.integers(1, 6), seed=seeds)
def test_fix_signs_keeps_the_product(m: int, n: int, k: int, seed: int) -> None:
    U, V = gauss(2, m, k, seed=seed), gauss(2, n, k, seed=seed + 1)
    U1, V1 = linalg.fix_signs(U, V)
    close(U1 @ V1.mT, U @ V.mT, 1e-14)
    canonical(U1)
    flips = torch.where(gauss(k, seed=seed) < 0, -1.0, 1.0).to(F64)
    U2, V2 = linalg.fix_signs(U * flips, V * flips)
    assert torch.equal(U1, U2) and torch.equal(V1, V2)
    assert torch.equal(linalg.canonical_columns(U * flips), U1)


def test_signs_of_zero_columns_and_ties() -> None:
    Q = torch.tensor([[0.0, -1.0, 1.0], [0.0, 1.0, -1.0]])
    assert torch.equal(linalg.canonical_columns(Q), torch.tensor([[0.0, 1.0, 1.0], [0.0, -1.0, -1.0]]))


# -------------------------------------------------------------------------------------------------------------- top_svd


def check_triples(M: Tensor, U: Tensor, S: Tensor, V: Tensor, tol: float) -> None:
    """Orthonormal, canonical, σ exact, and M·V = U·S."""
    k = S.shape[-1]
    scale = max(float(torch.linalg.matrix_norm(M.double(), 2).max()), 1e-300)
    orthonormal(U, max(tol, 4e-6) if M.dtype == torch.float32 else tol)
    orthonormal(V, max(tol, 4e-6) if M.dtype == torch.float32 else tol)
    canonical(U)
    close(S / scale, torch.linalg.svdvals(M.double())[..., :k] / scale, tol)
    close(M @ V / scale, U * S[..., None, :] / scale, tol)
    close(M.mT @ U / scale, V * S[..., None, :] / scale, tol)


@some
@given(m=sides, n=sides, data=st.data(), seed=seeds)
def test_top_svd_small_is_exact(m: int, n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    M = low_rank(m, n, data.draw(st.integers(1, min(m, n))), seed=seed)
    check_triples(M, *linalg.top_svd(M, k), tol=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(160, 200, 1), (200, 160, 8), (150, 400, 30), (260, 150, 70)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_top_svd_exact_by_request(m: int, n: int, k: int, decay: float, dtype: torch.dtype) -> None:
    S = torch.arange(1, min(m, n) + 1, dtype=F64) ** -decay
    M = spectrum(S, m, n).to(dtype)
    # At σ = 1 throughout, every basis is right; at i^-3 float32 squares alone would lose everything below 1e-3.
    check_triples(M, *linalg.top_svd(M, k, oversample=min(m, n)), tol=1e-11 if dtype == F64 else 4e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_top_svd_exact_at_any_scale(scale: float) -> None:
    M = spectrum(torch.arange(1, 151, dtype=F64) ** -1.0, 150, 300).float() * scale
    check_triples(M, *linalg.top_svd(M, 4, oversample=150), tol=4e-6)


@pytest.mark.parametrize(("m", "n"), [(400, 300), (300, 400)])
def test_top_svd_randomised_meets_its_documented_accuracy(m: int, n: int) -> None:
    k = 16
    for decay, energy, worst in [(0.5, 0.99, 0.06), (1.0, 0.9999, 3e-3), (2.0, 1 - 1e-6, 1e-5)]:
        S = torch.arange(1, 301, dtype=F64) ** -decay
        M = spectrum(S, m, n).float()
        U, sigma, V = linalg.top_svd(M, k)
        orthonormal(U, 4e-6)
        orthonormal(V, 4e-6)
        canonical(U)
        close((U.mT @ M @ V), torch.diag(sigma), 4e-6)
        assert float(((S[:k] - sigma) / S[:k]).abs().max()) < worst
        assert bool((sigma.double() <= S[:k] * (1 + 1e-5)).all()), "from below"
        best = float(S[:k].square().sum() / S.square().sum())
        assert energy * best <= float(linalg.captured(U, M)) <= best * (1 + 1e-5)
    wider = linalg.top_svd(M, k, oversample=4)[1]
    assert bool((wider >= sigma * (1 - 1e-5)).all())


def test_top_svd_needs_no_more_than_the_rank() -> None:
    M = low_rank(300, 250, 5, dtype=torch.float32)
    for niter in (0, 2):
        U, S, V = linalg.top_svd(M, 8, niter=niter)
        orthonormal(U, 4e-6)
        orthonormal(V, 4e-6)
        close((U * S) @ V.mT, M, 1e-5)
        assert float(S[5:].max()) < 1e-5 * float(S[0])


@pytest.mark.parametrize("oversample", [2, 400])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (200, 300)])
def test_top_svd_of_zero(m: int, n: int, oversample: int) -> None:
    U, S, V = linalg.top_svd(torch.zeros(2, m, n), 3, oversample=oversample)
    assert torch.equal(S, torch.zeros(2, 3))
    orthonormal(U, 1e-5)
    orthonormal(V, 1e-5)


def test_top_svd_batched_is_looped_and_generators_decide() -> None:
    M = gauss(2, 3, 140, 170, dtype=torch.float32)
    U, S, V = linalg.top_svd(M, 4)
    for i in range(2):
        for j in range(3):
            u, s, v = linalg.top_svd(M[i, j], 4)
            close(U[i, j], u, 1e-3)  # a gap of neighbours of 1e-2 amplifies rounding
            close(S[i, j], s, 1e-5)
            close((U[i, j] * S[i, j]) @ V[i, j].mT, (u * s) @ v.mT, 1e-3)
    one = linalg.top_svd(M, 4, generator=draws.keyed_generator("x"))
    two = linalg.top_svd(M, 4, generator=draws.keyed_generator("x"))
    other = linalg.top_svd(M, 4, generator=draws.keyed_generator("y"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])


def test_top_svd_of_half_precision_and_bad_k() -> None:
    M = gauss(20, 30).bfloat16()
    U, S, V = linalg.top_svd(M, 5)
    assert U.dtype == S.dtype == V.dtype == torch.float32
    check_triples(M.float(), U, S, V, 4e-6)
    for k in (0, 21):
        with pytest.raises(ValueError, match="choose k from 1 to 20"):
            linalg.top_svd(M, k)
    with pytest.raises(torch.linalg.LinAlgError):
        linalg.top_svd(torch.full((5, 5), torch.nan), 2)


# ------------------------------------------------------------------------------------------------------------- products


@some
@given(m=sides, n=sides, R=st.integers(1, 14), seed=seeds)
def test_product_svd_is_the_svd_of_the_product(m: int, n: int, R: int, seed: int) -> None:
    B, A = gauss(m, R, seed=seed), gauss(R, n, seed=seed + 1)
    U, S, V = linalg.product_svd(B, A)
    p = min(m, n, R)
    assert U.shape == (m, p) and S.shape == (p,) and V.shape == (n, p)
    orthonormal(U, 1e-12)
    orthonormal(V, 1e-12)
    canonical(U)
    close(S, torch.linalg.svdvals(B @ A)[:p], 1e-10)
    close((U * S) @ V.mT, B @ A, 1e-10)


def test_product_svd_of_zero_and_deficient_factors() -> None:
    A = gauss(4, 9)
    for B in (torch.zeros(7, 4, dtype=F64), low_rank(7, 4, 2), gauss(7, 1).expand(7, 4)):
        U, S, V = linalg.product_svd(B, A)
        orthonormal(U, 1e-12)
        orthonormal(V, 1e-12)
        close((U * S) @ V.mT, B @ A, 1e-12)
    U, S, V = linalg.product_svd(gauss(3, 7, 4, dtype=torch.float32), gauss(3, 4, 9, dtype=torch.float32))
    assert S.dtype == torch.float32 and S.shape == (3, 4)


@some
@given(m=sides, n=sides, R=st.integers(1, 10), data=st.data(), seed=seeds)
def test_truncate_is_eckart_young(m: int, n: int, R: int, data: st.DataObject, seed: int) -> None:
    r = data.draw(st.integers(1, min(m, n, R)))
    B, A = gauss(m, R, seed=seed), gauss(R, n, seed=seed + 1)
    B_r, A_r, error = linalg.truncate(B, A, r)
    assert B_r.shape == (m, r) and A_r.shape == (r, n) and error.shape == ()
    U, S, Vh = torch.linalg.svd(B @ A)
    close(B_r @ A_r, (U[:, :r] * S[:r]) @ Vh[:r], 1e-7)  # the gap may be small
    close(error, torch.linalg.norm(B @ A - B_r @ A_r) / torch.linalg.norm(B @ A), 1e-10)
    close(B_r.mT @ B_r, A_r @ A_r.mT, 1e-10)
    close(B_r.mT @ B_r, torch.diag(S[:r]), 1e-10)


def test_truncate_of_zero_and_bad_rank() -> None:
    B_r, A_r, error = linalg.truncate(torch.zeros(2, 5, 3), gauss(2, 3, 6, dtype=torch.float32), 2)
    assert not B_r.any() and not A_r.any() and torch.equal(error, torch.zeros(2))
    assert float(linalg.truncate(gauss(5, 3), gauss(3, 6), 3)[2]) == 0
    for r in (0, 4):
        with pytest.raises(ValueError, match="choose r from 1 to 3"):
            linalg.truncate(gauss(5, 3), gauss(3, 6), r)


@some
@given(m=sides, n=sides, R=st.integers(1, 14), seed=seeds)
def test_product_norm(m: int, n: int, R: int, seed: int) -> None:
    B, A = gauss(2, m, R, seed=seed), gauss(2, R, n, seed=seed + 1)
    close(linalg.product_norm(B, A), torch.linalg.matrix_norm(B @ A), 1e-12)


def test_product_norm_of_cancelling_slots() -> None:
    b, a = gauss(50, 3, dtype=torch.float32), gauss(3, 40, dtype=torch.float32)
    norm = linalg.product_norm(torch.cat([b, -b], 1), torch.cat([a, a], 0))
    bound = float(torch.linalg.norm(b) * torch.linalg.norm(a)) * 2 * torch.finfo(torch.float32).eps ** 0.5
    assert 0 <= float(norm) <= bound


# ---------------------------------------------------------------------------------------------------------- PSD algebra


@some
@given(r=sides, data=st.data(), seed=seeds)
def test_psd_functions_are_the_pseudo_inverse(r: int, data: st.DataObject, seed: int) -> None:
    H = psd(r, rank=data.draw(st.integers(0, r)), seed=seed)
    inverse, root = linalg.psd_inverse(H, rel=1e-9), linalg.psd_inv_sqrt(H, rel=1e-9)
    expect = torch.linalg.pinv(H, rtol=1e-9, hermitian=True)
    tol = 1e-6  # of the largest entry: ε times the condition number allowed by rel
    close(inverse, expect, tol)
    close(root @ root, expect, tol)
    close(root, root.mT, 1e-9)


def test_psd_cuts() -> None:
    H = torch.diag(torch.tensor([4.0, 1.0, 1e-3, 1e-9], dtype=F64)).expand(2, 4, 4)
    diagonal = [
        linalg.psd_inverse(H, rel=rel, floor=floor)[1].diagonal() for rel, floor in [(1e-6, 0), (1e-6, 0.5), (0.3, 0)]
    ]
    close(diagonal[0], torch.tensor([0.25, 1, 1e3, 0], dtype=F64), 1e-12)
    close(diagonal[1], torch.tensor([0.25, 1, 0, 0], dtype=F64), 1e-12)
    close(diagonal[2], torch.tensor([0.25, 0, 0, 0], dtype=F64), 1e-12)
    for function in (linalg.psd_inverse, linalg.psd_inv_sqrt):
        assert torch.equal(function(torch.zeros(3, 5, 5)), torch.zeros(3, 5, 5))
        assert torch.isfinite(function(torch.full((1, 1), 1e-42))).all()
        noise = gauss(40, 3, dtype=torch.float32) @ gauss(3, 6, dtype=torch.float32)
        close(function(noise.T @ noise), function((noise.T @ noise).double()), 1e-3)


@some
@given(r=sides, seed=seeds)
def test_sylvester_residual(r: int, seed: int) -> None:
    P, Q, C = psd(r, seed=seed) + 0.1 * torch.eye(r, dtype=F64), psd(r, seed=seed + 1), gauss(r, r, seed=seed + 2)
    X = linalg.sylvester_psd(P, Q, C)
    assert float((P @ X + X @ Q - C).abs().max()) < 1e-12 * max(1.0, float(X.abs().max()))


@some
@given(r=st.integers(1, 6), p=st.integers(0, 6), q=st.integers(0, 6), seed=seeds)
def test_sylvester_is_least_squares_when_singular(r: int, p: int, q: int, seed: int) -> None:
    P, Q, C = psd(r, rank=min(p, r), seed=seed), psd(r, rank=min(q, r), seed=seed + 1), gauss(r, r, seed=seed + 2)
    eye = torch.eye(r, dtype=F64)
    dense = torch.kron(P, eye) + torch.kron(eye, Q)  # row-major vec of P·X + X·Q
    expect = torch.linalg.pinv(dense, rtol=1e-9, hermitian=True) @ C.reshape(-1)
    close(linalg.sylvester_psd(P, Q, C, rel=1e-9), expect.reshape(r, r), 1e-6)


def test_sylvester_of_zero_factors() -> None:
    zero, eye, C = torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3), gauss(2, 3, 3, dtype=torch.float32)
    assert torch.equal(linalg.sylvester_psd(zero, zero, C), zero)
    close(linalg.sylvester_psd(zero, eye, C), C, 1e-6)  # B = 0, the start of plain LoRA
    close(linalg.sylvester_psd(1e-12 * eye, eye / 3, C), 3 * C, 1e-6)


# ---------------------------------------------------------------------------------------------------------------- bases


def check_basis(X: Tensor, tol: float, *, lost: float = 0.0) -> Tensor:
    Q, R, keep = linalg.orthonormal_basis(X)
    live = torch.diag_embed(keep.to(Q.dtype))
    norm = float(torch.linalg.norm(X)) + 1e-30
    close(Q.mT @ Q, live, tol)
    close(Q @ R / norm, X / norm, max(tol, lost))
    assert not (Q * ~keep[..., None, :]).any() and not (R * ~keep[..., :, None]).any()
    return keep.sum(-1)


@some
@given(m=sides, r=sides, data=st.data(), seed=seeds)
def test_orthonormal_basis_of_any_rank(m: int, r: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(0, min(m, r)))
    X = low_rank(m, r, rank, seed=seed)
    kept = int(check_basis(X, 1e-9, lost=1e-3))
    sigma = torch.linalg.svdvals(X / torch.linalg.norm(X, dim=0).clamp_min(1e-300))
    share = sigma / sigma[0].clamp_min(1e-300)
    assert int((share > 1.01e-3).sum()) <= kept <= int((share > 0.99e-3).sum()), "the cut: √rel of ‖X̂‖"


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_orthonormal_basis_of_hard_cases(dtype: torch.dtype) -> None:
    tol = 2e-6 if dtype == torch.float32 else 1e-12
    assert torch.equal(check_basis(torch.zeros(3, 9, 4, dtype=dtype), tol), torch.zeros(3, dtype=torch.int64))
    X = gauss(2, 500, 6, dtype=dtype)
    assert check_basis(X, tol).tolist() == [6, 6]
    assert check_basis(X * torch.logspace(0, -12, 6, dtype=dtype), tol).tolist() == [6, 6], "small slots are not dead"
    assert check_basis(X[..., [0, 1, 1, 2, 2, 2]], tol).tolist() == [3, 3]
    X[:, :, 3] = 0
    assert check_basis(X, tol).tolist() == [5, 5]
    for condition in (1e1, 1e2, 5e2):
        thin = spectrum(torch.logspace(0, -torch.tensor(condition).log10().item(), 8), 300, 8).to(dtype)
        assert int(check_basis(thin, tol)) == 8


# ---------------------------------------------------------------------------------------------------------------- msign


def newton_schulz(X: Tensor, steps: int) -> Tensor:
    """Muon's loop as published, in float64."""
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    for _ in range(steps):
        H = X @ X.mT
        X = 3.4445 * X + (-4.7750 * H + 2.0315 * H @ H) @ X
    return X


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (12, 40), (40, 12), (16, 16)])
def test_msign_is_newton_schulz(m: int, n: int) -> None:
    X = gauss(2, m, n)
    for steps in (0, 1, 5):
        close(linalg.msign(X, steps=steps), newton_schulz(X, steps), 1e-9)
        close(linalg.msign(X.float() * 1e-20, steps=steps), newton_schulz(X, steps), 2e-4)
    assert torch.equal(linalg.msign(torch.zeros(m, n)), torch.zeros(m, n))


def test_msign_band() -> None:
    S = torch.logspace(0, -6, 40, dtype=F64)
    X = spectrum(S, 60, 40).float()
    out = linalg.msign(X).double()
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    values = (U.mT @ out @ Vh.mT).diagonal()
    share = S / torch.linalg.norm(S)
    big = share > 2e-3
    assert float(values[big].min()) >= 0.68 and float(values[big].max()) <= 1.21
    assert bool((values[~big] <= 485 * share[~big] + 1e-3).all())


# --------------------------------------------------------------------------------------------------------------- energy


@some
@given(m=sides, n=sides, data=st.data(), seed=seeds)
def test_captured(m: int, n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, m))
    G, U = gauss(m, n, seed=seed), torch.linalg.qr(gauss(m, k, seed=seed + 1)).Q
    rest = G - U @ (U.mT @ G)
    close(linalg.captured(U, G), 1 - torch.linalg.norm(rest) ** 2 / torch.linalg.norm(G) ** 2, 1e-10)


def test_captured_limits() -> None:
    G = gauss(2, 5, 8)
    close(linalg.captured(torch.eye(5, dtype=F64).expand(2, 5, 5), G), torch.ones(2), 1e-12)
    assert torch.equal(linalg.captured(torch.eye(5)[:, :2], torch.zeros(5, 8)), torch.tensor(0.0))
    U, S, _ = torch.linalg.svd(G[0])
    close(linalg.captured(U[:, :2], G[0]), S[:2].square().sum() / S.square().sum(), 1e-12)


def dense_energy(B: Tensor, A: Tensor, G: Tensor) -> Tensor:
    PB, PA = B @ torch.linalg.pinv(B, rtol=1e-9), torch.linalg.pinv(A, rtol=1e-9) @ A
    step = PB @ G + G @ PA - PB @ G @ PA
    S = torch.linalg.svdvals(G)
    return step.square().sum() / S[: 2 * A.shape[0]].square().sum()


@some
@given(m=sides, n=sides, r=st.integers(1, 6), seed=seeds)
def test_first_step_energy_is_the_dense_formula(m: int, n: int, r: int, seed: int) -> None:
    rank = min(r, m, n, 3)
    B, A, G = low_rank(m, r, rank, seed=seed), low_rank(rank, n, rank, seed=seed + 2), gauss(m, n, seed=seed + 4)
    A = torch.cat([A, A[:1].expand(r - rank, n)])
    energy = linalg.first_step_energy(B, A, G, torch.linalg.svdvals(G))
    expect = dense_energy(B, A, G)
    assert float(energy) <= 1 + 1e-9
    if min(torch.linalg.svdvals(M)[rank - 1] / M.norm() for M in (B, A)) > 0.02:  # away from the cut
        close(energy, expect, 1e-7)


def test_first_step_energy_limits() -> None:
    G = spectrum(torch.tensor([5.0, 4, 3, 2, 1]), 9, 7)
    U, S, Vh = torch.linalg.svd(G)
    best = linalg.first_step_energy(U[:, :2], 3 * Vh[2:4], G, S)  # LoRA-GA: r left and r other right directions
    close(best, torch.tensor(1.0), 1e-12)
    twice = linalg.first_step_energy(U[:, :2], Vh[:2], G, S)
    close(twice, torch.tensor((25 + 16) / (25 + 16 + 9 + 4), dtype=F64), 1e-12)  # the same directions count once
    plain = linalg.first_step_energy(torch.zeros(9, 2, dtype=F64), Vh[:2], G, S)
    close(plain, twice, 1e-12)
    stacked = linalg.first_step_energy(U[None, :, :2], Vh[None, 2:4], G[None], S[None, :4])
    close(stacked, torch.ones(1), 1e-12)
    assert float(linalg.first_step_energy(U[:, :2], Vh[:2], 0 * G, 0 * S)) == 0
    with pytest.raises(ValueError, match="needs 4 of them"):
        linalg.first_step_energy(U[:, :2], Vh[:2], G, S[:3])


# ------------------------------------------------------------------------------------------------------------ batching

BATCHED = {
    "fix_signs": lambda X, Y, H, K: linalg.fix_signs(X, Y.mT),
    "canonical_columns": lambda X, Y, H, K: linalg.canonical_columns(X),
    "product_svd": lambda X, Y, H, K: linalg.product_svd(X, Y),
    "truncate": lambda X, Y, H, K: linalg.truncate(X, Y, 2),
    "product_norm": lambda X, Y, H, K: linalg.product_norm(X, Y),
    "psd_inverse": lambda X, Y, H, K: linalg.psd_inverse(H),
    "psd_inv_sqrt": lambda X, Y, H, K: linalg.psd_inv_sqrt(H),
    "sylvester_psd": lambda X, Y, H, K: linalg.sylvester_psd(H, K, H @ K),
    "sylvester_spectral": lambda X, Y, H, K: linalg.sylvester_spectral(
        *torch.linalg.eigh(H), *torch.linalg.eigh(K), H @ K
    ),
    "gram": lambda X, Y, H, K: linalg.gram(X),
    "grams": lambda X, Y, H, K: linalg.grams([X]),
    "orthonormal_basis": lambda X, Y, H, K: linalg.orthonormal_basis(X),
    "msign": lambda X, Y, H, K: linalg.msign(Y),
    "msign_each": lambda X, Y, H, K: linalg.msign_each([Y])[0],
    "captured": lambda X, Y, H, K: linalg.captured(linalg.orthonormal_basis(X)[0], X @ Y),
    "first_step_energy": lambda X, Y, H, K: linalg.first_step_energy(X, Y, X @ Y, torch.linalg.svdvals(X @ Y)),
    "top_svd": lambda X, Y, H, K: linalg.top_svd(X @ Y, 2),
}


@pytest.mark.parametrize("name", sorted(BATCHED))
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_batched_is_looped(name: str, dtype: torch.dtype) -> None:
    X, Y = gauss(2, 3, 11, 4, dtype=dtype), gauss(2, 3, 4, 9, dtype=dtype)
    X[1, 1] = 0
    H, K = X.mT @ X, Y @ Y.mT
    inputs = (X, Y, H, K)
    copies = [x.clone() for x in inputs]
    whole = BATCHED[name](*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True)), "an argument was written to"
    whole = whole if isinstance(whole, tuple) else (whole,)
    for i in range(2):
        for j in range(3):
            one = BATCHED[name](*(x[i, j] for x in inputs))
            for a, b in zip(whole, one if isinstance(one, tuple) else (one,), strict=True):
                assert a.dtype in (dtype, torch.bool)
                close(a[i, j].to(F64), b.to(F64), 1e-10 if dtype == F64 else 2e-4)


@pytest.mark.parametrize("d", [2 * linalg.CHUNK, 2 * linalg.CHUNK + 77, 5 * linalg.CHUNK - 1])
def test_a_gram_matrix_is_the_sum_over_its_pieces(d: int) -> None:
    """Which a GPU forms; of factors that lie by rows and by columns, and of parts of wider tensors."""
    wide = gauss(4, d, 5)
    for X in (wide, wide.mT.contiguous().mT, wide[1:3], gauss(3, d, 9)[..., 2:6]):
        found = linalg._gram_of_chunks(X.float())
        assert found.dtype == F64
        close(found, linalg.gram(X.float().double()), 1e-13)
    close(linalg.grams([wide, wide[:1]])[4:], linalg.gram(wide)[:1], 1e-14)


def test_the_batching_table_is_complete() -> None:
    public = {n for n, f in vars(linalg).items() if callable(f) and getattr(f, "__module__", "") == linalg.__name__}
    assert {n for n in public if not n.startswith(("_", "keyed_")) and n != "orthonormal"} == set(BATCHED)


# ------------------------------------------------------------------------------------------------------- keyed scores


def test_scores_are_keyed_by_name_and_source() -> None:
    names = [f"layers.{k}.q_proj" for k in range(500)]
    x = draws.keyed_scores(names, 16, draws.keyed_generator(0, "test", 7))
    assert x.shape == (500, 16) and x.dtype == torch.int64 and len(x.unique()) == x.numel()
    assert torch.equal(x[[3, 1]], draws.keyed_scores([names[3], names[1]], 16, draws.keyed_generator(0, "test", 7)))
    assert torch.equal(x[:, :8], draws.keyed_scores(names, 8, draws.keyed_generator(0, "test", 7)))
    assert not (x == draws.keyed_scores(names, 16, draws.keyed_generator(0, "test", 8))).any()


def test_scores_are_uniform() -> None:
    x = draws.keyed_scores([str(k) for k in range(4000)], 16, draws.keyed_generator(1))
    bits = torch.stack([(x >> k & 1).double().mean() for k in range(64)])
    assert ((bits - 0.5).abs() < 4.5 * 0.5 / x.numel() ** 0.5).all()
    best = torch.bincount(x.argmax(1), minlength=16) / len(x)
    assert ((best - 1 / 16).abs() < 4 * (1 / 16 / len(x)) ** 0.5).all()
    pairs = torch.zeros(16, 16).index_put_(tuple(x.topk(2).indices.T), torch.tensor(1.0), accumulate=True)
    off = pairs[~torch.eye(16, dtype=torch.bool)] / len(x)
    assert ((off - 1 / 240).abs() < 4.5 * (1 / 240 / len(x)) ** 0.5).all() and not pairs.diagonal().any()


def test_scores_do_not_change_between_versions() -> None:
    assert draws.keyed_scores(["w"], 2, draws.keyed_generator(0)).tolist() == [
        [-5503400895872217994, -4171897812286752712]
    ]
