"""Eigenvectors of many small symmetric matrices at once, where torch takes them one by one.

`torch.linalg.eigh` on CUDA has a batched routine for sides up to 32; above that every matrix is a call of its own
(pytorch issue 175585: 128 of side 32 take 1.7 ms, of side 64 229 ms), and a step of a method that decomposes the r × r
sides of some hundred pairs takes seconds. Here all are rotated together.

    S ← JᵀSJ,  E ← E·J     J: rotations of the planes (i, j), j = i + r/2, i = 1 … r/2, that annul S_ij
    τ = (S_jj − S_ii)/(2·S_ij),  t = sign τ/(|τ| + √(1 + τ²)),  c = 1/√(1 + t²),  s = t·c
Then the indices but the first move round by one place: after r − 1 times every pair has met, which is a sweep.
Source:  Golub & Van Loan, "Matrix Computations", 4th edition, 8.5.2 (symmetric Schur) and 8.5.4 (parallel ordering).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BATCHED = 32
"""Sides up to which CUDA's own routine takes all matrices at once."""
LARGE = 256
"""Sides above which rotations of r/2 planes at a time are too many."""
SWEEPS = 16
"""At most; 6 to 9 are usual."""


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """λ (..., r) ascending, E (..., r, r) with H·E = E·diag λ, of symmetric H (..., r, r).

    torch's, but `jacobi` for several matrices of a side in (BATCHED, LARGE] on CUDA. Errors:
    torch.linalg.LinAlgError where H holds NaN or infinity.
    """
    r = H.shape[-1]
    if H.is_cuda and BATCHED < r <= LARGE and H.numel() > r * r:
        return jacobi(H)
    lam, E = torch.linalg.eigh(H)
    return lam, E


class Turn(NamedTuple):
    """After a rotation, what comes to each place (r,): the index itself, and the other one of its pair."""

    own: Tensor
    other: Tensor


def jacobi(H: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` by cyclic rotations; residual and orthogonality of a few ε·‖H‖, as LAPACK's.

    Rotations leave rounding behind, so λ is the diagonal of EᵀHE, formed anew. An odd side gets one more index, which
    stands by itself and comes last. Errors: torch.linalg.LinAlgError where H holds NaN or infinity. Cost: 9·r³ FLOPs a
    matrix and sweep; one look at the device a sweep.
    """
    r = H.shape[-1]
    whole = H.reshape(-1, r, r)
    size = whole.abs().amax((1, 2))[:, None, None]
    if not torch.isfinite(size).all():
        raise torch.linalg.LinAlgError("linalg.eigh: a matrix holds NaN or infinity")
    whole = torch.where(size > 0, whole / size, whole)
    done = (4 * torch.finfo(H.dtype).eps) ** 2 * whole.square().sum((1, 2))
    if r % 2:
        whole = pad(whole, (0, 1, 0, 1))
        whole[:, r, r] = 2 * r  # no eigenvalue is above r
    exact = whole.double() if H.is_cuda else whole  # float32 may mean TF32 there
    one = torch.eye(whole.shape[-1], dtype=exact.dtype, device=H.device)
    Q = _rotated(whole, one.to(H.dtype).expand_as(whole), done).to(exact.dtype)
    Q = Q @ (1.5 * one - 0.5 * (Q.mT @ Q))  # a step towards orthogonal
    lam, order = (Q.mT @ exact @ Q).diagonal(dim1=1, dim2=2).sort(dim=1)
    E = Q.gather(2, order[:, None, :].expand_as(Q)).to(H.dtype)[:, :r, :r]
    return (lam.to(H.dtype)[:, :r] * size[..., 0]).reshape(H.shape[:-1]), E.reshape(H.shape)


def _rotated(S: Tensor, E: Tensor, done: Tensor) -> Tensor:
    """E·J·J…, sweeps until the squares beside the diagonal of S sum to `done` (n,) at most."""
    turn = _turn(S.shape[-1], S.device)
    for _ in range(SWEEPS):
        for _ in range(S.shape[-1] - 1):
            c, s = (x.index_select(1, turn.own) for x in _rotation(S))
            E = _columns(E, c, s, turn)
            S = _columns(_columns(S, c, s, turn).mT, c, s, turn)  # its transpose, and it is symmetric
        rest = (S - torch.diag_embed(S.diagonal(dim1=1, dim2=2))).square().sum((1, 2))
        if bool((rest <= done).all()):
            break
    return E


def _turn(r: int, device: torch.device) -> Turn:
    """Index 0 rests; the others go round the ring 1 … r/2 − 1, r − 1 … r/2 by one."""
    h = r // 2
    ring = [*range(1, h), *range(r - 1, h - 1, -1)]
    own = list(range(r))
    for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
        own[there] = here
    return Turn(*(torch.tensor(places, device=device) for places in (own, [(k + h) % r for k in own])))


def _rotation(S: Tensor) -> tuple[Tensor, Tensor]:
    """c and ±s (n, r) of every column: column k becomes c_k·column k + s_k·the other one of its pair."""
    h = S.shape[-1] // 2
    diagonal, off = S.diagonal(dim1=1, dim2=2), S.diagonal(offset=h, dim1=1, dim2=2)
    tau = (diagonal[:, h:] - diagonal[:, :h]) / (2 * off)
    t = torch.where(off == 0, 0.0, torch.copysign(1 / (tau.abs() + (1 + tau * tau).sqrt()), tau))
    c = (1 + t * t).rsqrt()
    s = t * c
    return torch.cat([c, c], 1), torch.cat([-s, s], 1)


def _columns(X: Tensor, c: Tensor, s: Tensor, turn: Turn) -> Tensor:
    own = X.index_select(2, turn.own) * c[:, None, :]
    return own.addcmul_(X.index_select(2, turn.other), s[:, None, :])
