"""The gradient of a layer from thin products: G = Σ δᵀ·x is never formed.

First pass, `Stream`: a rank-k product Q·Zᵀ of the running sum, recompressed at every increment. With M = Q·Zᵀ + δᵀ·x

    P = Mᵀ·Q = Z + xᵀ(δQ)      Q' = orth(M·P) = orth(Q(ZᵀP) + δᵀ(xP))      Z' = Mᵀ·Q' = Z(QᵀQ') + xᵀ(δQ')

that is one and a half power iterations on the sum so far, in six thin products. Further passes, `Side`: half a power
iteration each, on the exact sum, from the right basis first:  Y = G·P,  then  Z = Gᵀ·orth(Y),  and so on.

Cost:    6·T·k·(d_out + d_in) FLOPs per micro-batch of T tokens (`Side`: 2·T·k·(d_out + d_in)), state k·(d_out + d_in).
Quality: of the k leading directions, estimated from below by the last value s_K of the sketch after p passes

    q = 1 − Σ_{i≤k} s_i²·(s_K/s_i)^{2p} / Σ_{i≤k} s_i²

so that the exact directions hold at most (1 − q)·Σ_{i≤k} s_i² more. The first pass also gathers E = ‖G·Ω‖²/16 with 16
random probes Ω, an estimate of ‖G‖²: a share of it is what exactness could add.

Measured on real SmolLM2 gradients against the exact singular vectors (records/, benchmarks/bench_evidence.py).
Source:  subspace iteration: Halko, Martinsson, Tropp, arXiv 0909.4061, §4.5; recompressing a running sum is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from loralign.evidence.ranks import from_rank_0, gather_columns, sum_ranks, world
from loralign.maths.draws import keyed_normal
from loralign.maths.linalg import fix_signs, product_svd
from loralign.types import Site

Spectrum = tuple[Tensor, Tensor]
"""Eigenvalues, ascending, and eigenvectors."""


def across(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ·b over tokens: a (T, m), b (T, k) -> (m, k), fp32 (float64 stays)."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return torch.mm(a.T, b)


def along(a: Tensor, P: Tensor) -> Tensor:
    """a·P: a (T, m), P (m, k) -> (T, k) in a's dtype."""
    return torch.mm(a, P.to(a.dtype))


def matched(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """δ and x in one dtype: δ's on the GPU, at least fp32 elsewhere (where half-precision sums are rounded)."""
    if delta.is_cuda or delta.dtype == torch.float64:
        return delta, x.to(delta.dtype)
    return delta.float(), x.float()


class Draws:
    """Random N(0, 1) matrices of a collection, keyed by purpose and shape: sites of one shape share them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, what: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) on like's device, fp32 (float64 where `like` is)."""
        real = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (what, rows, columns, like.device, real)
        if key not in self._made:
            self._made[key] = keyed_normal((rows, columns), self.seed, what, rows).to(like.device, real)
        return self._made[key]


def orthonormal(Y: Tensor, rounds: int = 2) -> Tensor:
    """An orthonormal basis (m, k) that spans the columns of Y (m, k); columns without content become 0 on the GPU.

    CPU: Householder QR. GPU: Cholesky-QR in float64, since Householder on many thin matrices would cost more than the
    pass itself. After one round directions below 1e-7 of the first are shortened, after two they are unit vectors too.
    """
    if not Y.is_cuda:
        Q: Tensor = torch.linalg.qr(Y).Q
        return Q
    Q = Y.double()
    for _ in range(rounds):
        H = Q.T @ Q
        H.diagonal().add_(1e-14 * H.trace() + 1e-200)
        R = torch.linalg.cholesky_ex(H, upper=True).L
        Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    return Q.to(Y.dtype)


def _columns(X: Tensor, S: Tensor) -> Tensor:
    """X (m, k), columns nearly orthogonal and of norms S (k,) -> orthonormal columns, same directions."""
    if X.is_cuda and float(S[-1]) > 1e-6 * float(S[0]):
        return orthonormal(X)
    on_cpu = X.cpu()
    Q = torch.linalg.qr(on_cpu).Q
    return (Q * torch.where((Q * on_cpu).sum(0) < 0, -1.0, 1.0)).to(X)


def triples(Y: Tensor, P: Tensor, k: int, spectrum: Spectrum | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of Y·Pᵀ: Y (m, K), P (n, K) orthonormal -> U (m, k), S (K,) on the CPU, V (n, k).

    YᵀY = E·S²·Eᵀ in float64 (values down to 1e-8 of the first), V = P·E, U = orth(Y·E).
    spectrum: of YᵀY, where it is known already.
    """
    values, E = spectrum or torch.linalg.eigh(square(Y))
    S, E = values.flip(-1).clamp_min(0).sqrt().to(Y.dtype), E.flip(-1).to(Y)[:, :k]
    return _columns(Y @ E, S[:k]), S, P @ E


def square(Y: Tensor) -> Tensor:
    """YᵀY (K, K) in float64, on the CPU."""
    Y = Y.double()
    return (Y.T @ Y).cpu()


def spectra(sketches: Sequence[Stream | Side]) -> list[Spectrum]:
    """Of every sketch's square: small eigenproblems for one core each, so several at a time."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(torch.linalg.eigh, [square(a.wide) for a in sketches]))


class Staging:
    """One page-locked host buffer, as large as the largest matrix, through which the GPU's matrices reach the host."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, G: Tensor) -> Tensor:
        """G on the host; valid until the next call."""
        if not G.is_cuda:
            return G
        if self._buffer.numel() < G.numel() or self._buffer.dtype != G.dtype:
            self._buffer = torch.empty(G.numel(), dtype=G.dtype, pin_memory=True)
        held = self._buffer[: G.numel()].view_as(G)
        held.copy_(G)
        return held


class Dense:
    """G itself, summed on the CPU in fp32."""

    def __init__(self, site: Site, staging: Staging) -> None:
        self.G, self.staging = torch.zeros(site.d_out, site.d_in), staging

    def add(self, delta: Tensor, x: Tensor) -> None:
        G = self.staging(across(*matched(delta, x)))
        self.G = self.G.to(G.dtype).add_(G)

    def reduce(self) -> None:
        self.G = sum_ranks(self.G)

    def tensors(self) -> list[Tensor]:
        return [self.G]


class Stream:
    """The first pass: Ĝ = Q·Zᵀ of rank k, Q (d_out, k) orthonormal, Z (d_in, k), and G·Ω (d_out, 16)."""

    probes = 16

    def __init__(self, site: Site, k: int, draws: Draws) -> None:
        self.site, self.k, self.draws = site, k, draws
        self.Q: Tensor | None = None
        self.Z = self.probe = torch.zeros(0)

    def add(self, delta: Tensor, x: Tensor) -> None:
        d, x = matched(delta, x)
        omega = self.draws("norm", self.site.d_in, self.probes, d)
        if self.Q is None:
            self.Q = self.draws("sketch", self.site.d_out, self.k, d)
            self.Z = omega.new_zeros(self.site.d_in, self.k)
            self.probe = omega.new_zeros(self.site.d_out, self.probes)
        Q, Z = self.Q, self.Z
        P = Z + across(x, along(d, Q))
        P = P / P.norm().clamp_min(torch.finfo(P.dtype).tiny)  # products of small gradients would underflow
        seen = across(d, along(x, torch.cat([P, omega], dim=1)))
        self.Q = orthonormal(Q @ (Z.T @ P) + seen[:, : self.k], rounds=1)
        self.Z = Z @ (Q.T @ self.Q) + across(x, along(d, self.Q))
        self.probe += seen[:, self.k :]

    def energy(self) -> float:
        """An estimate of ‖G‖², relative standard deviation at most √(2/16)."""
        return float(self.probe.square().sum()) / self.probes

    def reduce(self) -> None:
        """Σ over ranks of Q·Zᵀ, compressed to rank k again."""
        if self.Q is None:  # an expert that no token of this rank reached
            self.Q, self.Z = torch.zeros(self.site.d_out, self.k), torch.zeros(self.site.d_in, self.k)
            self.probe = torch.zeros(self.site.d_out, self.probes)
        if world() == 1:
            return
        self.probe = sum_ranks(self.probe)
        U, S, V = product_svd(gather_columns(self.Q), gather_columns(self.Z).T)
        self.Q = from_rank_0(U[:, : self.k].to(self.Q))
        self.Z = from_rank_0((V * S)[:, : self.k].to(self.Z))

    def tensors(self) -> list[Tensor]:
        return [self.Z] if self.Q is None else [self.Q, self.Z, self.probe]

    @property
    def wide(self) -> Tensor:
        """The factor that is not orthonormal."""
        return self.Z

    def found(self, k: int, spectrum: Spectrum | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, V: k triples and all values."""
        assert self.Q is not None
        V, S, U = triples(self.Z, self.Q, k, spectrum)
        U, V = fix_signs(U, V)
        return U, S, V

    def next(self) -> Side:
        return Side(self.site, from_rank_0(orthonormal(self.Z)), left=True)


class Side:
    """A further pass: the exact products of G with a basis. left: Y = G·P (d_out, k), else Z = Gᵀ·Q (d_in, k)."""

    def __init__(self, site: Site, basis: Tensor, *, left: bool) -> None:
        self.site, self.basis, self.left = site, basis, left
        self.sum = basis.new_zeros(site.d_out if left else site.d_in, basis.shape[1])

    def add(self, delta: Tensor, x: Tensor) -> None:
        d, x = matched(delta, x)
        if not self.left:
            d, x = x, d
        if self.basis.device != d.device:
            self.basis, self.sum = self.basis.to(d.device), self.sum.to(d.device)
        self.sum += across(d, along(x, self.basis))

    def reduce(self) -> None:
        self.sum = sum_ranks(self.sum)

    def tensors(self) -> list[Tensor]:
        return [self.basis, self.sum]

    @property
    def wide(self) -> Tensor:
        return self.sum

    def found(self, k: int, spectrum: Spectrum | None = None) -> tuple[Tensor, Tensor, Tensor]:
        own, S, other = triples(self.sum, self.basis, k, spectrum)
        U, V = fix_signs(own, other) if self.left else fix_signs(other, own)
        return U, S, V

    def next(self) -> Side:
        return Side(self.site, from_rank_0(orthonormal(self.sum)), left=not self.left)


class Shares:
    """Held-out measurement: how much of another gradient G lies in span U (left) and span V (right).

    ‖UᵀG‖² + ‖(I − UUᵀ)·G·V‖² over ‖UᵀG‖² + ‖(I − UUᵀ)·G‖², the latter norm from 64 random probes.
    """

    probes = 64

    def __init__(self, site: Site, U: Tensor, V: Tensor, draws: Draws) -> None:
        self.site, self.U, self.V, self.draws = site, U, V, draws
        self.left = U.new_zeros(site.d_in, U.shape[1])  # GᵀU
        self.right = V.new_zeros(site.d_out, V.shape[1] + self.probes)  # G·[V | ω]

    def add(self, delta: Tensor, x: Tensor) -> None:
        d, x = matched(delta, x)
        omega = self.draws("held out", self.site.d_in, self.probes, d)
        if self.U.device != d.device or self.left.device != d.device:
            self.U, self.V, self.left, self.right = (t.to(d.device) for t in (self.U, self.V, self.left, self.right))
        self.left = self.left + across(x, along(d, self.U))
        self.right = self.right + across(d, along(x, torch.cat([self.V.to(omega), omega], dim=1)))

    def reduce(self) -> None:
        self.left, self.right = sum_ranks(self.left), sum_ranks(self.right)

    def tensors(self) -> list[Tensor]:
        return [self.left, self.right]

    def share(self) -> float | None:
        """None for G = 0."""
        U = self.U.to(self.right)
        rest = self.right - U @ (U.T @ self.right)
        inside, right = self.left.square().sum(), rest[:, : -self.probes].square().sum()
        total = inside + rest[:, -self.probes :].square().sum() / self.probes
        return min(1.0, float((inside + right) / total)) if float(total) > 0 else None


Accumulator = Dense | Stream | Side | Shares


def estimated_quality(S: Tensor, k: int, passes: int) -> float:
    """The estimate of the module docstring for the first k of the sketch's values S (K,), descending; 1 for S = 0."""
    energy = S[:k].double().square()
    if not float(energy.sum()) > 0:
        return 1.0
    lost = energy * (S[-1].double() / S[:k].double().clamp_min(torch.finfo(torch.float64).tiny)).pow(2 * passes)
    return float(1 - lost.clamp_max(energy).sum() / energy.sum())
