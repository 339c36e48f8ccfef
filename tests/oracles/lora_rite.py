"""LoRA-RITE in float64, straight from arXiv 2410.20625: one pair, QR or polar bases, loops over the two sides."""

from __future__ import annotations

import torch
from torch import Tensor

EYE = torch.eye


def qr(X: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.linalg.qr(X))  # type: ignore[return-value]


def polar(X: Tensor) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh, Vh.T @ torch.diag(S) @ Vh


class Rite:
    """State and step of one pair; every matrix of the paper, in its order. factor: "A" or "B" is what moves."""

    def __init__(
        self,
        lr: float,
        basis=qr,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        escape: bool = True,
        train: str = "AB",
    ) -> None:
        self.lr, self.basis, self.betas, self.eps, self.escape, self.train = lr, basis, betas, eps, escape, train
        self.t = 0
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.rho = {"A": 0.0, "B": 0.0}

    def gradients(self, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """factor -> (ḡ, Q, R⁺), upright."""
        found = {}
        for factor, g, X in (("A", gA.T, B), ("B", gB, A.T)):
            if factor in self.train:
                Q, R = self.basis(X)
                found[factor] = (g @ torch.linalg.pinv(R), Q, torch.linalg.pinv(R))
        return found

    def norm(self, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor) -> float:
        """Σ‖ḡ‖² of this pair."""
        return float(sum(g.square().sum() for g, _, _ in self.gradients(A, B, gA, gB).values()))

    def step(self, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(dA, dB); scale: what the global clip leaves of ḡ."""
        self.t += 1
        beta1, beta2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        out = {"A": torch.zeros_like(A), "B": torch.zeros_like(B)}
        for factor, (g, Q, R_inv) in self.gradients(A, B, gA, gB).items():
            g = scale * g
            r = g.shape[1]
            old = self.kept.get(factor, {"M": torch.zeros_like(g), "V": torch.zeros(r, r).double(), "Q": Q})
            P = Q.T @ old["Q"]
            V = P @ old["V"] @ P.T
            drop = (torch.linalg.eigvalsh(old["V"]) - torch.linalg.eigvalsh(V)).max().clamp_min(0)
            lost = torch.minimum(drop, (old["V"].trace() - V.trace()).clamp_min(0))
            self.rho[factor] = beta2 * (self.rho[factor] + float(lost)) if self.escape else 0.0
            V = beta2 * V + (1 - beta2) * g.T @ g / g.shape[0]
            lam, E = torch.linalg.eigh(V)
            S = g @ E @ torch.diag(1 / ((lam.clamp_min(0) + self.rho[factor]).sqrt() + self.eps)) @ E.T
            M = beta1 * old["M"] @ P.T + (1 - beta1) * S
            self.kept[factor] = {"M": M, "V": V, "Q": Q}
            move = -self.lr * M @ R_inv.T
            out[factor] = move.T if factor == "A" else move
        return out["A"], out["B"]
