"""Chains of links: Chain of LoRA and RAC-LoRA against their oracles (methods/chain.md), and what a knot must keep."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EarlyStoppingCallback

from loralign import LoralignError, Recipe, adapt, build, drive, factors, optimizer, peft_config, sites
from loralign.carrier.sites import draw_for
from loralign.carrier.slot import live_of, shared_of
from loralign.methods.init.rac_lora import random_side
from loralign.methods.outer.chain import chain_of_links
from loralign.methods.transform.combine import descend
from loralign.methods.transform.lora_fa import Projected
from loralign.methods.transform.rac_lora import projected_descent
from loralign.optim.pairs import PairOptimizer
from loralign.train.attach import attach
from loralign.train.driver import Driver
from loralign.types import (
    NOTHING,
    Ctx,
    Directions,
    Draw,
    Facts,
    Grad,
    Group,
    Need,
    Pair,
    Start,
    Transform,
    Weight,
    WorkFailed,
)
from oracles import chain_of_lora as chains
from oracles import rac_lora
from toy import batch_for, llama
from trainers import toy_trainer

STEPS = 6


def made(name: str, options: Mapping[str, Any] | None = None, **fields: Any) -> Recipe:
    recipe = build(name, dict(options or {}), **{"r": 3, "alpha": 6.0, "seed": 5, **fields})
    assert isinstance(recipe, Recipe)
    return recipe


def begun(recipe: Recipe, steps: int, lr: float = 1e-2) -> tuple[Any, PairOptimizer, Driver]:
    base = llama()
    model = adapt(base, recipe, [batch_for(base, seed=k) for k in range(recipe.init.needs.draws)])
    opt = optimizer(model, recipe, lr)
    return model, opt, drive(model, recipe, opt, steps)


def trained(recipe: Recipe, steps: int, lr: float = 1e-2) -> Any:
    model, opt, driver = begun(recipe, steps, lr)
    for step in range(steps):
        one_step(model, opt, driver, step)
    return model


def one_step(model: Any, opt: PairOptimizer, driver: Driver, step: int) -> None:
    model.train()
    model(**batch_for(model, seed=step)).loss.backward()
    opt.step()
    driver.after_step()
    opt.zero_grad()
    model.eval()


def deltas(model: Any) -> list[Tensor]:
    return [B @ A for A, B in map(factors, sites(model))]


# --------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("links", "total"), [(3, 10), (4, 4), (7, 3), (1, 5)])
def test_links_share_the_run_out(links: int, total: int) -> None:
    outer, found, index = chain_of_links(links=links), [], 0
    while (episode := outer.episode(index, total, (), draw_for(0))) is not None:
        found.append(episode.steps)
        index += 1
    assert sum(found) == total and len(found) == min(links, total) and max(found) - min(found) <= 1


def test_a_link_has_so_many_steps_and_the_last_one_the_rest() -> None:
    outer = chain_of_links(link_steps=200)
    assert [outer.episode(k, 450, (), draw_for(0)).steps for k in range(3)] == [200, 200, 50]  # type: ignore[union-attr]
    assert outer.episode(3, 450, (), draw_for(0)) is None
    assert outer.episode(1, 450, (), draw_for(0)).warm_up_steps == 10  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- identities


class Line(nn.Module):
    """x ↦ W·x in float64, for least squares."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x)
        return y


def least_squares(n: int = 200, d_in: int = 10, d_out: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, d_in, generator=g, dtype=torch.float64)
    return X, X @ torch.randn(d_in, d_out, generator=g, dtype=torch.float64) * 2


def line(recipe: Recipe, d_out: int = 8, d_in: int = 10) -> Any:
    torch.manual_seed(0)
    return adapt(Line(d_out, d_in).double(), recipe).double()


def loss_of(model: Any, X: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * (model(X) - Y).square().sum() / len(X)


def test_k_exact_links_are_the_best_of_rank_kr() -> None:
    """C1: live factors at each link's optimum; after j links the loss is ½·Σ_{i > jr} σ_i²."""
    recipe = made("chain-of-lora", {"links": 4}, r=2, alpha=6.0, targets=("map",))
    X, Y = least_squares()
    model = line(recipe)
    C, target = X.T @ X / len(X), torch.linalg.lstsq(X, Y).solution.T
    rest = float(loss_of(lambda x: x @ target.T, X, Y))
    opt = optimizer(model, recipe, 0.0)
    driver = drive(model, recipe, opt, 4)
    (site,) = sites(model)
    W0 = site.layer.get_base_layer().weight.detach()
    want = chains.best_losses(target - W0, C, 2, 4)
    for j in range(4):
        now = live_of(site.layer, site.adapter)
        A, B = factors(site)
        best_A, best_B = chains.best_link(target - W0 - B.double() @ A.double(), C, 2)
        now.A.data.copy_(best_A)
        now.B.data.copy_(best_B / site.s)
        found = loss_of(model, X, Y).item() - rest
        assert found == pytest.approx(want[j + 1], rel=1e-6, abs=1e-5)
        loss_of(model, X, Y).backward()
        opt.step()
        opt.zero_grad()
        driver.after_step()
        assert loss_of(model, X, Y).item() - rest == pytest.approx(found, rel=1e-6, abs=1e-6)  # C3
    assert torch.linalg.matrix_rank(deltas(model)[0], atol=1e-4) == 8  # C4


def test_links_of_one_direction_are_frank_wolfes_atoms() -> None:
    """C7: the linear oracle of the nuclear ball is a link of rank 1, the convex step a weight for each link; the mean
    gap stays below the bound."""
    steps = 40
    recipe = made("sd-lora", {"tasks": steps, "epsilon": 1e-9}, r=1, alpha=1.0, targets=("map",))
    X, Y = least_squares()
    model = line(recipe)
    (site,) = sites(model)
    C = X.T @ X / len(X)
    gap = torch.linalg.lstsq(X, Y).solution.T - site.layer.get_base_layer().weight.detach()  # type: ignore[operator]
    radius = float(torch.linalg.svdvals(gap).sum())
    want, gaps, bound = chains.frank_wolfe(gap, C, radius, steps)
    assert sum(gaps) / steps < bound
    eta = (0.5 * float((gap @ C * gap).sum())) ** 0.5 / (
        2 * radius * (float(torch.linalg.eigvalsh(C)[-1]) * steps) ** 0.5
    )
    opt = optimizer(model, recipe, 0.0)
    driver = drive(model, recipe, opt, steps)
    alpha = shared_of(model.base_model)["alpha"].data
    for t in range(steps):
        A, B = (factor.double() for factor in factors(site))
        best_A, best_B = chains.best_link(-(B @ A - gap) @ C, torch.eye(10, dtype=C.dtype), 1)
        now = live_of(site.layer, site.adapter)
        now.A.data.copy_(best_A)
        now.B.data.copy_(best_B)
        alpha[:t] *= 1 - eta
        alpha[t] = eta * radius
        A, B = (factor.double() for factor in factors(site))
        torch.testing.assert_close(B @ A, want[t], rtol=1e-4, atol=1e-4)
        loss_of(model, X, Y).backward()
        opt.step()
        opt.zero_grad()
        driver.after_step()


@pytest.mark.slow
@pytest.mark.parametrize(("links", "bound"), [(1, None), (2, None), (4, 1e-6)])
def test_trained_links_reach_the_best_of_rank_kr(links: int, bound: float | None) -> None:
    """C2: Adam, 6000 steps, a linear course in each link. Committed links are float32, which bounds the last case."""
    recipe = made("chain-of-lora", {"links": links, "warm_up_steps": 0}, r=2, alpha=2.0, targets=("map",))
    recipe = replace(recipe, max_grad_norm=0.0)
    X, Y = least_squares()
    model = line(recipe)
    target = torch.linalg.lstsq(X, Y).solution.T
    rest = float(loss_of(lambda x: x @ target.T, X, Y))
    W0 = sites(model)[0].layer.get_base_layer().weight.detach()  # type: ignore[operator]
    want = chains.best_losses(target - W0, X.T @ X / len(X), 2, links)[links]
    opt = optimizer(model, recipe, 2e-2)
    driver = drive(model, recipe, opt, 6000)
    per_link = 6000 // links
    for step in range(6000):
        opt.lr_factor = 1 - (step % per_link) / per_link
        loss_of(model, X, Y).backward()
        opt.step()
        opt.zero_grad()
        driver.after_step()
    found = loss_of(model, X, Y).item() - rest
    assert found < bound if bound is not None else found == pytest.approx(want, rel=1e-4)


@dataclass(frozen=True)
class BothSides:
    """RAC-LoRA's start with A frozen, except that A may train too."""

    needs: Need = NOTHING
    facts: ClassVar[Facts] = Facts()

    def fits(self, d_out: int, d_in: int, r: int) -> str:
        return ""

    def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
        return replace(random_side("A")(W, r, s, evidence, draw), train="AB")


@pytest.mark.parametrize("transform", ["adam", "descent"])
def test_links_of_one_step_train_B_alone(transform: str) -> None:
    """C5, R5: Chain of LoRA with one step per link is RAC-LoRA with A frozen, bit for bit, since B = 0 gives gA = 0."""
    rac = made("rac-lora", {"link_steps": 1, "frozen": "A"})
    rac = rac if transform == "adam" else replace(rac, transform=descend())
    cola = replace(rac, init=BothSides())
    for one, other in zip(deltas(trained(rac, 4)), deltas(trained(cola, 4)), strict=True):
        assert one.any() and torch.equal(one, other)


@pytest.mark.parametrize("options", [{"links": 1}, {"link_steps": 9}])
def test_one_link_is_plain_lora(options: dict[str, Any]) -> None:
    """C8, bit for bit."""
    chain, plain = trained(made("chain-of-lora", options), 3), trained(made("lora"), 3)
    for one, other in zip(deltas(chain), deltas(plain), strict=True):
        assert torch.equal(one, other)


def test_the_first_step_of_a_link_is_a_first_step() -> None:
    """C6: the state is clear, step counters too: |ΔB| = lr where the gradient is large, ΔA = 0."""
    recipe = made("chain-of-lora", {"links": 2, "warm_up_steps": 0}, max_grad_norm=0.0)
    model, opt, driver = begun(recipe, 4, lr=1e-2)
    for step in range(2):
        one_step(model, opt, driver, step)
    before = {s.name: live_of(s.layer, s.adapter).A.detach().clone() for s in sites(model)}
    assert not any(live_of(s.layer, s.adapter).B.any() for s in sites(model))
    one_step(model, opt, driver, 2)
    for site in sites(model):
        live = live_of(site.layer, site.adapter)
        assert torch.equal(live.A, before[site.name])
        assert live.B.abs().median().item() == pytest.approx(1e-2, rel=1e-2)


Shape = tuple[int, int]


def links_of(frozen: str, count: int, shape: Shape = (8, 10), r: int = 2, **options: Any) -> list[Start]:
    init, W = random_side(frozen, **options), Weight("w", shape, lambda: torch.zeros(shape))  # type: ignore[arg-type]
    return [init(W, r, 1.0, None, draw_for(0, "w", k)) for k in range(count)]


def test_draws_are_projectors() -> None:
    """R1: P² = P, Pᵀ = P, tr P = r; its mean over draws is (r/d)·I."""
    starts = links_of("A", 3000)
    A = torch.stack([start.A for start in starts]).double() * 3**0.5
    P = A.mT @ A
    torch.testing.assert_close(P @ P, P, atol=1e-6, rtol=0)
    assert (P.diagonal(dim1=-2, dim2=-1).sum(-1) - 2).abs().max() < 1e-5
    assert (P.mean(0) - 0.2 * torch.eye(10)).abs().max() < 0.02


def stepped(transform: Transform, starts: Sequence[Start], G: Tensor, s: float, lr: float) -> list[Tensor]:
    """W⁺ − W of one step of each start, in float64."""
    pairs = [Pair(str(k), t.A.double(), t.B.double(), s, t.train) for k, t in enumerate(starts)]
    grads = [Grad(s * p.B.T @ G if "A" in p.train else None, s * G @ p.A.T if "B" in p.train else None) for p in pairs]
    ctx = Ctx(lr, lr, 1, lambda purpose, name: torch.Generator())
    group = Group(pairs, grads, [transform.init(p) for p in pairs], ctx)
    found = transform.update(group, {}, transform.prepare(group).carry)
    moved = []
    for p, u in zip(pairs, found, strict=True):
        A, B = p.A if u.A is None else p.A + u.A, p.B if u.B is None else p.B + u.B
        moved.append(s * (B @ A - p.B @ p.A))
    return moved


@pytest.mark.parametrize(("frozen", "d"), [("A", 10), ("B", 8)])
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_exact_step_contracts_as_its_formula_says(frozen: str, d: int, lr: float) -> None:
    """R2: E f⁺/f = 1 − (2γ − γ²)·r/d over 3000 draws, and each step is the oracle's."""
    gap = torch.randn(8, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    starts = links_of(frozen, 3000)
    moved = stepped(projected_descent(), starts, gap, s=2.0, lr=lr)
    for start, move in zip(starts[:20], moved, strict=False):
        kept = {frozen: getattr(start, frozen).double()}
        torch.testing.assert_close(gap + move, rac_lora.exact_step(gap, gap, lr, **kept), atol=1e-12, rtol=0)
    rate = 1 - float((gap + torch.stack(moved)).square().sum((-2, -1)).mean() / gap.square().sum())
    assert rate == pytest.approx(1 - rac_lora.contraction(lr, 2, d), rel=0.02)


def test_the_exact_step_is_lora_fas_and_plain_descent_at_one_scale() -> None:
    """R4: ΔB·s·A = −γ·G·P_A = LoRA-FA's b, and with AAᵀ = I/s² plain descent on B is the same."""
    G = torch.randn(8, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = links_of("A", 1)[0]
    (ours,) = stepped(projected_descent(), [start], G, s=2.0, lr=0.3)
    (fa,) = stepped(Projected(), [start], G, s=2.0, lr=0.3)
    torch.testing.assert_close(ours, -0.3 * fa, atol=1e-14, rtol=0)
    unit = links_of("A", 1, size=0.5)[0]
    (plain,) = stepped(descend(), [unit], G, s=2.0, lr=0.3)
    torch.testing.assert_close(plain, stepped(projected_descent(), [unit], G, s=2.0, lr=0.3)[0], atol=1e-6, rtol=0)


def test_the_exact_step_wants_one_factor_at_rest() -> None:
    start = replace(links_of("A", 1)[0], train="AB")
    with pytest.raises(WorkFailed, match=r"both train at 0"):
        stepped(projected_descent(), [start], torch.ones(8, 10, dtype=torch.float64), 1.0, 0.1)


def test_averages_of_the_free_factor_are_averages_of_products() -> None:
    """R7: with one draw for all clients, mean(B_i)·A = mean(B_i·A)."""
    A = links_of("A", 1)[0].A.double()
    B = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(B.mean(0) @ A, (B @ A).mean(0), atol=1e-15, rtol=0)


@pytest.mark.slow
def test_chains_of_exact_links_stay_below_the_papers_bound() -> None:
    """R3: (1 − γμλ)^T, C = diag(0.25 … 2), γ = 1/L."""
    C = torch.linspace(0.25, 2, 10, dtype=torch.float64)
    G = torch.Generator().manual_seed(4)
    gap = torch.randn(200, 8, 10, generator=G, dtype=torch.float64)
    loss = [float(0.5 * (gap.square() * C).sum((-2, -1)).mean())]
    first, worst = loss[0], []
    for link in range(30):
        starts = links_of("A", 200 * (link + 1))[200 * link :]
        gap = gap + torch.stack([stepped(projected_descent(), [t], g * C, 1.0, 0.5)[0] for t, g in zip(starts, gap)])  # noqa: B905
        loss.append(float(0.5 * (gap.square() * C).sum((-2, -1)).mean()))
        worst.append(loss[-1] / first / (1 - 0.5 * 0.25 * 0.2) ** (link + 1))
    assert max(worst) < 1 and loss[-1] / first < 0.03


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_exact_links_converge_where_lora_does_not(seed: int) -> None:
    """R8, through the driver: f = Σ M·W² + Σ W with M = 10 at (1, 1), else 1, from W = 1. 300 links of rank 1 at 1/L
    end below the PL bound, LoRA of rank 1 stays at a point of higher loss."""
    M = torch.ones(3, 3, dtype=torch.float64)
    M[0, 0] = 10.0
    best, gaps = float(-(1 / (4 * M)).sum()), {}
    for name, options, lr in (
        ("rac-lora-exact", {"link_steps": 1, "frozen": "A", "warm_up_steps": 0}, 1 / 20),
        ("lora", {}, 1 / 200),
    ):
        recipe = made(name, options, r=1, alpha=1.0, targets=("map",), max_grad_norm=0.0, seed=seed)
        recipe = recipe if options else replace(recipe, transform=descend())
        model = line(recipe, d_out=3, d_in=3)
        sites(model)[0].layer.get_base_layer().weight.data.fill_(1.0)  # type: ignore[operator]
        opt = optimizer(model, recipe, lr)
        driver = drive(model, recipe, opt, 300)
        for step in range(301):
            W = model(torch.eye(3, dtype=torch.float64)).T
            loss = (M * W.square()).sum() + W.sum()
            gaps[name] = loss.item() - best
            if step == 300:
                break
            loss.backward()
            opt.step()
            opt.zero_grad()
            driver.after_step()
    assert gaps["rac-lora-exact"] < 1.1e-3 and gaps["lora"] > 0.1


class Tanh(nn.Module):
    """32-24-8 with a tanh between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 24, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


@pytest.mark.slow
def test_chains_order_on_a_small_net_as_known() -> None:
    """R9: rank 1, 2000 Adam steps, 40 links of 50: Chain of LoRA < RAC-LoRA (A frozen) < LoRA, by median loss."""
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "chain": ("chain-of-lora", {"link_steps": 50, "warm_up_steps": 0}),
        "rac": ("rac-lora", {"link_steps": 50, "warm_up_steps": 0, "frozen": "A"}),
        "lora": ("lora", {}),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in range(3):
        torch.manual_seed(seed)
        X, student = torch.randn(256, 32), Tanh()
        teacher = Tanh()
        for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
            p.data.copy_(q + (0.7 / q.shape[1]) ** 0.5 * torch.randn(q.shape))
        Y = teacher(X).detach()
        for arm, (name, options) in arms.items():
            recipe = made(name, options, r=1, alpha=1.0, targets=("up", "down"), max_grad_norm=0.0, seed=seed)
            model = adapt(copy.deepcopy(student), recipe)
            opt = optimizer(model, recipe, 2e-2)
            driver = drive(model, recipe, opt, 2000)
            for _ in range(2000):
                loss = (model(X) - Y).square().mean()
                loss.backward()
                opt.step()
                opt.zero_grad()
                driver.after_step()
            found[arm].append(loss.item())
    chain, rac, lora = (sorted(found[arm])[1] for arm in ("chain", "rac", "lora"))
    assert 2 * chain < rac and 1.5 * rac < lora


# -------------------------------------------------------------------------------------------------------- who rests


def test_the_side_that_rests() -> None:
    assert [s.train for s in links_of("alternate", 4)] == ["B", "A", "B", "A"]
    assert {s.train for s in links_of("smaller", 3, shape=(8, 10))} == {"A"}
    assert {s.train for s in links_of("smaller", 3, shape=(10, 8))} == {"B"}
    assert {s.train for s in links_of("smaller", 3, shape=(8, 8))} == {"B"}
    assert {s.train for s in links_of("bernoulli", 20, chance=0.0)} == {"B"}  # ≡ A frozen
    coins = [s.train for s in links_of("bernoulli", 400, chance=0.3)]
    assert coins.count("A") == pytest.approx(120, abs=30)
    with pytest.raises(LoralignError, match=r"rank 40 .* can start 32 slots at most"):
        adapt(llama(), made("rac-lora", {"frozen": "A"}, r=40))


@pytest.mark.parametrize("frozen", ["A", "B", "smaller", "alternate", "bernoulli"])
def test_a_factor_at_rest_has_no_gradient_no_state_and_does_not_decay(frozen: str) -> None:
    """R6, over two links; the clip does not see it either."""
    model, opt, driver = begun(made("rac-lora", {"links": 2, "frozen": frozen}, weight_decay=0.3), 4)
    for step in range(4):
        rests = {s.name: "AB".replace(s.layer.lora_variant["default"].train, "") for s in sites(model)}
        before = {s.name: getattr(live_of(s.layer, "default"), rests[s.name]).detach().clone() for s in sites(model)}
        model.train()
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert opt.grad_norm >= float(norm) * 0.999
        for site in sites(model):
            p = getattr(live_of(site.layer, "default"), rests[site.name])
            assert p.grad is None and not opt.state[p] and torch.equal(p.detach(), before[site.name])
            assert p.requires_grad is (frozen in ("alternate", "bernoulli"))
        driver.after_step()
        opt.zero_grad()
    assert all(d.any() for d in deltas(model))


@pytest.mark.parametrize("name", ["chain-of-lora", "pissa + chain-of-lora"])
def test_links_are_cut_to_their_best_slots_and_the_loss_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two committed slots stay at each knot, beside the two of a live twin."""
    model, opt, driver = begun(made(name, {"links": 3, "keep_slots": 2}, r=2, max_grad_norm=0.0), 3)
    site, width = sites(model)[0], 4 if name.startswith("pissa") else 2
    for step in range(3):
        one_step(model, opt, driver, step)
        live = live_of(site.layer, "default")
        assert live.A0.shape[0] == width and sum(live.links) in (0, 2)
    assert set(driver.episodes.lost) == {1, 2}
    assert "which loses" in caplog.text and driver.episodes.lost[2] > 0


def test_a_link_starts_from_the_weight_that_the_links_before_it_left() -> None:
    seen: dict[str, Tensor] = {}

    @dataclass(frozen=True)
    class Seen:
        facts: ClassVar[Facts] = Facts()
        needs: ClassVar[Need] = NOTHING

        def fits(self, d_out: int, d_in: int, r: int) -> str:
            return ""

        def __call__(self, W: Weight, r: int, s: float, evidence: Directions | None, draw: Draw) -> Start:
            seen[W.name] = W.read()
            return Start(torch.ones(r, W.shape[1]), torch.zeros(W.shape[0], r))

    model, opt, driver = begun(replace(made("chain-of-lora", {"links": 2}), init=Seen()), 2, lr=3e-2)
    base = dict(seen)
    model.train()
    model(**batch_for(model)).loss.backward()
    opt.step()
    driver.after_step()
    for site in sites(model):
        A, B = factors(site)
        assert (B @ A).norm() > 0.01 * base[site.name].norm()
        torch.testing.assert_close(seen[site.name], base[site.name] + B @ A)


def test_only_later_links_warm_up() -> None:
    _, opt, driver = begun(made("chain-of-lora", {"links": 2, "warm_up_steps": 2}), 8)
    found = [opt.lr_factor]
    for _ in range(7):
        opt.untold = 0
        driver.end_step(driver.step + 1)
        driver.before_step()
        found.append(opt.lr_factor)
    assert found == [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_a_broken_step_is_not_committed() -> None:
    """late: as on a GPU, where a step is judged when the next one begins, or a knot is tied."""
    model, opt, driver = begun(made("chain-of-lora", {"links": 2}), 2)
    opt.norms.late = True
    before = deltas(model)
    model.train()
    model(**batch_for(model)).loss.backward()
    next(p.grad for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = torch.nan
    opt.step()
    with pytest.raises(WorkFailed, match="the gradient is not finite at step 1"):
        driver.after_step()
    assert all(not live_of(site.layer, "default").links for site in sites(model))
    assert all(torch.equal(a, b) for a, b in zip(deltas(model), before, strict=True))


def test_a_cut_is_the_best_of_its_rank() -> None:
    model, opt, driver = begun(made("chain-of-lora", {"links": 2, "keep_slots": 2}), 2, lr=3e-2)
    model.train()
    model(**batch_for(model)).loss.backward()
    opt.step()
    full = deltas(model)
    driver.after_step()
    lost = whole = 0.0
    for site, before in zip(sites(model), full, strict=True):
        A, B = factors(site)
        S = torch.linalg.svdvals(before.double())
        off = (before - B @ A).double().norm()
        assert float(off) == pytest.approx(float(S[2:].norm()), rel=1e-3, abs=1e-5)
        lost, whole = lost + float(off / site.s) ** 2, whole + float(S.norm() / site.s) ** 2
    assert driver.episodes.lost[1] == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and lost > 0


# --------------------------------------------------------------------------------------------------------- whole runs

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain-of-lora": ("chain-of-lora", {"links": 3}),
    "rac-lora bernoulli": ("rac-lora", {"links": 3, "frozen": "bernoulli"}),
    "rac-lora-exact": ("rac-lora-exact", {"links": 3, "frozen": "alternate"}),
    "lora-ga": ("lora-ga + chain-of-lora", {"links": 3, "micro_batches": 2}),
    "lora-rite": ("chain-of-lora + lora-rite", {"links": 3}),
    "lora-pro": ("chain-of-lora + lora-pro", {"links": 3}),
    "rm-lora": ("chain-of-lora + rm-lora", {"links": 3}),
    "keep_slots": ("chain-of-lora", {"links": 3, "keep_slots": 2}),
    "xgblora": ("xgblora", {"link_steps": 2, "choice": "uniform"}),
    "sd-lora": ("sd-lora", {"tasks": 3}),
}


def run(folder: Path, case: str, resume: Path | None = None, **args: Any) -> tuple[Any, Any]:
    recipe = made(*RUNS[case])
    trainer = toy_trainer(folder, peft_config(recipe, llama()), **{"steps": STEPS, "save_steps": 1, **args})
    callback = attach(trainer, recipe, resume_from=resume)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.model, callback


@pytest.mark.parametrize("case", RUNS)
def test_a_run_stopped_before_at_and_after_a_knot_goes_on_bit_exactly(case: str, tmp_path: Path) -> None:
    """Knots after steps 2 and 4. LoRA-GA reads the gradient again at each."""
    model, callback = run(tmp_path / "whole", case)
    ranks = {factors(site)[0].shape[0] for site in sites(model)}
    most = {"lora-ga": 18, "keep_slots": 5}.get(case, 9)
    assert ranks == {most} if case != "xgblora" else len(ranks) == 2
    assert callback.driver.episodes.position == (2, 4)
    for step in (3, 4, 5) if case in ("chain-of-lora", "rac-lora bernoulli", "lora-ga") else (4,):
        again, _ = run(tmp_path / f"from-{step}", case, tmp_path / "whole" / f"checkpoint-{step}")
        want, found = model.state_dict(), again.state_dict()
        assert want.keys() == found.keys()
        assert [k for k in want if not torch.equal(want[k], found[k])] == [], step


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch_for(model)).logits
    return out


@pytest.mark.parametrize("case", ["chain-of-lora", "rac-lora bernoulli", "lora-ga", "keep_slots", "xgblora", "sd-lora"])
@pytest.mark.parametrize("best", [1, 3])
def test_the_best_of_an_earlier_link_comes_back(case: str, best: int, tmp_path: Path) -> None:
    """`load_best_model_at_end` across a knot, and early stopping: the adapter of the chosen step, links too."""
    recipe = made(*RUNS[case])
    args = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_strategy": "steps"}
    args |= {"metric_for_best_model": "eval_wanted", "greater_is_better": True}
    trainer = toy_trainer(tmp_path, peft_config(recipe, llama()), steps=STEPS, save_steps=1, held_out=4, **args)
    callback = attach(trainer, recipe)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    seen: dict[int, tuple[Tensor, list[Any]]] = {}

    def judged(found: Any) -> dict[str, float]:
        now = trainer.state.global_step
        seen[now] = logits(trainer.model), [live_of(s.layer, "default").links for s in sites(trainer.model)]
        return {"wanted": -abs(now - float(best))}

    trainer.compute_metrics = judged
    trainer.train()
    assert trainer.state.global_step == best + 2 and trainer.state.best_global_step == best
    trainer.save_model(str(tmp_path / "best"))
    stock = PeftModel.from_pretrained(llama(), tmp_path / "best")
    assert (logits(stock) - seen[best][0]).norm() <= 1e-6 * seen[best][0].norm()
    assert torch.equal(logits(trainer.model), seen[best][0]) and not torch.equal(seen[best][0], seen[best + 2][0])
    assert [live_of(s.layer, "default").links for s in sites(trainer.model)] == seen[best][1]
    assert callback.driver is not None


@pytest.mark.parametrize(
    ("name", "options", "r"),
    [
        ("chain-of-lora", {"links": 3, "keep_slots": 2}, 3),
        ("rac-lora", {"links": 3, "frozen": "alternate"}, 3),
        ("xgblora", {"link_steps": 1, "fraction": 0.5, "choice": "uniform"}, 1),
        ("pissa + xgblora", {"link_steps": 2, "fraction": 0.5}, 3),
        ("sd-lora", {"tasks": 3, "later_ranks": (2, 1), "tasks_per_rank": 1}, 3),
        ("sd-lora", {"tasks": 3, "current": "raw", "norm": "factors"}, 3),
    ],
)
def test_stock_peft_computes_the_same_at_every_moment(name: str, options: Any, r: int, tmp_path: Path) -> None:
    """Before, at and after every knot: what is saved then has the logits of then."""
    model, opt, driver = begun(made(name, options, r=r), STEPS)
    for step in range(STEPS):
        model.train()
        model(**batch_for(model, seed=step)).loss.backward()
        opt.step()
        for moment in ("step", "knot"):
            if moment == "knot":
                driver.after_step()
                opt.zero_grad()
            want = logits(model)
            model.save_pretrained(tmp_path / f"{step}-{moment}")
            stock = PeftModel.from_pretrained(llama(), tmp_path / f"{step}-{moment}")
            assert (logits(stock) - want).norm() <= 1e-6 * want.norm(), (step, moment)


def test_evidence_that_nobody_collects_is_missed_before_the_first_step() -> None:
    with pytest.raises(LoralignError, match=r"starts from evidence, .* pass `gather` to drive\(\)"):
        begun(made("lora-ga + chain-of-lora", {"links": 2, "micro_batches": 1}), 2)
    begun(made("lora-ga + chain-of-lora", {"links": 1, "micro_batches": 1}), 2)
