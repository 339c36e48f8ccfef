"""PiSSA and OLoRA, which start from the weight alone: against their oracles, and as the frozen twin of an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loralign import adapt, build, sites
from loralign.carrier.sites import draw_for
from loralign.carrier.slot import live_of
from loralign.methods.init.olora import leading_qr
from loralign.methods.init.pissa import principal_svd
from loralign.types import Recipe, Start, Weight
from oracles import olora, pissa

SHAPES = [(12, 10, 4), (6, 30, 1), (30, 6, 6), (5, 5, 5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(init: Any, W: Tensor, r: int, s: float) -> Start:
    made: Start = init(Weight("w", (W.shape[0], W.shape[1]), lambda: W), r, s, None, draw_for(0, "w"))
    assert made.twin
    return made


def close(x: Tensor, y: Tensor, tol: float) -> None:
    assert (x.double() - y).norm() <= tol * y.norm(), float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("s", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_pissa_equals_its_oracle(d_out: int, d_in: int, r: int, s: float, dtype: torch.dtype, tol: float) -> None:
    W = normal(d_out, d_in)
    made, (A, B) = start(principal_svd(), W.to(dtype), r, s), pissa.factors(W, r, s)
    for i in range(r):  # pairs (b, a) have one sign between them
        sign = torch.sign(made.B[:, i].double() @ B[:, i])
        close(sign * made.A[i], A[i], tol)
        close(sign * made.B[:, i], B[:, i], tol)
    U, S, Vh = torch.linalg.svd(W)
    close(s * made.B.double() @ made.A.double(), (U[:, :r] * S[:r]) @ Vh[:r], tol)
    close(made.A.double() @ made.A.double().T, (S[:r] / s).diag(), tol)  # the factors share Σ alike
    close(made.B.double().T @ made.B.double(), (S[:r] / s).diag(), tol)


def test_pissa_of_a_wide_weight_is_near_the_exact_one() -> None:
    """Where the SVD is randomised: with a pretrained weight's flat spectrum, the best energy to 1e-3."""
    U, V = torch.linalg.qr(normal(256, 256)).Q, torch.linalg.qr(normal(300, 256, seed=1)).Q
    S = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    made = start(principal_svd(), ((U * S) @ V.T).float(), 8, 2.0)
    held = (2.0 * made.B.double() @ made.A.double()).square().sum()
    assert 1 - 1e-3 < float(held / S[:8].square().sum()) < 1 + 1e-5


@pytest.mark.parametrize("s", [0.5, 4.0])
@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_olora_equals_its_oracle(d_out: int, d_in: int, r: int, s: float, dtype: torch.dtype, tol: float) -> None:
    """The scale plays no part. Householder's signs of Q are as good as Gram–Schmidt's: a pair (b, a) flips together."""
    W = normal(d_out, d_in)
    made, (A, B) = start(leading_qr(), W.to(dtype), r, s), olora.factors(W, r)
    sign = torch.sign((made.B.double() * B).sum(dim=0))
    close(made.B * sign, B, tol)
    close(sign[:, None] * made.A, A, tol)
    close(made.B.double() @ made.A.double(), B @ B.T @ W, tol)
    close((made.B.double() @ made.A.double())[:, :r], W[:, :r], tol)  # exact on the columns that it was made of


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_adapter_starts_there(name: str) -> None:
    """Frozen and live factors of an adapter at its own s: the twin is the oracle's start, to a float32's rounding."""
    base = nn.Sequential(nn.Linear(10, 12, bias=False))
    W = base[0].weight.detach().clone()
    made = build(name, r=4, alpha=12.0, targets=("0",))
    assert isinstance(made, Recipe)
    model = adapt(base, made)
    (site,) = sites(model)
    live = live_of(site.layer, site.adapter)
    A, B = pissa.factors(W, 4, site.s) if name == "pissa" else olora.factors(W, 4)
    close(live.B0 @ live.A0, B @ A, 1e-4)
    assert site.s == 3.0 and not live.A.any() and not live.B.any()
