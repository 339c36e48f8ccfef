"""LoRA-GA's oracles O1–O12 (methods/gradient.md §1.8), and the exact gradient behind it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralign import LoralignError, adapt, build, factors, optimizer, sites
from loralign.carrier.sites import draw_for, put_in
from loralign.evidence import exact_gradient, model_loss
from loralign.maths.linalg import top_svd
from loralign.methods.init.lora_ga import gradient_svd
from loralign.types import Directions, Recipe, Sketch, Start, Weight
from oracles import lora_ga as oracle
from toy import batch_for, llama

M, N, R, ALPHA, GAMMA = 48, 40, 4, 16.0, 16.0
S_RS = ALPHA / math.sqrt(R)


def gradient(seed: int = 0, m: int = M, n: int = N) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence(G: Tensor, k: int) -> Directions:
    U, S, V = top_svd(G, k)
    return Directions(U, S, V)


def start(G: Tensor, r: int = R, s: float = S_RS, **options: Any) -> Start:
    W = Weight("w", (int(G.shape[0]), int(G.shape[1])), lambda: torch.randn_like(G))
    return gradient_svd(**{"gamma": GAMMA, **options})(W, r, s, evidence(G, 2 * r), draw_for(0, "w"))


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
def test_equals_the_oracle(direction: str, scale: str) -> None:
    G = gradient()
    made = start(G, direction=direction, scale=scale)
    A, B = oracle.factors(G, R, GAMMA, S_RS, direction, scale)
    assert torch.allclose(made.A, A, atol=1e-10) and torch.allclose(made.B, B, atol=1e-10)


def test_stable_scale() -> None:
    """O2: A0A0ᵀ = B0ᵀB0 = k²I with k = d_out^¼/√γ; the offset has r equal singular values s·√d_out/γ."""
    made = start(gradient())
    k = M**0.25 / GAMMA**0.5
    eye = k**2 * torch.eye(R, dtype=torch.float64)
    assert torch.allclose(made.A @ made.A.T, eye, atol=1e-10) and torch.allclose(made.B.T @ made.B, eye, atol=1e-10)
    offset = torch.linalg.svdvals(S_RS * made.B @ made.A)
    assert torch.allclose(offset[:R], torch.full((R,), S_RS * M**0.5 / GAMMA, dtype=torch.float64))
    assert math.isclose(float(offset.norm()), 6.92820, abs_tol=1e-5)


@pytest.mark.parametrize("loss_scale", [1e-3, 1.0, 1e3])
def test_loss_scale_does_not_matter(loss_scale: float) -> None:
    made, reference = start(loss_scale * gradient()), start(gradient())
    assert torch.allclose(made.A, reference.A, rtol=1e-5) and torch.allclose(made.B, reference.B, rtol=1e-5)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
def test_first_step_is_the_best_rank_2r_step(direction: str, scale: str) -> None:
    """O3: one SGD step of size λ moves W_eff by −λ·ζ·G_2r + O(λ²), for every disjoint split."""
    G, lam = gradient(1), 1e-7
    made = start(G, direction=direction, scale=scale)
    gA, gB = S_RS * made.B.T @ G, S_RS * G @ made.A.T
    A, B = made.A - lam * gA, made.B - lam * gB
    step = S_RS * (B @ A - made.B @ made.A)
    wanted = -lam * oracle.zeta(M, S_RS, GAMMA, scale) * oracle.top(G, 2 * R)
    assert (step - wanted).norm() / wanted.norm() < 1e-4
    first_order = -lam * S_RS * (made.B @ gA + gB @ made.A)
    assert (first_order - wanted).norm() / wanted.norm() < 1e-9


def test_residual_of_the_fit() -> None:
    """O4: ‖G − G_2r‖/‖G‖ = √(Σ_{i>2r} σ²)/‖σ‖."""
    G = gradient(2)
    S = torch.linalg.svdvals(G)
    fit = oracle.top(G, 2 * R)
    assert math.isclose(float((G - fit).norm() / G.norm()), float(S[2 * R :].norm() / S.norm()), rel_tol=1e-9)


def test_hand_case() -> None:
    """O12: G = diag(3, 2), r = 1, c = 1: A0 = e1ᵀ, B0 = e2, and the first step is −G exactly."""
    G = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
    made = start(G, r=1, s=1.0, scale="unit")
    assert torch.allclose(made.A, torch.tensor([[1.0, 0.0]], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(made.B, torch.tensor([[0.0], [1.0]], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(made.B @ made.B.T @ G + G @ made.A.T @ made.A, G, atol=1e-12)


def test_rank_it_cannot_serve() -> None:
    """O11, and the kinds of all such sites are named."""
    said = (
        r"rank 12 is too .* at model\.layers\.0\.self_attn\.k_proj \(16 × 32\), .* 8 .*and at 3 more sites: v_proj, k_p"
    )
    with pytest.raises(LoralignError, match=said):
        adapt(llama(), recipe(r=12), [batch_for(llama())])


def test_zero_gradient_falls_back_to_plain_lora() -> None:
    G = torch.zeros(M, N, dtype=torch.float64)
    made = start(G)
    assert not made.twin and not made.B.any() and made.A.any()


def test_linear_and_conv1d_agree() -> None:
    """O8: a Linear and the Conv1D that holds its transpose get the same factors."""
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    found = []
    for kind in ("linear", "conv"):
        module: Any = nn.Linear(16, 24, bias=False) if kind == "linear" else Conv1D(24, 16)
        module.weight.data = W.clone() if kind == "linear" else W.T.clone()
        if kind == "conv":
            module.bias.data.zero_()
        model = nn.Sequential(module)
        made = recipe(r=3, targets=("0",))
        wrapped = adapt(model, made, [{"input": x}] * 2, loss=lambda m, b: m(b["input"]).square().mean())
        found.append(wrapped.base_model.model[0].lora_B["default"].frozen)
    assert torch.allclose(found[0], found[1], atol=1e-5)


def recipe(**fields: Any) -> Recipe:
    made = build("lora-ga", {"gamma": 16.0}, **{"r": 3, "alpha": 6.0, **fields})
    assert isinstance(made, Recipe)
    return made


# ---------------------------------------------------------------------------------------------- the exact gradient


def autograd_gradient(model: Any, batches: list[Any]) -> dict[str, Tensor]:
    """dL/dW of every Linear by autograd, mean over batches."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    model.requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    found = {n: m.weight.grad.clone() for n, m in modules.items() if m.weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradient_equals_autograd(checkpointing: bool | None) -> None:
    """O5, O6: also with both kinds of gradient checkpointing (the value is `use_reentrant`), and in the first block."""
    batches = [batch_for(llama()), {k: v.flip(0) for k, v in batch_for(llama()).items()}]
    expected = autograd_gradient(llama(), batches)
    model = llama()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    wrapped = put_in(model, recipe()).train()
    found = exact_gradient(wrapped, sites(wrapped), batches, model_loss)
    assert len(found) == 14
    for name, G in found.items():
        assert (G - expected[name]).norm() / expected[name].norm() < 1e-5, name
    assert all(p.grad is None for p in wrapped.parameters())


class Twice(nn.Module):
    """One linear map used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(torch.tanh(self.map(x)))
        return out


def test_module_used_twice() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 6)
    model(x).square().mean().backward()
    assert model.map.weight.grad is not None
    expected = model.map.weight.grad.clone()
    model.zero_grad()
    wrapped = put_in(model, recipe(targets=("map",)))
    found = exact_gradient(wrapped, sites(wrapped), [{"x": x}], lambda m, b: m(b["x"]).square().mean())
    assert torch.allclose(found["map"], expected, atol=1e-6)


def test_bf16_base_gets_the_same_start_up_to_rounding() -> None:
    model = llama().to(torch.bfloat16)
    wrapped = adapt(model, recipe(), [batch_for(llama())])
    assert all(site.layer.lora_B["default"].frozen.dtype == torch.float32 for site in sites(wrapped))
    made = recipe()
    opt = optimizer(wrapped, made, 1e-3)
    wrapped(**batch_for(llama())).loss.backward()
    opt.step()
    assert opt.applied == 14 and all(torch.isfinite(factors(site)[1]).all() for site in sites(wrapped))


@pytest.mark.parametrize(
    "options",
    [{"micro_batches": 0}, {"sketch": Sketch(width=1)}, {"sketch": Sketch(passes=0)}, {"sketch": Sketch(held_out=-1)}],
)
def test_counts_that_mean_nothing_are_refused(options: Any) -> None:
    with pytest.raises(LoralignError, match=r"at least"):
        gradient_svd(**options)


def test_needs_data() -> None:
    with pytest.raises(LoralignError, match="pass `batches`"):
        adapt(llama(), recipe())
