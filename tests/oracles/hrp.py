"""HRP in float64 on the layer whose loss is ½‖s·B·A − M‖², M = W* − W0 (inputs X = I): slow, dense, obvious."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows(A: Tensor) -> Tensor:
    """Projector on the row space of A (r, n), any full-rank A."""
    A = A.double()
    return A.T @ torch.linalg.inv(A @ A.T) @ A


def columns(B: Tensor) -> Tensor:
    return rows(B.T)


def limit_loss(M: Tensor, A: Tensor) -> float:
    """Of the run that trains B beside a frozen A: ½‖M(I − P_A)‖²."""
    return float(0.5 * (M - M @ rows(A)).square().sum())


def right(X: Tensor, r: int) -> Tensor:
    """The r leading right singular vectors of X as rows (r, n)."""
    return torch.linalg.svd(X.double(), full_matrices=False).Vh[:r]


def train_B(M: Tensor, A_h: Tensor, r: int) -> Tensor:
    """V_rᵀ after a preheat of B beside the frozen A_h: the product is c·M·P_h, whatever the number of steps."""
    return right(M @ rows(A_h), r)


def train_A(M: Tensor, B_h: Tensor, r: int) -> Tensor:
    """V_rᵀ after a preheat of A beside the frozen B_h."""
    return right(columns(B_h) @ M, r)


def two_pass(M: Tensor, A_h: Tensor, r: int) -> Tensor:
    """V_rᵀ of the sketch that starts from the rows of A_h: the space of M·A_hᵀ on the left, then its rows of M."""
    return train_A(M, M @ A_h.double().T, r)


def descended_B(M: Tensor, A: Tensor, s: float, eta: float, steps: int) -> Tensor:
    """B after k steps of gradient descent from 0, A·Aᵀ = I: (1 − (1 − ηs²)^k)/s · M·Aᵀ."""
    return (1 - (1 - eta * s**2) ** steps) / s * M @ A.T


def adam_B(M: Tensor, A: Tensor, s: float, peak: float, steps: int) -> Tensor:
    """B after Adam's steps from 0: gradient clipped to norm 1, rate growing to `peak` over the first tenth of them."""
    B = torch.zeros(M.shape[0], A.shape[0], dtype=torch.float64)
    m, v, warm_up = torch.zeros_like(B), torch.zeros_like(B), max(1, round(steps / 10))
    for t in range(1, steps + 1):
        g = gradients(A, B, M, s)[1]
        g = g * min(1.0, 1 / float(g.norm()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        B = B - peak * min(1.0, t / warm_up) * step
    return B


def gradients(A: Tensor, B: Tensor, M: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of ½‖s·B·A − M‖² with respect to A and B."""
    E = s * B @ A - M
    return s * B.T @ E, s * E @ A.T


def flow(A: Tensor, B: Tensor, M: Tensor, time: float, dt: float) -> tuple[Tensor, Tensor]:
    """Gradient flow of both factors (s = 1) by Runge-Kutta of order four."""
    n = math.ceil(time / dt)
    h = time / n

    def slope(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        gA, gB = gradients(A, B, M)
        return -gA, -gB

    for _ in range(n):
        a1, b1 = slope(A, B)
        a2, b2 = slope(A + h / 2 * a1, B + h / 2 * b1)
        a3, b3 = slope(A + h / 2 * a2, B + h / 2 * b2)
        a4, b4 = slope(A + h * a3, B + h * b3)
        A, B = A + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4), B + h / 6 * (b1 + 2 * b2 + 2 * b3 + b4)
    return A, B


def aligned_time(p: float, sigma: float, kappa2: float) -> float:
    """When the mode of singular value σ has grown to p from A0 = κ·V_rᵀ, B0 = 0 (s = 1): closed form of the spec."""
    p, sigma = p / kappa2, sigma / kappa2
    c = 2 * sigma
    D, u = math.sqrt(1 + 1 / c**2), math.tanh(0.5 * math.asinh(2 * p))

    def log_ratio(x: float) -> float:
        return math.log((D + x + 1 / c) / (D - x - 1 / c))

    return (log_ratio(u) - log_ratio(0.0)) / math.sqrt(1 + c**2) / kappa2
