"""Eigenvectors of many symmetric matrices at once, where torch takes them one by one.

`torch.linalg.eigh` on CUDA has a batched routine for sides up to 32; above that every matrix is a call of its own
(pytorch issue 175585; 420 of side 32 take 0.4 ms on an H200, of side 34 274 ms), and a step of a method that decomposes
the r × r sides of some hundred pairs takes as long. Here blocks are taken in pairs, all pairs of all matrices in one
call of that routine:

    P = S[IJ, IJ] = V·diag·Vᵀ,   S ← VᵀSV,   E ← E·V     I, J: blocks of at most 16 indices, p pairs side by side
Then the blocks but the first move round by one place: after 2p − 1 times every two have met, which is a sweep.
Source:  Golub & Van Loan, "Matrix Computations", 4th edition, 8.5.4 (parallel ordering) and 8.5.6 (block Jacobi).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BATCHED = 32
"""Sides up to which CUDA's own routine takes all matrices at once."""
LARGE = 256
"""Sides above which the sweeps are too long."""
SWEEPS = 12
"""At most; 4 to 5 are usual at side 64, 7 at 128, 9 at 256."""


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """λ (..., r) ascending, E (..., r, r) with H·E = E·diag λ, of symmetric H (..., r, r).

    torch's, but `jacobi` for several float32 matrices of a side in (BATCHED, LARGE] on CUDA. Errors:
    torch.linalg.LinAlgError where H holds NaN or infinity.
    """
    r = H.shape[-1]
    if H.is_cuda and H.dtype == torch.float32 and BATCHED < r <= LARGE and H.numel() > r * r:
        return jacobi(H)
    lam, E = torch.linalg.eigh(H)
    return lam, E


def jacobi(H: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` of float32 H by sweeps over pairs of blocks, in float64: residual and orthogonality within float32's ε.

    λ is the diagonal of EᵀHE, formed anew. Errors: torch.linalg.LinAlgError where H holds NaN or infinity. Cost: 12·r³
    FLOPs a matrix and sweep beside the pairs'; one look at the device a sweep and a call.
    """
    r = H.shape[-1]
    whole = H.reshape(-1, r, r).double()
    size = whole.abs().amax((1, 2))[:, None, None]
    if not torch.isfinite(size).all():
        raise torch.linalg.LinAlgError("linalg.eigh: a matrix holds NaN or infinity")
    whole = torch.where(size > 0, whole / size, whole)
    norm = whole.flatten(1).norm(dim=1)
    done = torch.finfo(torch.float32).eps * norm
    pairs = -(-r // BATCHED)
    block = -(-r // (2 * pairs))
    more = 2 * pairs * block - r
    whole = pad(whole, (0, more, 0, more))
    # the indices that are added stand by themselves and come last: no eigenvalue is above the norm
    whole.diagonal(dim1=1, dim2=2)[:, r:] = 1.5 * norm.clamp_min(1)[:, None]
    Q = _swept(whole, pairs, block, done)
    lam, order = ((Q @ whole) * Q).sum(2).sort(dim=1)
    E = Q.gather(1, order[:, :, None].expand_as(Q))[:, :r, :r].mT
    return (lam[:, :r] * size[..., 0]).to(H.dtype).reshape(H.shape[:-1]), E.to(H.dtype).reshape(H.shape)


def _swept(S: Tensor, pairs: int, block: int, done: Tensor) -> Tensor:
    """Eᵀ (n, r, r), after sweeps until the norm of what EᵀSE has beside its diagonal is `done` (n,) at most."""
    Q = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    order = _round(pairs, block, S.device)
    for _ in range(SWEEPS):
        for _ in range(max(1, 2 * pairs - 1)):
            P = S.unflatten(2, (pairs, -1)).unflatten(1, (pairs, -1)).diagonal(dim1=1, dim2=3)
            V = _near_identity(P.movedim(3, 1)).mT
            S = _rows(V, _rows(V, S, order).mT, order)  # its transpose, and it is symmetric
            Q = _rows(V, Q, order)
        rest = (S - torch.diag_embed(S.diagonal(dim1=1, dim2=2))).flatten(1).norm(dim=1)
        if bool((rest <= done).all()):
            break
    return Q


def _near_identity(P: Tensor) -> Tensor:
    """Eigenvectors of P as columns, the one of the k-th largest eigenvalue where P's diagonal has its k-th largest:
    torch's own order moves the blocks, and some would never meet."""
    place = P.diagonal(dim1=-2, dim2=-1).argsort(-1).argsort(-1)
    return torch.linalg.eigh(P)[1].gather(-1, place[..., None, :].expand_as(P))


def _rows(V: Tensor, X: Tensor, order: Tensor) -> Tensor:
    """VᵀX of X (n, r, r) and the pairs' Vᵀ (n, p, 2b, 2b), the rows then in their next order."""
    return (V @ X.unflatten(1, (V.shape[1], -1))).flatten(1, 2).index_select(1, order)


def _round(pairs: int, block: int, device: torch.device) -> Tensor:
    """Which index comes to each place: block 0 rests, the others go round the ring 1, 3, 5 … 4, 2 by one."""
    ring = [*range(1, 2 * pairs, 2), *range(2 * pairs - 2, 0, -2)]
    comes = list(range(2 * pairs))
    for there, here in zip(ring, [ring[-1], *ring[:-1]], strict=True):
        comes[there] = here
    return torch.tensor([block * b + i for b in comes for i in range(block)], device=device)
