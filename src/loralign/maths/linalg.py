"""Pure batched maths on factors and gradients.

Precision: float32, or float64 if an argument is float64; results come in that dtype, the caller casts back. Call it
           outside autocast. Under TF32, Gram matrices stay exact and other products are as coarse as the caller chose.
Batches:   any leading dims, written `...`, the same for all arguments of a call. Nothing branches on values, except
           that `eigh` and `svd` raise torch.linalg.LinAlgError where an input holds NaN or infinity.
Cuts:      a Gram matrix in float32 knows singular values down to 1e-3 of the largest. Directions whose *eigenvalue* is
           at most `rel` of the largest are dead: they come back as zeros, so zero input gives zero, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loralign.maths.draws import keyed_generator
from loralign.maths.jacobi import eigh

CHUNK = 256
"""Rows that one block of a GPU multiplies."""


def _work(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of this file."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def gram(X: Tensor) -> Tensor:
    """XᵀX (..., r, r); formed in float64 on CUDA, where float32 may mean TF32."""
    return _gram(X).to(X.dtype)


def grams(Xs: Sequence[Tensor]) -> Tensor:
    """Of stacks X (n, d, r) of one rank, below one another."""
    return torch.cat([_gram(X) for X in Xs]).to(Xs[0].dtype)


def _gram(X: Tensor) -> Tensor:
    """In the dtype in which it is formed."""
    if X.is_cuda and X.dim() == 3 and X.shape[1] >= 2 * CHUNK:
        return _gram_of_chunks(X)
    Y = X.double() if X.is_cuda else X
    return torch.bmm(Y.mT, Y) if Y.dim() == 3 else Y.mT @ Y


def _gram_of_chunks(X: Tensor) -> Tensor:
    """XᵀX of X (n, d, r) in float64 as the sum over pieces of d, which a GPU works on side by side: a product (r, r) by
    itself runs along d alone."""
    upright = X.stride(-1) == 1 or X.stride(-2) != 1  # else the rows of Xᵀ lie in one piece each
    Z = X if upright else X.mT
    axis = 1 if upright else 2
    whole = X.shape[1] // CHUNK * CHUNK
    body = Z.narrow(axis, 0, whole).unflatten(axis, (-1, CHUNK)).movedim(axis, 1)
    parts = body.to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)
    H = (torch.bmm(parts.mT, parts) if upright else torch.bmm(parts, parts.mT)).unflatten(0, body.shape[:2]).sum(1)
    if whole < X.shape[1]:
        rest = X[:, whole:].double()
        H = H + torch.bmm(rest.mT, rest)
    return H


def _scaled(X: Tensor) -> Tensor:
    """X / max|X|, so that squares neither overflow nor vanish; 0 stays 0."""
    return X / X.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)


def _inverse(x: Tensor, live: Tensor | bool = True) -> Tensor:
    """1/x where live and positive, else 0; always finite."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(live & (x > tiny), x.clamp_min(tiny).reciprocal(), 0.0)


def fix_signs(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (..., m, k), V (..., n, k) -> pairs flipped together, u_i's (first) largest-|entry| positive; U·S·Vᵀ stays."""
    signs = torch.where(U.gather(-2, U.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, V * signs


def canonical_columns(Q: Tensor) -> Tensor:
    """Q (..., m, k) -> each column by itself flipped so that its (first) largest-|entry| is positive."""
    return fix_signs(Q, Q)[0]


def _range(M: Tensor, k: int, oversample: int, niter: int, generator: torch.Generator | None) -> Tensor:
    """Q (..., m, q) = qr(M·Ω), then niter times Q = qr(M·qr(Mᵀ·Q)), q = oversample·k (arXiv 0909.4061, alg. 4.4)."""
    m, n = M.shape[-2:]
    if 2 * oversample * k >= m:  # start from 2k eigenvectors of MMᵀ; one iteration mends the rounding of squares
        Q, niter = torch.linalg.eigh(gram(_scaled(M).mT)).eigenvectors[..., -2 * k :], 1
    else:
        source = generator or keyed_generator("top_svd", n, oversample * k)
        omega = torch.randn(n, oversample * k, generator=source, device=source.device, dtype=torch.float32)
        Q = torch.linalg.qr(M @ omega.to(M)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    return Q


def top_svd(
    M: Tensor, k: int, *, oversample: int = 2, niter: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triples: M (..., m, n) -> U (..., m, k), S (..., k) descending, V (..., n, k).

        Q = range of M by q = oversample·k columns,  QᵀM = P·S·Vᵀ,  U = Q·P
    U, V are orthonormal also where rank M < k; signs by `fix_signs`. Without a generator Ω is fixed per shape. Exact to
    rounding where min(m, n) ≤ 128 or q ≥ min(m, n)/2; so oversample=min(m, n) asks for it. Else S is from below: at
    1024², k = 32, defaults, the share of the best energy, worst error of S and left overlap are
        0.999, 1.6 %, 0.99 for σ_i = i^-½ · 1.000, 0.06 %, 0.9999 for 1/i · 0.89, 7 %, 0.22 for a flat 2 → 1
    Cost: 4(niter + 1)·m·n·q FLOPs, 2·niter + 2 thin QRs. Errors: ValueError unless 1 ≤ k ≤ min(m, n).
    """
    (M,) = _work(M)
    short = min(M.shape[-2:])
    if not 1 <= k <= short:
        raise ValueError(f"k={k} singular triples of a {tuple(M.shape[-2:])} matrix: choose k from 1 to {short}")
    wide = M if M.shape[-2] == short else M.mT
    if short <= max(128, 4 * k):
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        V = Vh.mT
    else:
        Q = _range(wide, k, oversample, niter, generator)
        Z, R = torch.linalg.qr(wide.mT @ Q)  # QᵀM = RᵀZᵀ
        P, S, Vh = torch.linalg.svd(R.mT)
        U, V = Q @ P, Z @ Vh.mT
    U, V = (U, V) if wide is M else (V, U)
    U, V = fix_signs(U[..., :k], V[..., :k])
    return U, S[..., :k], V


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B·A without forming it: B (..., m, R), A (..., R, n) -> U (..., m, R'), S (..., R'), V (..., n, R').

        B = Q_b·R_b,  Aᵀ = Q_a·R_a,  R_b·R_aᵀ = P·S·Wᵀ,  U = Q_b·P,  V = Q_a·W,  R' = min(R, m, n)
    Exact to rounding (of ‖B‖‖A‖), orthonormal also where BA = 0; signs by `fix_signs`. Cost: O((m + n)·R² + R³).
    """
    B, A = _work(B, A)
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    P, S, Wh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    U, V = fix_signs(Qb @ P, Qa @ Wh.mT)
    return U, S, V


def truncate(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r factors of B·A: B (..., m, R), A (..., R, n) -> B_r (..., m, r), A_r (..., r, n), rel_error (...).

        B_r = U_r·S_r^½,  A_r = S_r^½·V_rᵀ  (balanced: B_rᵀB_r = A_rA_rᵀ),  rel_error = √(Σ_{i>r} σ_i² / Σ σ_i²)
    rel_error = ‖BA − B_rA_r‖/‖BA‖, 0 for BA = 0. Cost: `product_svd`. Errors: ValueError unless 1 ≤ r ≤ min(R, m, n).
    """
    U, S, V = product_svd(B, A)
    if not 1 <= r <= S.shape[-1]:
        raise ValueError(f"rank {r} of a product with {S.shape[-1]} singular values: choose r from 1 to {S.shape[-1]}")
    root = S[..., None, :r].sqrt()
    error = torch.linalg.vector_norm(S[..., r:], dim=-1) * _inverse(torch.linalg.vector_norm(S, dim=-1))
    return U[..., :r] * root, (V[..., :r] * root).mT, error


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """‖B·A‖_F = √⟨BᵀB, AAᵀ⟩: B (..., m, R), A (..., R, n) -> (...); error √ε·‖B‖‖A‖ where slots cancel."""
    B, A = _work(B, A)
    return (gram(B) * gram(A.mT)).sum((-2, -1)).clamp_min(0).sqrt()


def psd_inv_sqrt(H: Tensor, *, rel: float = 1e-6, floor: float = 0.0) -> Tensor:
    """H^(−½) of a symmetric PSD H (..., r, r): E·diag(λ^(−½) if λ > max(rel·λ_1, floor) else 0)·Eᵀ, error ε·λ_1/λ."""
    (H,) = _work(H)
    lam, E = eigh(H)
    live = lam > (rel * lam[..., -1:]).clamp_min(floor)
    return E * _inverse(lam, live).sqrt()[..., None, :] @ E.mT


def psd_inverse(H: Tensor, *, rel: float = 1e-6, floor: float = 0.0) -> Tensor:
    """Pseudo-inverse of a symmetric PSD H (..., r, r), 0 in dead directions; cut, error and cost as `psd_inv_sqrt`."""
    half = psd_inv_sqrt(H, rel=rel, floor=floor)
    return half @ half


def sylvester_psd(P: Tensor, Q: Tensor, C: Tensor, *, rel: float = 1e-6) -> Tensor:
    """X (..., r, r) with P·X + X·Q = C for symmetric PSD P, Q (..., r, r).

        P = U·Λ·Uᵀ,  Q = V·Σ·Vᵀ,  X = U·[(UᵀCV)_ij / (λ_i + σ_j), or 0 where that sum is ≤ rel·(λ_1 + σ_1)]·Vᵀ
    Where C is out of reach this is the least-squares solution of least norm. Cost: one batched `eigh`, four products.
    """
    P, Q, C = _work(P, Q, C)
    lam, (U, V) = eigh(torch.stack([P, Q]))
    return sylvester_spectral(lam[0], U, lam[1], V, C, rel=rel)


def sylvester_spectral(lam: Tensor, U: Tensor, sigma: Tensor, V: Tensor, C: Tensor, *, rel: float = 1e-6) -> Tensor:
    """`sylvester_psd` from the eigenvalues (..., r), ascending, and eigenvectors (..., r, r) of P and of Q."""
    sums = lam.clamp_min(0)[..., :, None] + sigma.clamp_min(0)[..., None, :]
    return U @ (U.mT @ C @ V * _inverse(sums, sums > rel * sums[..., -1:, -1:])) @ V.mT


def _unit_diagonal(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gram H (..., r, r) = D·Ĥ·D -> Ĥ with diagonal 1 (or 0), D, D⁻¹ (..., r): a slot is not dead for being small."""
    D = H.diagonal(dim1=-2, dim2=-1).sqrt()
    D_inv = _inverse(D)
    return H * D_inv[..., :, None] * D_inv[..., None, :], D, D_inv


def _cholesky(H: Tensor) -> tuple[Tensor, Tensor]:
    """H = RᵀR -> R upper, R⁻¹ (..., r, r); NaN where H is not positive definite."""
    R, info = torch.linalg.cholesky_ex(H, upper=True)
    R = torch.where((info == 0)[..., None, None], R, torch.nan)
    return R, torch.linalg.solve_triangular(R, torch.diag_embed(torch.ones_like(R[..., 0])), upper=True)


def orthonormal_basis(X: Tensor, *, rel: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Thin factorisation of any X (..., m, r): Q (..., m, r), R (..., r, r), keep (..., r) bool with X = Q·R.

        X = X̂·D,  X̂ᵀX̂ = E·Λ·Eᵀ,  Q₁ = X̂·E·Λ^(−½),  R₂ᵀR₂ = Q₁ᵀQ₁,  Q = Q₁·R₂⁻¹,  R = R₂·Λ^½·Eᵀ·D
    QᵀQ = diag(keep) to rounding. Dead columns of Q and rows of R are 0; what X has there, at most √rel of ‖X̂‖, is lost.
    Safe for X = 0, r > m, equal columns. R is not triangular. Cost: 8·m·r² FLOPs, one `eigh`, one Cholesky.
    """
    (X,) = _work(X)
    H, D, D_inv = _unit_diagonal(gram(X))
    lam, E = eigh(H)
    keep = lam > (rel * lam[..., -1:]).clamp_min(0)
    root = lam.clamp_min(0).sqrt() * keep
    Q = X @ (D_inv[..., :, None] * E * _inverse(root, keep)[..., None, :])
    R2, R2_inv = _cholesky(gram(Q) + torch.diag_embed((~keep).to(Q.dtype)))
    return Q @ R2_inv, R2 @ (root[..., :, None] * E.mT * D[..., None, :]), keep


def msign(X: Tensor, *, steps: int = 5) -> Tensor:
    """Orthogonal polar factor U·Vᵀ of X = U·S·Vᵀ, roughly: Newton–Schulz with Muon's coefficients. X (..., m, n).

        H = XᵀX/‖X‖²,  T = I/‖X‖,  `steps` times  F = a·I + b·H + c·H²,  T ← T·F,  H ← F·H·F;   result X·T
    a, b, c = 3.4445, −4.7750, 2.0315. After 5 steps a singular value above 0.002·‖X‖_F lies in [0.68, 1.21]; smaller
    ones σ come as up to 485·σ/‖X‖_F. Cost: 4·m·n·k + 8·steps·k³ FLOPs, k = min(m, n).
    """
    return msign_each([X], steps=steps)[0]


def msign_each(Xs: Sequence[Tensor], *, steps: int = 5) -> list[Tensor]:
    """`msign` of tensors whose smaller sides are equal, the iteration once for all: each (n, rows, columns)."""
    upright = [_scaled(*_work(X if X.shape[-2] >= X.shape[-1] else X.mT)) for X in Xs]
    grams = [gram(X) for X in upright]
    H = torch.cat(grams)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    total = H.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1)  # below 1 only for X = 0
    H, T = H / total, eye / total.sqrt()
    for _ in range(steps):
        F = 3.4445 * eye - 4.7750 * H + 2.0315 * H @ H
        T, H = T @ F, F @ H @ F
    signs = [X @ part for X, part in zip(upright, T.split([len(g) for g in grams]), strict=True)]
    return [S if X.shape[-2] >= X.shape[-1] else S.mT for X, S in zip(Xs, signs, strict=True)]


def captured(U: Tensor, G: Tensor) -> Tensor:
    """‖UᵀG‖²/‖G‖²: share of G (..., m, n) in the span of orthonormal U (..., m, k) -> (...); 0 for G = 0."""
    U, G = _work(U, G)
    return (U.mT @ G).square().sum((-2, -1)) * _inverse(G.square().sum((-2, -1)))


def first_step_energy(B: Tensor, A: Tensor, G: Tensor, S: Tensor) -> Tensor:
    """Energy of the first step of (B, A) over that of the best step of rank 2r: (...) in [0, 1]; 0 for G = 0.

        ‖P_B·G + G·P_A − P_B·G·P_A‖² / Σ_{i≤2r} σ_i²,   P_B = B(BᵀB)⁺Bᵀ,   P_A = Aᵀ(AAᵀ)⁺A
    B (..., m, r), A (..., r, n), G (..., m, n), S (..., p ≥ min(2r, m, n)): singular values of G, descending. The same
    direction on both sides counts once. Cost: 4·m·n·r FLOPs. Errors: ValueError where S is too short.
    """
    B, A, G, S = _work(B, A, G, S)
    need = min(2 * A.shape[-2], *G.shape[-2:])
    if S.shape[-1] < need:
        raise ValueError(f"{S.shape[-1]} singular values of G: the best step of rank {need} needs {need} of them")
    Qb, Qa = orthonormal_basis(B)[0], orthonormal_basis(A.mT)[0]
    left, right = Qb.mT @ G, G @ Qa
    rest = right - Qb @ (left @ Qa)  # (I − P_B)·G·Q_A
    energy = left.square().sum((-2, -1)) + rest.square().sum((-2, -1))
    return energy * _inverse(S[..., :need].square().sum(-1))
