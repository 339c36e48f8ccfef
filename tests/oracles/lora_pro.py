"""LoRA-Pro in float64, straight from arXiv 2407.18242: one pair, pseudo-inverses, dense projectors, complex eig."""

from __future__ import annotations

import torch
from torch import Tensor


def projectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """P_B (d_out, d_out) and P_A (d_in, d_in)."""
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def closest(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """g̃ of eq. 6: P_B·G + G·P_A − P_B·G·P_A."""
    P_B, P_A = projectors(A, B)
    return P_B @ G + G @ P_A - P_B @ G @ P_A


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """P·X + X·Q = C as one linear system."""
    eye_p, eye_q = torch.eye(P.shape[0], dtype=P.dtype), torch.eye(Q.shape[0], dtype=Q.dtype)
    system = torch.kron(P, eye_q) + torch.kron(eye_p, Q.T.contiguous())
    return torch.linalg.lstsq(system, C.reshape(-1, 1), driver="gelsd").solution.reshape(C.shape)


def sylvester_published(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """The same as the authors solve it, by complex eigendecompositions."""
    L, U = torch.linalg.eig(P)
    S, V = torch.linalg.eig(-Q)
    F = torch.linalg.solve(U, (C + 0j) @ V)
    return (U @ (F / (L[:, None] - S[None, :])) @ torch.linalg.inv(V)).real


def published(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, damping: float = 1e-8) -> tuple[Tensor, Tensor]:
    """(a, b) of eq. 5 and 7 as the authors' code computes them, the projector as a dense (d_out, d_out) matrix."""
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    iA, iB = torch.linalg.pinv(A @ A.T + damping * eye), torch.linalg.pinv(B.T @ B + damping * eye)
    X = sylvester_published(B.T @ B, A @ A.T, -(1 / s**2) * iB @ gA @ A.T)
    a = (1 / s**2) * iB @ gA + X @ A
    rest = torch.eye(B.shape[0], dtype=B.dtype) - B @ iB @ B.T
    return a, (1 / s**2) * (rest @ gB @ iA) - B @ X


def adjusted(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, train: str = "AB") -> tuple[Tensor, Tensor]:
    """(a, b) from pseudo-inverses, any rank; the side that is frozen comes as zeros."""
    iA, iB = torch.linalg.pinv(A @ A.T), torch.linalg.pinv(B.T @ B)
    if train == "A":
        return iB @ gA / s**2, torch.zeros_like(B)
    if train == "B":
        return torch.zeros_like(A), gB @ iA / s**2
    X = sylvester(B.T @ B, A @ A.T, -iB @ gA @ A.T / s**2)
    rest = torch.eye(B.shape[0], dtype=B.dtype) - B @ iB @ B.T
    return iB @ gA / s**2 + X @ A, rest @ gB @ iA / s**2 - B @ X


class FactorAdam:
    """Adam on (a, b)."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr, self.betas, self.eps, self.t = lr, betas, eps, 0
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []

    def step(self, gs: tuple[Tensor, ...]) -> list[Tensor]:
        self.t += 1
        if not self.m:
            self.m, self.v = [torch.zeros_like(g) for g in gs], [torch.zeros_like(g) for g in gs]
        made = []
        for i, g in enumerate(gs):
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g**2
            m = self.m[i] / (1 - self.betas[0] ** self.t)
            v = self.v[i] / (1 - self.betas[1] ** self.t)
            made.append(-self.lr * m / (v.sqrt() + self.eps))
        return made


class FullAdam:
    """The paper's Adam: moments of g̃, then (5) and (7) on what it wants of W."""

    def __init__(self, lr: float) -> None:
        self.lr, self.adam = lr, FactorAdam(-1.0)

    def step(self, A: Tensor, B: Tensor, G: Tensor, s: float, train: str = "AB") -> tuple[Tensor, Tensor]:
        P_B, P_A = projectors(A, B)
        wanted = {"AB": closest(A, B, G), "A": P_B @ G, "B": G @ P_A}[train]
        (u,) = self.adam.step((wanted,))
        a, b = adjusted(A, B, s * B.T @ u, s * u @ A.T, s, train)
        return -self.lr * a, -self.lr * b
