"""The low-rank layer: the single node and the plain statements give the formula's value and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from loralign.carrier import layer

S = 1.7
KINDS = {"plain": (0, False), "frozen slots": (3, False), "twin": (4, True)}


@pytest.fixture(params=["one node", "plain statements"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with layer.as_on("cuda" if request.param == "plain statements" else "cpu"):
        yield


def factors(frozen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(0)
    A, B = torch.randn(4, 6, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    if not frozen:
        return A, B, None, None
    return A, B, torch.randn(frozen, 6, dtype=dtype), torch.randn(5, frozen, dtype=dtype)


def formula(kind: str, base: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> Tensor:
    if A0 is None or B0 is None:
        return base + S * x @ A.T @ B.T
    if kind == "twin":
        return base + S * x @ (A.T @ (B0 + B).T + A0.T @ B.T)
    return base + S * x @ (A.T @ B.T + A0.T @ B0.T)


@pytest.mark.parametrize("trained", ["AB", "A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_the_formulas(path: None, kind: str, trained: str) -> None:
    frozen, twin = KINDS[kind]
    A, B, A0, B0 = factors(frozen, torch.float64)
    x, W = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    found: list[list[Tensor | None]] = []
    for ours in (True, False):
        lx, lA, lB = (t.clone().requires_grad_(on) for t, on in ((x, True), (A, "A" in trained), (B, "B" in trained)))
        base = torch.nn.functional.linear(lx, W)
        made = layer.low_rank(base, lx, lA, lB, S, A0=A0, B0=B0, twin=twin) if ours else None
        y = formula(kind, base, lx, lA, lB, A0, B0) if made is None else made
        y.backward(g)
        found.append([y.detach(), lx.grad, lA.grad, lB.grad])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_factors_on_a_bf16_base(path: None, kind: str, autocast: bool) -> None:
    """Products in bf16, gradients of the factors in fp32, those of the input in the input's own type."""
    frozen, twin = KINDS[kind]
    A, B, A0, B0 = factors(frozen, torch.float32)
    x = torch.randn(2, 3, 6).to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    W, lA, lB = torch.randn(5, 6, dtype=torch.bfloat16), A.clone().requires_grad_(), B.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = layer.low_rank(torch.nn.functional.linear(x, W), x, lA, lB, S, A0=A0, B0=B0, twin=twin)
    y.sum().backward()
    ex, eA, eB = (t.detach().double().requires_grad_() for t in (x, A, B))
    wide = [None if t is None else t.double() for t in (A0, B0)]
    want = formula(kind, ex @ W.double().T, ex, eA, eB, *wide)
    want.sum().backward()
    assert x.grad is not None and lA.grad is not None
    assert (y.dtype, x.grad.dtype, lA.grad.dtype) == (torch.bfloat16, x.dtype, torch.float32)
    torch.testing.assert_close(y.double(), want, rtol=0.03, atol=0.1)
    for mine, theirs in ((x, ex), (lA, eA), (lB, eB)):
        assert mine.grad is not None and theirs.grad is not None
        assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 0.02


def test_small_outputs_on_a_gpu_take_the_plain_statements() -> None:
    """By the size of the output, on CUDA alone; what stands in for a device is forgotten again."""
    assert set(layer.SMALL) == {"cuda"} and layer.SMALL["cuda"] > 4096 * 1536  # the widest output of the H100 study
    A, B, *_ = factors(0, torch.float32)
    base = torch.zeros(2, 5, requires_grad=True).clone()
    with layer.as_on("cuda"):
        assert layer.low_rank(base, torch.ones(2, 6), A.requires_grad_(), B, S).grad_fn.name() == "AddBackward0"  # type: ignore[union-attr]
    assert layer.low_rank(base, torch.ones(2, 6), A, B, S).grad_fn.name() == "_LowRankBackward"  # type: ignore[union-attr]
    assert set(layer.SMALL) == {"cuda"}
