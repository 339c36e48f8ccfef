"""Pure batched maths on factors and gradients, and every random draw of the project.

Precision: everything here runs in float32, or in float64 if an argument is float64; results come in that dtype and the
caller casts back. Call it outside autocast. Products follow the caller's TF32 setting, decompositions do not.
Batches:   any leading dims, written `...`; all arguments of one call have the same. Nothing branches on values, except
           that `eigh` and `svd` raise torch.linalg.LinAlgError where an input holds NaN or infinity.
Cuts:      a Gram matrix in float32 knows singular values down to about 1e-3 of the largest. Directions whose *Gram
           eigenvalue* is at most `rel` times the largest are dead: they come back as zeros, so zero input gives zero.
"""

from __future__ import annotations

from hashlib import blake2b
from operator import index

import torch
from torch import Tensor

SVD_BELOW = 128
"""Matrices with a side up to this go to LAPACK's SVD: about a millisecond, and exact."""


def _work(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of this file."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def _inverse(x: Tensor, live: Tensor) -> Tensor:
    """1/x where live, else 0; finite in both."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(live & (x > tiny), x.clamp_min(tiny).reciprocal(), torch.zeros_like(x))


# --------------------------------------------------------------------------------------------------------------- draws


def keyed_generator(*key: int | str) -> torch.Generator:
    """CPU generator seeded by the 64-bit blake2b hash of the key, for instance (seed, purpose, step, module name).

    The same on every machine, rank and Python version. torch's CPU engine keeps 32 bits of a seed: of a million keys
    about a hundred pairs draw the same numbers. Errors: TypeError where a part is neither an integer nor a string.
    """
    parts = tuple(part if isinstance(part, str) else int(index(part)) for part in key)
    digest = blake2b(ascii(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def keyed_normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Independent N(0, 1) of that shape, float32, CPU."""
    return torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32)


def keyed_uniform(shape: tuple[int, ...], bound: float, *key: int | str) -> Tensor:
    """Independent U(−bound, bound) of that shape, float32, CPU."""
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=keyed_generator(*key))


def haar(rows: int, cols: int, *key: int | str) -> Tensor:
    """(rows, cols), uniform on the matrices with orthonormal rows (rows ≤ cols) or columns (rows > cols); float32, CPU.

    X = Q R of a Gaussian X; Q·sign(diag R) is Haar. Cost: O(max·min²).
    """
    Q, R = torch.linalg.qr(keyed_normal((max(rows, cols), min(rows, cols)), *key))
    Q = Q * _signs(R.diagonal())
    return Q if rows > cols else Q.T.contiguous()


# --------------------------------------------------------------------------------------------------------------- signs


def _signs(x: Tensor) -> Tensor:
    """±1, and +1 for 0."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _leading_signs(Q: Tensor) -> Tensor:
    """Q (..., m, k) -> (..., 1, k): sign of the entry with the largest |value| of every column, the first of equals."""
    return _signs(Q.gather(-2, Q.abs().argmax(-2, keepdim=True)))


def fix_signs(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (..., m, k), V (..., n, k) -> the same pairs with the largest-|entry| of every u_i positive; U·D·Vᵀ stays."""
    signs = _leading_signs(U)
    return U * signs, V * signs


def canonical_columns(Q: Tensor) -> Tensor:
    """Q (..., m, k) -> each column by itself flipped so that its largest-|entry| is positive; U·D·Vᵀ does not stay."""
    return Q * _leading_signs(Q)


# ------------------------------------------------------------------------------------------------------ singular values


def _range(M: Tensor, q: int, niter: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal Q (..., m, q) near the span of the top q left singular vectors of M (..., m, n), m ≤ n.

    Q = qr(M·Ω), then niter times Q = qr(M·qr(Mᵀ·Q)) (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4).
    For 2q ≥ m the start is the eigenvectors of M·Mᵀ instead, which costs no more, and one pass mends their rounding.
    """
    m, n = M.shape[-2:]
    if 2 * q >= m:
        X = M / M.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
        Q = torch.linalg.eigh(X @ X.mT).eigenvectors[..., -q:]
        niter = max(niter, 1)
    else:
        source = generator or keyed_generator("top_svd", n, q)
        omega = torch.randn(n, q, generator=source, device=source.device, dtype=torch.float32)
        Q = torch.linalg.qr(M @ omega.to(M)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    return Q


def top_svd(
    M: Tensor, k: int, *, oversample: int = 2, niter: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triples: M (..., m, n) -> U (..., m, k), S (..., k) descending, V (..., n, k).

        Q = range of M from q = oversample·k columns;  QᵀM = P·S·Vᵀ;  U = Q·P

    U and V are orthonormal also where M has rank below k, with signs by `fix_signs`. Without a generator the test
    matrix is a fixed one per shape; a batch shares it.
    Accuracy: exact to rounding for min(m, n) ≤ 128 or 2q ≥ min(m, n); oversample = min(m, n) therefore means exact.
        Else randomised, S from below. 1024², k = 32, defaults: captured energy / worst error of S / left overlap are
        {ACCURACY}
        Vectors of a flat spectrum are not found by any cheap method, their energy is.
    Cost: 2(2·niter + 2)·m·n·q FLOPs and 2·niter + 2 QRs; exact: an `eigh` of the smaller side.
    Errors: ValueError unless 1 ≤ k ≤ min(m, n).
    """
    (M,) = _work(M)
    m, n = M.shape[-2:]
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k={k} singular triples of a {m}×{n} matrix: choose k from 1 to {min(m, n)}")
    wide = M if m <= n else M.mT
    if min(m, n) <= SVD_BELOW:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        V = Vh.mT
    else:
        Q = _range(wide, min(oversample * k, m, n), niter, generator)
        Z, R = torch.linalg.qr(wide.mT @ Q)  # QᵀM = RᵀZᵀ
        P, S, Ph = torch.linalg.svd(R.mT)
        U, V = Q @ P, Z @ Ph.mT
    U, V = U[..., :k], V[..., :k]
    U, V = fix_signs(U, V) if m <= n else fix_signs(V, U)
    return U, S[..., :k], V


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B·A without forming it: B (..., m, R), A (..., R, n) -> U (..., m, R'), S (..., R'), V (..., n, R').

        B = Q_b·R_b,  Aᵀ = Q_a·R_a,  R_b·R_aᵀ = P·S·Wᵀ,  U = Q_b·P,  V = Q_a·W,  R' = min(R, m, n)

    Exact to rounding (of σ_1 and of ‖B‖‖A‖), orthonormal also where B or A is zero, signs by `fix_signs`.
    Cost: O((m + n)·R² + R³); less than forming B·A.
    """
    B, A = _work(B, A)
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    P, S, Wh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    U, V = fix_signs(Qb @ P, Qa @ Wh.mT)
    return U, S, V


def truncate(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r factors of B·A, balanced: B (..., m, R), A (..., R, n) -> B_r (..., m, r), A_r (..., r, n), error (...).

        B_r = U_r·S_r^½,  A_r = S_r^½·V_rᵀ,  B_rᵀB_r = A_rA_rᵀ = S_r,  error = √(Σ_{i>r} σ_i² / Σ σ_i²)

    The error is ‖BA − B_rA_r‖ / ‖BA‖, and 0 for BA = 0. Cost: `product_svd`.
    Errors: ValueError unless 1 ≤ r ≤ min(R, m, n).
    """
    U, S, V = product_svd(B, A)
    if not 1 <= r <= S.shape[-1]:
        raise ValueError(f"rank {r} of a product that has {S.shape[-1]} singular values: choose r from 1 to that")
    root = S[..., None, :r].sqrt()
    total = torch.linalg.vector_norm(S, dim=-1)
    error = torch.linalg.vector_norm(S[..., r:], dim=-1) * _inverse(total, total > 0)
    return U[..., :r] * root, (V[..., :r] * root).mT, error


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """‖B·A‖_F = √⟨BᵀB, AAᵀ⟩: B (..., m, R), A (..., R, n) -> (...).

    Cost: O((m + n)·R²). Where the slots cancel, the absolute error is √ε·‖B‖‖A‖; `product_svd` has ε.
    """
    B, A = _work(B, A)
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0).sqrt()


# --------------------------------------------------------------------------------------------- symmetric PSD, r×r algebra


def _eigh_live(H: Tensor, rel: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """H (..., r, r) -> eigenvalues descending (..., r), eigenvectors (..., r, r), live (..., r)."""
    lam, E = torch.linalg.eigh(H)
    lam, E = lam.flip(-1), E.flip(-1)
    return lam, E, lam > (rel * lam[..., :1]).clamp_min(floor)


def psd_inverse(H: Tensor, *, rel: float = 1e-6, floor: float = 0.0) -> Tensor:
    """Pseudo-inverse of a symmetric PSD H (..., r, r): E·diag(1/λ where λ > max(rel·λ_1, floor), else 0)·Eᵀ.

    floor: absolute, in units of H. Reads the lower triangle. Relative error ε·λ_1/λ_live. Cost: one `eigh`.
    """
    (H,) = _work(H)
    lam, E, live = _eigh_live(H, rel, floor)
    return (E * _inverse(lam, live)[..., None, :]) @ E.mT


def psd_inv_sqrt(H: Tensor, *, rel: float = 1e-6, floor: float = 0.0) -> Tensor:
    """H^(−½) of a symmetric PSD H (..., r, r), dead directions 0; as `psd_inverse`."""
    (H,) = _work(H)
    lam, E, live = _eigh_live(H, rel, floor)
    return (E * _inverse(lam, live).sqrt()[..., None, :]) @ E.mT


def sylvester_psd(P: Tensor, Q: Tensor, C: Tensor, *, rel: float = 1e-6) -> Tensor:
    """X (..., r, r) with P·X + X·Q = C for symmetric PSD P, Q (..., r, r).

        P = U·Λ·Uᵀ,  Q = V·Σ·Vᵀ,  X = U·[(UᵀCV)_ij / (λ_i + σ_j)]·Vᵀ

    Entries with λ_i + σ_j ≤ rel·(λ_1 + σ_1) are 0: for a C within reach this is the solution of least norm.
    Cost: one batched `eigh` of 2r×r×r and four r×r products.
    """
    P, Q, C = _work(P, Q, C)
    lam, E = torch.linalg.eigh(torch.stack([P, Q]))
    sums = lam[0].clamp_min(0)[..., :, None] + lam[1].clamp_min(0)[..., None, :]
    weight = _inverse(sums, sums > rel * sums[..., -1:, -1:])
    U, V = E[0], E[1]
    return U @ ((U.mT @ C @ V) * weight) @ V.mT


# ------------------------------------------------------------------------------------------------------ thin r×d bases


def _unit_columns(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X (..., m, r) -> X·D⁻¹ with columns of norm 1 or 0, D and D⁻¹ (..., r), both 0 for a zero column.

    Equal columns make the Gram matrix as well conditioned as scaling can: a slot is not dead because it is small.
    """
    norm = torch.linalg.vector_norm(X, dim=-2)
    inverse = _inverse(norm, norm > 0)
    return X * inverse[..., None, :], norm * (inverse > 0), inverse


def _chol_qr(X: Tensor, dead: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X (..., m, r) -> Q, R upper with X = Q·R; columns marked dead (..., r) must be 0 and stay 0; NaN on failure."""
    H = X.mT @ X
    H = H if dead is None else H + torch.diag_embed(dead.to(H.dtype))
    L, info = torch.linalg.cholesky_ex(H)
    L = torch.where((info == 0)[..., None, None], L, torch.nan)
    return torch.linalg.solve_triangular(L.mT, X, upper=True, left=False), L.mT


def chol_qr2(X: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky-QR, twice: X (..., m, r) of full column rank -> Q (..., m, r), R (..., r, r) upper, diag R > 0, X = Q·R.

        R₁ᵀR₁ = XᵀX,  Q₁ = X·R₁⁻¹,  R₂ᵀR₂ = Q₁ᵀQ₁,  Q = Q₁·R₂⁻¹,  R = R₂·R₁        (after scaling the columns to 1)

    Orthonormal to rounding for condition numbers up to 1e3 (float32; float64 1e7). All of Q and R is NaN where
    Cholesky fails, for instance for a zero column: use `orthonormal_basis` there. Cost: 8·m·r² FLOPs, no `eigh`.
    """
    (X,) = _work(X)
    X, D, _ = _unit_columns(X)
    Q, R1 = _chol_qr(X)
    Q, R2 = _chol_qr(Q)
    return Q, R2 @ R1 * D[..., None, :]


def orthonormal_basis(X: Tensor, *, rel: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Thin factorisation of any X (..., m, r): Q (..., m, r), R (..., r, r), keep (..., r) bool with X = Q·R.

        X = X̂·D,  X̂ᵀX̂ = E·Λ·Eᵀ,  Q₁ = X̂·E·Λ^(−½),  Q₁ᵀQ₁ = L·Lᵀ,  Q = Q₁·L⁻ᵀ,  R = Lᵀ·Λ^½·Eᵀ·D

    QᵀQ = diag(keep) to rounding: dead columns of Q and rows of R are 0 and come last; what X has there, at most √rel
    of a column, is lost. R is not triangular. Safe for X = 0, m < r and equal columns.
    Cost: 8·m·r² FLOPs, one `eigh` and one Cholesky of r×r. `basis_inverse(R)` is R⁺.
    """
    (X,) = _work(X)
    X, D, _ = _unit_columns(X)
    lam, E, keep = _eigh_live(X.mT @ X, rel, 0.0)
    root = lam.clamp_min(0).sqrt() * keep
    Q, R2 = _chol_qr(X @ (E * _inverse(root, keep)[..., None, :]), ~keep)
    R1 = root[..., :, None] * E.mT * D[..., None, :]
    return Q, R2 @ R1, keep


def basis_inverse(R: Tensor) -> Tensor:
    """R⁺ (..., r, r) for the R of `orthonormal_basis`: R·R⁺ = diag(keep) and X·R⁺ = Q.

        R = N·R̂·D,  R⁺ = D⁻¹·R̂ᵀ·(R̂R̂ᵀ)⁻¹·N⁻¹        (R̂R̂ᵀ is near the identity: no condition number is squared)

    Cost: one Cholesky of r×r.
    """
    (R,) = _work(R)
    R, _, D_inv = _unit_columns(R)
    Rt, _, N_inv = _unit_columns(R.mT)
    L, _ = torch.linalg.cholesky_ex(Rt.mT @ Rt + torch.diag_embed((N_inv == 0).to(Rt.dtype)))
    return D_inv[..., :, None] * torch.cholesky_solve(Rt.mT, L).mT * N_inv[..., None, :]


def polar(X: Tensor, *, rel: float = 1e-6) -> Tensor:
    """Orthogonal polar factor of X (..., m, n): U·Vᵀ over the live singular triples, by the smaller Gram matrix.

        Q = X·(XᵀX)^(−½)  (m ≥ n; else (XXᵀ)^(−½)·X),  then twice  Q ← ½·Q·(3I − QᵀQ)  against rounding

    Cost: 10·m·n·min(m, n) FLOPs and one `eigh` of the smaller side.
    """
    (X,) = _work(X)
    T = X if X.shape[-2] >= X.shape[-1] else X.mT
    T = T / T.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(T.dtype).tiny)
    T = T @ psd_inv_sqrt(T.mT @ T, rel=rel)
    for _ in range(2):
        T = 1.5 * T - 0.5 * T @ (T.mT @ T)
    return T if X.shape[-2] >= X.shape[-1] else T.mT


def msign(X: Tensor, *, steps: int = 5) -> Tensor:
    """Approximate `polar` without a decomposition: Newton–Schulz as in Muon (Jordan, 2024). X (..., m, n) -> (..., m, n).

        X ← X/‖X‖_F,  then  X ← a·X + (b·XXᵀ + c·(XXᵀ)²)·X,   a, b, c = 3.4445, −4.7750, 2.0315

    After 5 steps singular values above {MSIGN_FLOOR} of ‖X‖_F lie in {MSIGN_BAND}; smaller ones are raised about
    485-fold, zero stays zero. Cost: steps·(4·m·n·k + 2k³) FLOPs, k = min(m, n).
    """
    (X,) = _work(X)
    T = X if X.shape[-2] <= X.shape[-1] else X.mT
    T = T / torch.linalg.matrix_norm(T, keepdim=True).clamp_min(torch.finfo(T.dtype).tiny)
    for _ in range(steps):
        H = T @ T.mT
        T = 3.4445 * T + (-4.7750 * H + 2.0315 * H @ H) @ T
    return T if X.shape[-2] <= X.shape[-1] else T.mT


# -------------------------------------------------------------------------------------------------------------- energy


def captured(U: Tensor, G: Tensor) -> Tensor:
    """Share of ‖G‖² in the span of orthonormal columns: ‖UᵀG‖² / ‖G‖², U (..., m, k), G (..., m, n) -> (...); 0 for G = 0.

    For right directions pass (V, G.mT). Cost: 2·m·n·k FLOPs.
    """
    U, G = _work(U, G)
    G = G / G.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    total = G.square().sum((-2, -1))
    return (U.mT @ G).square().sum((-2, -1)) * _inverse(total, total > 0)


def first_step_energy(B: Tensor, A: Tensor, G: Tensor, S: Tensor) -> Tensor:
    """How much of the best rank-2r step the first step of (B, A) can take: (...) in [0, 1], 0 for G = 0.

        ‖P_B·G + G·P_A − P_B·G·P_A‖² / Σ_{i≤2r} σ_i²,   P_B = B(BᵀB)⁺Bᵀ,   P_A = Aᵀ(AAᵀ)⁺A

    B (..., m, r), A (..., r, n), G (..., m, n); S (..., p): singular values of G, descending, p ≥ min(2r, m, n).
    The two terms are not added: the same directions on both sides count once. Cost: 4·m·n·r FLOPs, no m×n temporary.
    Errors: ValueError where S is too short.
    """
    B, A, G, S = _work(B, A, G, S)
    need = min(2 * A.shape[-2], *G.shape[-2:])
    if S.shape[-1] < need:
        raise ValueError(f"{S.shape[-1]} singular values of G: the best step of rank {need} needs the first {need}")
    Qb, Qa = orthonormal_basis(B)[0], orthonormal_basis(A.mT)[0]
    scale = _inverse(S[..., 0], S[..., 0] > 0)[..., None, None]
    left, right = Qb.mT @ G * scale, G @ Qa * scale
    rest = right - Qb @ (left @ Qa)  # (I − P_B)·G·Q_A
    best = (S[..., :need] * scale[..., 0]).square().sum(-1)
    return (left.square().sum((-2, -1)) + rest.square().sum((-2, -1))) * _inverse(best, best > 0)
