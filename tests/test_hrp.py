"""HRP's oracles H1–H18 (methods/hrp_cora.md §4) and the temporary adapter of the preheat."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from loralign import LoralignError, Recipe, adapt, build, optimizer, sites
from loralign.carrier.layer import low_rank
from loralign.carrier.sites import draw_for, put_in
from loralign.evidence import collect, exact_gradient, model_loss
from loralign.evidence.preheat import Temporary, _factors, hooked, prior_rate
from loralign.maths.draws import keyed_generator, orthonormal
from loralign.maths.linalg import product_svd
from loralign.methods.init.hrp import LORA_ROWS, high_rank_preheat, high_rank_sketch
from loralign.types import Directions, Preheated, Site, Weight, WorkFailed
from oracles import hrp as oracle
from toy import batch_for, batches_for, llama

DIAGONAL = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
E1, E2, E3 = torch.eye(3, dtype=torch.float64)
MIX = (E1 + E2) / 2**0.5
ONES = (E1 + E2 + E3) / 3**0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recipe(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    made = build(name, options, **{"r": 3, "alpha": 6.0, "seed": 11, **fields})
    assert isinstance(made, Recipe)
    return made


def layer_test(M: Tensor, r: int, alpha: float) -> tuple[Any, Site, dict[str, Tensor]]:
    """A linear layer at W0 = 0 whose loss on the batch is ½‖W − M‖²."""
    module = nn.Linear(M.shape[1], M.shape[0], bias=False, dtype=M.dtype)
    nn.init.zeros_(module.weight)
    model = put_in(nn.Sequential(module), recipe("lora", r=r, alpha=alpha, targets=("0",)))
    return model, sites(model)[0], {"x": torch.eye(M.shape[1], dtype=M.dtype), "y": M.T}


def half_square(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = 0.5 * (model(batch["x"]) - batch["y"]).square().sum()
    return loss


def preheat_by_descent(M: Tensor, A_h: Tensor, B_h: Tensor, train: str, steps: int, eta: float = 0.1) -> Temporary:
    """The production hook and layer under plain gradient descent, s = 2."""
    model, site, batch = layer_test(M, 1, 2.0)
    t = Temporary(site, A_h.clone().requires_grad_("A" in train), B_h.clone().requires_grad_("B" in train))
    for _ in range(steps):
        with hooked([t]):
            grads = torch.autograd.grad(half_square(model, batch), t.moving())
        with torch.no_grad():
            for p, g in zip(t.moving(), grads, strict=True):
                p -= eta * g
    return t


def leading_rows(t: Temporary, r: int) -> Tensor:
    return product_svd(t.B.detach(), t.A.detach())[2][:, :r].T


# ------------------------------------------------------------------------------------------------- the diagonal table


@pytest.mark.parametrize(("A", "loss"), [(E1, 2.5), (E2, 5.0), (E3, 6.5), (ONES, 14 / 3)])
def test_table_of_plain_starts(A: Tensor, loss: float) -> None:
    """§4.1: what a run that trains B reaches from this A."""
    assert math.isclose(oracle.limit_loss(DIAGONAL, A[None]), loss, rel_tol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize(
    ("train", "frozen", "loss"),
    [
        ("B", (E1, E2), 2.5),
        ("B", (E1, E3), 2.5),
        ("B", (E2, E3), 5.0),
        ("B", (MIX, E3), 3.75),
        ("A", (MIX, E3), 0.5 * (14 - 97 / 13)),
    ],
)
def test_table_of_preheated_starts(train: str, frozen: tuple[Tensor, Tensor], loss: float, steps: int) -> None:
    """§4.1 and H4: the start, and so its limit, does not depend on the number of full-batch steps."""
    F = torch.stack(frozen)
    zero = torch.zeros_like(F)
    t = preheat_by_descent(DIAGONAL, *((F, zero.T) if train == "B" else (zero, F.T)), train, steps)
    found = leading_rows(t, 1)
    expected = oracle.train_B(DIAGONAL, F, 1) if train == "B" else oracle.train_A(DIAGONAL, F.T, 1)
    assert torch.allclose(oracle.rows(found), oracle.rows(expected), atol=1e-12)
    assert math.isclose(oracle.limit_loss(DIAGONAL, found), loss, rel_tol=1e-10)


def test_table_of_the_two_pass_sketch() -> None:
    found = oracle.two_pass(DIAGONAL, ONES[None], 1)
    assert math.isclose(oracle.limit_loss(DIAGONAL, found), 0.5 * (14 - 794 / 98), rel_tol=1e-12)
    assert torch.allclose(found.abs(), torch.tensor([[9.0, 4.0, 1.0]], dtype=torch.float64) / 98**0.5)


def test_start_with_these_directions() -> None:
    """A0 = κ·V_rᵀ, B0 = 0, or the mirror; W0 is not read."""
    U, S, V = product_svd(normal(6, 4), normal(4, 5, seed=1))

    def unread() -> Tensor:
        raise AssertionError("W0 was read")

    W, given = Weight("w", (6, 5), unread), Directions(U[:, :2], S[:2], V[:, :2])
    made = high_rank_preheat(kappa=1.0)(W, 2, 1.0, given, draw_for(0, "w"))
    assert torch.equal(made.A, V[:, :2].T) and not made.B.any() and not made.twin and made.train == "AB"
    made = high_rank_sketch(side="B", kappa=2.0)(W, 2, 1.0, given, draw_for(0, "w"))
    assert torch.equal(made.B, 2 * U[:, :2]) and not made.A.any()


# -------------------------------------------------------------------------------------------- gradient descent and flow


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_descent_of_B_in_closed_form(steps: int) -> None:
    """H1, through a PEFT layer and our hook."""
    M, A, eta = normal(5, 7), torch.linalg.qr(normal(7, 2, seed=1)).Q.T.contiguous(), 0.05
    t = preheat_by_descent(M, A, torch.zeros(5, 2, dtype=torch.float64), "B", steps, eta)
    assert torch.allclose(t.B, oracle.descended_B(M, A, 2.0, eta, steps), atol=1e-12)


def test_any_frozen_A_leads_to_its_row_space() -> None:
    """H2: s·B_∞·A = M·A⁺A."""
    M, A = normal(5, 7), 0.5 * normal(2, 7, seed=1)
    eta = 0.9 / (4 * torch.linalg.matrix_norm(A, 2) ** 2)
    t = preheat_by_descent(M, A, torch.zeros(5, 2, dtype=torch.float64), "B", 1500, float(eta))
    assert torch.allclose(2 * (t.B @ t.A).detach(), M @ torch.linalg.pinv(A) @ A, atol=1e-12)


def test_expectation_over_random_rows() -> None:
    """H3: E ½‖M(I − P_A)‖² = ½(1 − r/n)‖M‖² over Haar A; the best A reaches the Eckart-Young value."""
    m, n, r = 16, 24, 4
    M, S = normal(m, n), torch.linalg.svdvals(normal(m, n))
    Q = torch.linalg.qr(normal(20000, n, r, seed=3)).Q
    mean = 0.5 * float(M.square().sum() - (M @ Q).square().sum((1, 2)).mean())
    assert math.isclose(mean, 0.5 * (1 - r / n) * float(M.square().sum()), rel_tol=5e-3)
    best = oracle.limit_loss(M, oracle.right(M, r))
    assert math.isclose(best, 0.5 * float(S[r:].square().sum()), rel_tol=1e-10) and best < 0.6 * mean


def test_our_own_draws_are_haar() -> None:
    """The preheat's random factor fulfils H3 too."""
    M, n, r = normal(16, 24), 24, 4
    energy = [float((M @ orthonormal(n, r, keyed_generator("test", i)).double()).square().sum()) for i in range(1000)]
    assert math.isclose(sum(energy) / 1000, r / n * float(M.square().sum()), rel_tol=0.02)


def test_loss_after_a_preheat_of_B() -> None:
    """H5 and H6: ½(‖M‖² − Σ σ_i(M·P_h)²); nested rows never lose, R = n is Eckart-Young."""
    M, r = normal(10, 12), 3
    Q = torch.linalg.qr(normal(12, 12, seed=1)).Q.T
    losses = []
    for R in (3, 5, 8, 12):
        t = preheat_by_descent(M, Q[:R].contiguous(), torch.zeros(10, R, dtype=torch.float64), "B", 2)
        losses.append(oracle.limit_loss(M, leading_rows(t, r)))
        S = torch.linalg.svdvals(M @ oracle.rows(Q[:R]))
        assert math.isclose(losses[-1], 0.5 * float(M.square().sum() - S[:r].square().sum()), rel_tol=1e-10)
    assert losses == sorted(losses, reverse=True)
    assert math.isclose(losses[-1], 0.5 * float(torch.linalg.svdvals(M)[r:].square().sum()), rel_tol=1e-10)


@pytest.mark.parametrize("R", [8, 16, 32, 48])
def test_which_factor_moves_decides_which_side_is_found(R: int) -> None:
    """H7: a frozen random A confines V, while U is nearly right; the two-pass sketch mends it."""
    m, n, r, draws = 40, 48, 4, 120
    S = 1 / torch.arange(1, m + 1, dtype=torch.float64)
    U, V = torch.linalg.qr(normal(m, m, seed=1)).Q, torch.linalg.qr(normal(n, m, seed=2)).Q
    M = (U * S) @ V.T
    total, best = float(S.square().sum()), float(S[:r].square().sum() / S.square().sum())
    A_h = torch.linalg.qr(normal(draws, n, R, seed=R)).Q.mT
    P = torch.linalg.svd(M @ A_h.mT, full_matrices=False)
    V_r, U_r = (P.Vh @ A_h)[:, :r], P.U[..., :r]
    right = float((M @ V_r.mT).square().sum((1, 2)).mean()) / total
    left = float((U_r.mT @ M).square().sum((1, 2)).mean()) / total
    Q = torch.linalg.qr(M @ A_h.mT).Q
    twice = torch.linalg.svd(Q.mT @ M, full_matrices=False).Vh[:, :r]
    both = float((M @ twice.mT).square().sum((1, 2)).mean()) / total
    bound = R / n * best
    assert bound - 0.02 <= right <= bound + 0.05
    assert left >= {8: 0.78, 16: 0.83, 32: 0.86, 48: best - 1e-9}[R]
    assert both >= {8: 0.85, 16: 0.87, 32: 0.878, 48: best - 1e-9}[R] and best <= 0.8787


def test_layer_has_the_gradients_that_the_flow_uses() -> None:
    A, B, M = normal(2, 5).requires_grad_(), normal(4, 2, seed=1).requires_grad_(), normal(4, 5, seed=2)
    x = torch.eye(5, dtype=torch.float64)
    y = low_rank(torch.zeros(5, 4, dtype=torch.float64), x, A, B, 1.7)
    (0.5 * (y - M.T).square().sum()).backward()
    gA, gB = oracle.gradients(A.detach(), B.detach(), M, 1.7)
    assert A.grad is not None and B.grad is not None
    assert torch.allclose(A.grad, gA, atol=1e-12) and torch.allclose(B.grad, gB, atol=1e-12)


def test_flow_conserves_the_balance() -> None:
    """H8: BᵀB − AAᵀ is constant under flow; under descent it drifts in proportion to η."""
    A, B, M = 0.5 * normal(2, 5), 0.5 * normal(4, 2, seed=1), normal(4, 5, seed=2)
    balance = B.T @ B - A @ A.T
    A1, B1 = oracle.flow(A, B, M, 8.0, 2e-3)
    assert (B1.T @ B1 - A1 @ A1.T - balance).abs().max() < 1e-10
    drift = []
    for eta in (2e-2, 2e-3):
        A1, B1 = A, B
        for _ in range(round(8 / eta)):
            gA, gB = oracle.gradients(A1, B1, M)
            A1, B1 = A1 - eta * gA, B1 - eta * gB
        drift.append(float((B1.T @ B1 - A1 @ A1.T - balance).abs().max()))
    assert 7 < drift[0] / drift[1] < 14


@pytest.mark.parametrize("kappa2", [1.0, 1 / 3])
def test_aligned_start_follows_the_closed_form(kappa2: float) -> None:
    """H9: every mode grows on its own, p(t) inverts t(p); the limit is the best rank r."""
    M, r = normal(5, 6), 2
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    A, B, t = kappa2**0.5 * Vh[:r], torch.zeros(5, r, dtype=torch.float64), 0.0
    for time in (0.3, 0.7, 1.5):
        A, B = oracle.flow(A, B, M, time - t, 2e-3)
        t = time
        modes = U[:, :r].T @ B @ A @ Vh[:r].T
        for i in range(r):
            assert math.isclose(oracle.aligned_time(float(modes[i, i]), float(S[i]), kappa2), t, rel_tol=1e-6)
        assert (B @ A - U[:, :r] @ modes.diag().diag() @ Vh[:r]).abs().max() < 1e-12
    A, B = oracle.flow(A, B, M, 25.0, 1e-2)
    assert torch.allclose(B @ A, (U[:, :r] * S[:r]) @ Vh[:r], atol=1e-10)


def test_trap_and_its_escape() -> None:
    """H10: a direction that A0 lacks entirely never comes; from overlap ε it comes after ~log(1/ε) steps."""

    def steps_until(first: float, limit: int) -> tuple[int, float]:
        A, B = torch.tensor([[first, 1.0, 0.3]], dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        for k in range(limit):
            E = B @ A - DIAGONAL
            loss = 0.5 * float(E.square().sum())
            if loss < 2.6:
                return k, loss
            A, B = A - 0.01 * B.T @ E, B - 0.01 * E @ A.T
        return limit, loss

    assert math.isclose(steps_until(0.0, 4000)[1], 5.0, rel_tol=1e-9)
    counts = [steps_until(eps, 4000)[0] for eps in (1e-2, 1e-4, 1e-8)]
    assert [abs(c - known) <= 5 for c, known in zip(counts, (650, 1124, 2071), strict=True)] == [True] * 3


def test_slow_phase_is_ojas_flow() -> None:
    """H11: for large κ the rows follow row(Q0·exp(C·t/κ²)) and keep their length."""
    sigma, r, kappa2 = torch.tensor([2.0, 1.6, 1.2, 0.8, 0.4, 0.2], dtype=torch.float64), 2, 100.0
    M, Q = torch.diag(sigma), torch.linalg.qr(normal(6, r)).Q.T
    A, _ = oracle.flow(kappa2**0.5 * Q, torch.zeros(6, r, dtype=torch.float64), M, 1.5 * kappa2, 2e-2)
    oja = oracle.rows(Q @ torch.diag(torch.exp(1.5 * sigma**2)))
    assert (oracle.rows(A) - oja).abs().max() < 1e-3 and (oracle.rows(A) - oracle.rows(Q)).abs().max() > 0.1
    assert (A @ A.T / kappa2 - torch.eye(r, dtype=torch.float64)).abs().max() < 1e-3


def test_small_start_grows_along_the_strongest_modes() -> None:
    """H12: A = A0·cosh(√C·t), B = U·sinh(Σt)·VᵀA0ᵀ while BA ≪ M."""
    M, t = normal(5, 6) / 2, 2.0
    A0 = 1e-4 * normal(2, 6, seed=1)
    U, S, Vh = torch.linalg.svd(M)
    A, B = oracle.flow(A0, torch.zeros(5, 2, dtype=torch.float64), M, t, 1e-3)
    grown = torch.cat([torch.cosh(S * t), torch.ones(1, dtype=torch.float64)])
    wanted_A, wanted_B = A0 @ Vh.T @ grown.diag() @ Vh, (U * torch.sinh(S * t)) @ Vh[:5] @ A0.T
    assert (A - wanted_A).norm() / wanted_A.norm() < 1e-5 and (B - wanted_B).norm() / wanted_B.norm() < 1e-5


# --------------------------------------------------------------------------------------- the preheat and the gradient


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_first_gradient_is_a_sketch_of_the_gradient(alpha: float) -> None:
    """H13: B_h.grad = s·G·A_hᵀ and A_h.grad = 0; with R = d_in and A_h = I it is s·G itself."""
    M = normal(5, 7)
    model, site, batch = layer_test(M, 4, alpha)
    for A_h in (torch.eye(7, dtype=torch.float64), torch.linalg.qr(normal(7, 3, seed=1)).Q.T.contiguous()):
        t = Temporary(site, A_h.requires_grad_(), torch.zeros(5, len(A_h), dtype=torch.float64, requires_grad=True))
        with hooked([t]):
            gA, gB = torch.autograd.grad(half_square(model, batch), [t.A, t.B])
        assert torch.allclose(gB, alpha / 4 * -M @ A_h.T, atol=1e-12) and not gA.any()


def test_at_full_rank_the_sketch_is_the_svd_of_the_gradient() -> None:
    """H13: R = d_in gives LoRA-GA's exact directions, from the same micro-batches."""
    M = normal(6, 5)
    model, site, batch = layer_test(M, 2, 2.0)
    for train in ("A", "B"):
        need = Preheated(lambda r: 64, 0, train, micro_batches=1)  # type: ignore[arg-type]
        d = collect(need, model, [site], [batch], loss=half_square)[site.name]
        U, S, Vh = torch.linalg.svd(-M, full_matrices=False)
        assert d.U is not None and d.V is not None
        assert torch.allclose(d.S.double(), S[:2], rtol=1e-6)
        assert torch.allclose(oracle.columns(d.V), oracle.rows(Vh[:2]), atol=1e-6)
        assert torch.allclose(oracle.columns(d.U), oracle.columns(U[:, :2]), atol=1e-6)


def test_one_adam_step_is_the_sign_of_the_gradient() -> None:
    """H14: why `hrp` takes many steps or none."""
    M, lr = normal(6, 5), 1e-3
    model, site, batch = layer_test(M, 3, 3.0)
    need = Preheated(lambda r: 3, 1, "B", micro_batches=1, lr=lr)
    d = collect(need, model, [site], [batch], loss=half_square, seed=5)[site.name]
    A_h = _factors(need, site, 5, torch.device("cpu")).A.detach()
    assert torch.allclose(A_h @ A_h.T, torch.eye(3), atol=1e-5)
    product = (d.U * d.S) @ d.V.T  # type: ignore[operator]
    assert torch.allclose(product @ A_h.T / -lr, torch.sign(-M.float() @ A_h.T), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 12, 30])
def test_many_adam_steps_warm_up(steps: int) -> None:
    """The rate grows over the first tenth of the steps, the gradient is clipped to norm 1: Adam's steps by hand."""
    M, peak = normal(6, 5), 1e-2
    model, site, batch = layer_test(M, 3, 3.0)
    need = Preheated(lambda r: 3, steps, "B", micro_batches=1, lr=peak)
    d = collect(need, model, [site], [batch], loss=half_square, seed=5)[site.name]
    A_h = _factors(need, site, 5, torch.device("cpu")).A.detach().double()
    wanted = oracle.adam_B(M, A_h, 1.0, peak, steps) @ A_h
    product = ((d.U * d.S) @ d.V.T).double()  # type: ignore[operator]
    assert (product - wanted).norm() < 1e-4 * wanted.norm()


def test_compression_of_the_product() -> None:
    """H15: factored = dense; T = A_h·V_r is orthonormal and carries B_h and its gradient."""
    B, A, r = normal(9, 4), torch.linalg.qr(normal(7, 4, seed=1)).Q.T, 2
    U, S, V = product_svd(B, A)
    dense = torch.linalg.svd(B @ A, full_matrices=False)
    assert torch.allclose(S, dense.S[:4], atol=1e-10)
    assert torch.allclose((U[:, :r] * S[:r]) @ V[:, :r].T, (dense.U[:, :r] * dense.S[:r]) @ dense.Vh[:r], atol=1e-10)
    T, G = A @ V[:, :r], normal(9, 7, seed=2)
    assert torch.allclose(T.T @ T, torch.eye(r, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(B @ T, U[:, :r] * S[:r], atol=1e-12)
    assert torch.allclose(G @ V[:, :r], (G @ A.T) @ T, atol=1e-12)


def test_first_step_of_the_main_run() -> None:
    """§2.5: ΔW = −η·s²·κ²·G·P_{V_r} under plain descent."""
    M, eta = normal(6, 5), 0.1
    module = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    nn.init.zeros_(module.weight)
    batch = {"x": torch.eye(5, dtype=torch.float64), "y": M.T}
    made = recipe("hrp-sketch", {"rank": 5, "micro_batches": 2}, r=2, alpha=6.0, targets=("0",))
    model = adapt(nn.Sequential(module), made, [batch] * 2, loss=half_square)
    layer = sites(model)[0].layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index]
    half_square(model, batch).backward()
    step = 3.0 * (-eta * B.grad) @ A.detach()
    wanted = -eta * 9 / 3 * -M @ oracle.rows(oracle.right(M, 2))
    assert torch.allclose(step, wanted, atol=1e-5) and not A.grad.any()


# --------------------------------------------------------------------------------------------------- in a real model


@pytest.mark.parametrize("name", ["hrp", "hrp-sketch"])
def test_an_ordinary_adapter_is_left(name: str, tmp_path: Path) -> None:
    """H16, H18: bit-equal output and base weights, plain trainable pair, plain file, nothing else in the model."""
    base = llama()
    weights, batch = copy.deepcopy(base.state_dict()), batch_for(base)
    before = base(**batch).logits
    plain = adapt(llama(), recipe("lora"))
    options = {"rank": 8, "steps": 3} if name == "hrp" else {"rank": 8, "micro_batches": 4}
    model = adapt(base, recipe(name, options), batches_for(base, 4))
    assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == list(plain.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in plain.named_parameters()} and sum(flags.values()) == 28
    assert all(p.grad is None for p in model.parameters())
    state = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(state[n], w) for n, w in weights.items())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as f:
        assert sorted({k.split(".")[-2] for k in f.keys()}) == ["lora_A", "lora_B"]  # noqa: SIM118
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)


@pytest.mark.parametrize("steps", [0, 3])
def test_the_temporary_adapter_leaves_no_trace(steps: int) -> None:
    """Keys and values of the state, flags, gradients, hooks, modes, PEFT's config and the generators are as before."""
    model = put_in(llama(attention_dropout=0.2), recipe("lora", dropout=0.1)).train()

    def traces() -> list[Any]:
        hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
        flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
        modes = [(n, m.training) for n, m in model.named_modules()]
        return [list(model.state_dict()), hooks, flags, modes, repr(model.peft_config), model.active_adapters]

    before, state = traces(), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    need = Preheated(lambda r: 8, steps, "AB" if steps else "A", micro_batches=4)
    assert len(collect(need, model, sites(model), batches_for(model, 4))) == 14
    assert traces() == before and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.random.get_state()[1].tolist() == random[1]  # type: ignore[index]


@pytest.mark.parametrize(("kappa", "length"), [(None, 1 / 3), (1.0, 1.0)])
def test_rows_are_as_long_as_loras_own(kappa: float | None, length: float) -> None:
    """H17: AAᵀ = κ²·I, and κ = √⅓ is the length of PEFT's default."""
    options = {"rank": 8, "micro_batches": 2} | ({"kappa": kappa} if kappa else {})
    model = adapt(llama(), recipe("hrp-sketch", options), batches_for(llama(), 2))
    for site in sites(model):
        A = site.layer.lora_A["default"].weight.detach()  # type: ignore[index]
        assert torch.allclose(A @ A.T, length * torch.eye(3), atol=1e-6)
    torch.manual_seed(0)
    stock = put_in(nn.Sequential(nn.Linear(4096, 8)), recipe("lora", r=8, targets=("0",)))
    own = sites(stock)[0].layer.lora_A["default"].weight.detach()  # type: ignore[index]
    assert abs(float((own @ own.T).diagonal().mean()) - LORA_ROWS**2) < 0.01


def test_preheating_lowers_the_loss_and_the_start_follows_it() -> None:
    """The temporary adapter trains for real: its leading directions and values alone lower the loss."""
    model = put_in(llama(), recipe("lora"))
    found, batch = sites(model), batch_for(llama())
    need = Preheated(lambda r: 12, 30, "AB", micro_batches=1, lr=3e-2)
    seen: list[int] = []
    evidence = collect(need, model, found, [batch], progress=lambda what, i, n: seen.append(i) if i == n else None)
    assert all(d.U is not None and d.V is not None and len(d.S) == 3 for d in evidence.values())
    spent = evidence.spent
    assert spent.micro_batches == 30 and spent.tokens == 30 * int(batch["attention_mask"].sum())
    before = float(model_loss(model, batch).detach())
    with torch.no_grad():
        for site in found:
            d = evidence[site.name]
            assert d.U is not None and d.V is not None
            site.layer.lora_A["default"].weight.copy_(d.V.T)  # type: ignore[index]
            site.layer.lora_B["default"].weight.copy_(d.U * d.S)  # type: ignore[index]
    assert float(model_loss(model, batch).detach()) < before - 0.05


def test_a_preheat_that_leads_away_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = put_in(nn.Sequential(nn.Linear(16, 16)), recipe("lora", targets=("0",)))
    batch, need = {"x": normal(8, 16).float()}, Preheated(lambda r: 6, 6, "AB", micro_batches=1, lr=30.0)
    with caplog.at_level(logging.WARNING, "loralign"):
        collect(need, model, sites(model), [batch], loss=lambda m, b: m(b["x"]).square().mean())
    assert "loss rose" in caplog.text


def test_steps_accumulate_micro_batches() -> None:
    """Two micro-batches per step = one step on their mean gradient."""
    batches = [batch_for(llama(), seed=i) for i in range(2)]

    def mean_loss(model: nn.Module, batch: Any) -> Tensor:
        total: Tensor = sum(model_loss(model, b) for b in batch["all"]) / 2  # type: ignore[assignment]
        return total

    one = Preheated(lambda r: 4, 3, "AB", micro_batches=2, accumulate=2, lr=1e-2)
    whole = Preheated(lambda r: 4, 3, "AB", micro_batches=1, lr=1e-2)
    model = put_in(llama(), recipe("lora"))
    a = collect(one, model, sites(model), batches)
    b = collect(whole, model, sites(model), [{"all": batches}], loss=mean_loss)
    for name, d in a.items():
        assert torch.allclose(d.S, b[name].S, rtol=1e-3), name


def test_the_values_of_a_sketch_are_those_of_the_mean_gradient_of_its_second_half() -> None:
    """Three micro-batches: two give the basis, which holds all rows of the gradient here, the third the values."""
    model, batch = put_in(llama(), recipe("lora")), batch_for(llama())
    narrow = [s for s in sites(model) if s.d_out == 16]
    found = collect(Preheated(lambda r: 16, 0, "A", micro_batches=3), model, narrow, [batch] * 3)
    exact = exact_gradient(model, narrow, [batch], model_loss)
    for s in narrow:
        assert torch.allclose(found[s.name].S, torch.linalg.svdvals(exact[s.name])[: s.r], rtol=1e-4), s.name


def test_a_reference_without_the_adapter_is_not_preheated() -> None:
    """DPO's and KTO's reference policy runs under `disable_adapter`, while the temporary factors train."""
    model, batch = put_in(llama(), recipe("lora")), batch_for(llama())
    plain = model(**batch).logits
    pairs = [Temporary(s, normal(4, s.d_in).float(), normal(s.d_out, 4).float()) for s in sites(model)]
    with hooked(pairs), torch.no_grad():
        assert not torch.allclose(model(**batch).logits, plain, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Both kinds, with optimizer steps: the factors of the run without, to the bit."""
    found = []
    for checkpointing in (False, True):
        base: Any = llama()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = put_in(base, recipe("lora", r=2))
        need = Preheated(lambda r: 6, 3, "AB", micro_batches=3, lr=1e-2)
        found.append(collect(need, model, sites(model), [batch_for(base, seed=i) for i in range(3)]))
    assert all(torch.equal(d.V, found[1][name].V) for name, d in found[0].items())  # type: ignore[arg-type]


def test_rate_is_loras_prior() -> None:
    assert math.isclose(prior_rate(2.0, 2000), 5e-4) and prior_rate(2.0, 4000) < 5e-4 < prior_rate(1.0, 2000)


def test_refusals() -> None:
    batch = batch_for(llama())
    with pytest.raises(LoralignError, match="preheat's rank 2 is below the adapter's"):
        adapt(llama(), recipe("hrp", {"rank": 2, "steps": 1}), [batch])
    with pytest.raises(LoralignError, match="steps must be at least 1"):
        high_rank_preheat(steps=0)
    with pytest.raises(LoralignError, match="accumulates one side first"):
        high_rank_sketch(train="AB")
    with pytest.raises(LoralignError, match="kappa must be above 0"):
        high_rank_preheat(kappa=0.0)
    with pytest.raises(WorkFailed, match="is nan"):
        adapt(llama(), recipe("hrp", {"rank": 8, "steps": 30, "lr": 1e30}), [batch])


def test_main_run_starts_fresh() -> None:
    """The optimizer of the main run has seen no step."""
    made = recipe("hrp", {"rank": 8, "steps": 2})
    opt = optimizer(adapt(llama(), made, batches_for(llama(), 2)), made, 1e-3)
    assert not opt.state_dict()["state"]
