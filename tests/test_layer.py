"""The low-rank layer: the single node and the plain statements give the formula's value and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from loralign import Recipe, adapt, build, sites
from loralign.carrier import layer
from loralign.carrier.sites import put_in
from loralign.evidence import tapped

RECIPE = build("lora", r=2, alpha=4.0, targets=("0",))
assert isinstance(RECIPE, Recipe)

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


def test_a_second_derivative_is_refused_and_a_first_one_is_not(path: None) -> None:
    """The node keeps h as a constant: through it, d/dA of ‖dL/dB‖² would lack a term."""
    A, B, *_ = factors(0, torch.float64)
    x, lA, lB = torch.randn(3, 6, dtype=torch.float64), A.requires_grad_(), B.requires_grad_()
    y = layer.low_rank(torch.zeros(3, 5, dtype=torch.float64, requires_grad=True).clone(), x, lA, lB, S)
    (g,) = torch.autograd.grad(y.square().sum(), lB, create_graph=True)
    torch.testing.assert_close(g, 2 * S * (S * x @ A.T @ B.T).T @ (x @ A.T))
    if layer.SMALL.get("cpu"):  # plain statements: torch differentiates them as often as it is asked
        assert torch.autograd.grad(g.square().sum(), lA)[0].norm() > 0
        return
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_over_a_base_that_stays_in_fp32(path: None, kind: str) -> None:
    """A quantised layer whose rests are fp32 answers in fp32, whatever autocast says."""
    frozen, twin = KINDS[kind]
    A, B, A0, B0 = factors(frozen, torch.float32)
    x, lA, lB = torch.randn(3, 6).requires_grad_(), A.clone().requires_grad_(), B.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.low_rank(torch.zeros(3, 5), x, lA, lB, S, A0=A0, B0=B0, twin=twin)
        y.square().sum().backward()  # also where backward runs inside
    ex, eA, eB = (t.detach().clone().requires_grad_() for t in (x, A, B))
    want = formula(kind, torch.zeros(3, 5), ex, eA, eB, A0, B0)
    want.square().sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=0.03, atol=0.5)
    for mine, theirs in ((x, ex), (lA, eA), (lB, eB)):
        assert mine.grad is not None and theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.02


class Fp32Answer(torch.nn.Linear):
    """Stands in for bitsandbytes' 4-bit layer: computes in its own precision, answers in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


def test_autocast_trains_as_stock_peft_does_on_such_a_base() -> None:
    torch.manual_seed(0)
    base, x, grads = torch.nn.Sequential(Fp32Answer(6, 5, bias=False)), torch.randn(8, 6), []
    for ours in (True, False):
        model: Any = adapt(copy.deepcopy(base), RECIPE) if ours else put_in(copy.deepcopy(base), RECIPE)
        pair = next(m for m in model.modules() if isinstance(m, LoraLayer))
        A, B = pair.lora_A["default"].weight, pair.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(torch.linspace(-1, 1, 12).view(2, 6))
            B.copy_(torch.linspace(1, -1, 10).view(5, 2))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        grads.append((loss.detach(), A.grad, B.grad))
    for mine, theirs in zip(*grads, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def adapted(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """One layer under an adapter that adds something, and its PEFT layer."""
    torch.manual_seed(0)
    model: Any = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)).to(dtype), RECIPE)
    found = next(m for m in model.modules() if isinstance(m, LoraLayer))
    with torch.no_grad():
        found.lora_B["default"].weight.fill_(1.0)
    return model, found


def test_whoever_watches_the_base_layer_sees_its_own_output() -> None:
    """Activation capture and distillation on base layers: the adapter does not write into what a hook keeps."""
    model, found = adapted()
    x, seen = torch.randn(4, 6), []
    with found.base_layer.register_forward_hook(lambda m, a, out: seen.append(out)):
        watched = model(x)
    assert torch.equal(seen[0], found.base_layer(x)) and not torch.equal(seen[0], watched)
    assert torch.equal(watched, model(x))


def test_whoever_watches_all_modules_sees_the_base_layers_own_output() -> None:
    model, found = adapted()
    x, seen = torch.randn(4, 6), []
    with register_module_forward_hook(lambda m, a, out: seen.append(out) if m is found.base_layer else None):
        watched = model(x)
    assert torch.equal(seen[0], found.base_layer(x)) and not torch.equal(seen[0], watched)


def test_a_part_of_what_others_keep_is_not_written_into() -> None:
    """As a layer that hands out a piece of a joint product."""
    model, found = adapted()
    x, whole = torch.randn(4, 6), []

    class Part(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole.append(super().forward(x).repeat(2, 1))
            return whole[0][: len(x)]

    want = model(x)
    plain = found.base_layer(x)
    found.base_layer.__class__ = Part
    assert torch.equal(model(x), want) and torch.equal(whole[0], plain.repeat(2, 1))


def test_a_merged_adapter_counts_once() -> None:
    model, _ = adapted()
    x = torch.randn(4, 6)
    want = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(x), want, atol=1e-5)


def test_a_second_stock_adapter_works_in_half_precision() -> None:
    """PEFT casts for it; ours still gets x as it is."""
    model, found = adapted(torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    first = model(x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    A, B = (getattr(found, f"lora_{f}")["other"].weight for f in "AB")
    with torch.no_grad():
        want = found.base_layer(x).float() + x.float() @ A.T @ B.T * found.scaling["other"]
        assert float((model(x).float() - want).norm() / want.norm()) < 0.01
    found.set_adapter(["default", "other"])
    assert model(x).dtype == torch.bfloat16


def test_a_layer_may_be_called_by_keyword() -> None:
    model, found = adapted()
    site, x, seen = sites(model)[0], torch.randn(4, 6), []
    with tapped([site], lambda at, g, given: seen.append(given)):
        found(x=x).sum().backward()
    assert torch.equal(seen[0], x)


def test_it_is_one_graph_under_compile() -> None:
    _, found = adapted()
    x = torch.randn(4, 6)
    compiled = torch.compile(found, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), found(x))
